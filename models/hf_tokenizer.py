"""A Tokenizer from the files of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from models.errors import ModelFormatError, UnsupportedModelError
from models.files import read_json, read_text
from models.tokenizer import Tokenizer


def read_backend(path: Path) -> Backend:
    """A tokenizer.json, freed of the padding and truncation that it may ask for."""
    text = read_text(path)
    try:
        backend = Backend.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ModelFormatError(f"{path}: not a sound tokenizer.json ({error})") from error
    backend.no_padding()
    backend.no_truncation()
    return backend


def load_hf_tokenizer(folder: Path, config: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer of a folder, or None where it has none.

    End tokens are those of generation_config.json (else of `config`, the dict of config.json) and the tokenizer's own.
    """
    if not (folder / "tokenizer.json").exists():
        if (folder / "tokenizer.model").exists():
            raise UnsupportedModelError(f"{folder}: tokenizer.model without tokenizer.json is not supported")
        return None
    backend = read_backend(folder / "tokenizer.json")
    settings = _optional_json(folder / "tokenizer_config.json")
    eos = _special_id(folder, backend, settings, "eos_token")
    ends = hf_eos_token_ids(folder, config)
    return Tokenizer(
        backend=backend,
        chat_template=_chat_template(folder, settings),
        bos_token_id=_special_id(folder, backend, settings, "bos_token"),
        eos_token_ids=tuple(dict.fromkeys([*([] if eos is None else [eos]), *ends])),
    )


def hf_eos_token_ids(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json, else of config.json: a number or a list."""
    generation = _optional_json(folder / "generation_config.json")
    value = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for item in ids:
        if not isinstance(item, int) or isinstance(item, bool) or item < 0:
            raise ModelFormatError(f"{folder}: eos_token_id must be a token id or a list of them, not {value!r}")
    return tuple(dict.fromkeys(ids))


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").exists():
        return read_text(folder / "chat_template.jinja")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several templates by name
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ModelFormatError(f"{folder / 'tokenizer_config.json'}: chat_template must be text, not {template!r}")
    return template


def _special_id(folder: Path, backend: Backend, settings: dict[str, Any], key: str) -> int | None:
    token = settings.get(key)
    if isinstance(token, dict):
        token = token.get("content")
    if token is None:
        return None
    token_id = backend.token_to_id(token) if isinstance(token, str) else None
    if token_id is None:
        raise ModelFormatError(f"{folder / 'tokenizer_config.json'}: {key} {token!r} is no token of tokenizer.json")
    return token_id


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
