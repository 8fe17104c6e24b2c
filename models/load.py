"""The door of this package: a path or a name in, a LoadedModel out."""

from __future__ import annotations

import hashlib
import os
from enum import Enum
from pathlib import Path

from models import checkpoint
from models.errors import ModelNotFoundError
from models.files import read_json
from models.fingerprint import fingerprint_files
from models.gguf_config import config_from_gguf
from models.gguf_file import GgufFile
from models.gguf_tokenizer import tokenizer_from_gguf
from models.gguf_weights import load_gguf_decoder
from models.hf_config import config_from_hf
from models.hf_tokenizer import hf_eos_token_ids, load_hf_tokenizer
from models.hf_weights import load_hf_decoder
from models.loaded import LoadedModel
from models.shapes import random_decoder, shape_config
from models.weights import resolve_dtype

RANDOM = "random:"


class _Kind(Enum):
    GGUF = "a GGUF file"
    HF = "a Hugging Face folder"
    ORBAX = "a checkpoint"


def load(path: str | os.PathLike[str], *, dtype: str = "float32", seed: int = 0) -> LoadedModel:
    """Loads weights, config and tokenizer onto the default device.

    Args:
      path: a GGUF file, a Hugging Face folder (config.json, *.safetensors, tokenizer.json), a checkpoint folder made by
        `models.save`, or "random:NAME" for random weights of a public shape (no tokenizer then).
      dtype: "float32" or "bfloat16", the dtype of all weights.
      seed: of the random weights; other paths ignore it.

    Raises:
      ModelError: a subclass says what is wrong, its message where (models/errors.py).
    """
    resolve_dtype(dtype)
    if _is_random(path):
        return _load_random(os.fspath(path), dtype, seed)
    kind, place = _recognise(path)
    if kind is _Kind.GGUF:
        return _load_gguf(place, dtype)
    return _load_hf(place, dtype) if kind is _Kind.HF else _load_checkpoint(place, dtype)


def fingerprint(path: str | os.PathLike[str], *, seed: int = 0) -> str:
    """Hex identity of the weights behind `path`, as in `LoadedModel.fingerprint`; reads samples of the files only."""
    if _is_random(path):
        name = os.fspath(path).removeprefix(RANDOM)
        return hashlib.sha256(f"{RANDOM}{name}\0{shape_config(name)!r}\0{seed}".encode()).hexdigest()
    kind, place = _recognise(path)
    if kind is _Kind.GGUF:
        return fingerprint_files(place.parent, [place])
    if kind is _Kind.ORBAX:
        return fingerprint_files(place, [file for file in place.rglob("*") if file.is_file()])
    names = ("*.json", "*.safetensors", "*.jinja")
    return fingerprint_files(place, [file for name in names for file in place.glob(name)])


def _is_random(path: str | os.PathLike[str]) -> bool:
    return os.fspath(path).startswith(RANDOM)


def _recognise(path: str | os.PathLike[str]) -> tuple[_Kind, Path]:
    place = Path(path).absolute()
    if place.is_file():
        return _Kind.GGUF, place
    if (place / checkpoint.MARKER).is_file():
        return _Kind.ORBAX, place
    if (place / "config.json").is_file():
        return _Kind.HF, place
    if place.is_dir():
        raise ModelNotFoundError(
            f"{place}: neither config.json (a Hugging Face folder) nor {checkpoint.MARKER} (a checkpoint) is there"
        )
    raise ModelNotFoundError(f"{place}: no such file or folder (random weights are called '{RANDOM}NAME')")


def _load_gguf(path: Path, dtype: str) -> LoadedModel:
    file = GgufFile(path)
    config, tokenizer = config_from_gguf(file), tokenizer_from_gguf(file.metadata)
    return LoadedModel(
        name=path.name,
        module=load_gguf_decoder(file, config, dtype=dtype),
        config=config,
        tokenizer=tokenizer,
        eos_token_ids=tokenizer.eos_token_ids,
        fingerprint=fingerprint(path),
    )


def _load_hf(folder: Path, dtype: str) -> LoadedModel:
    values = read_json(folder / "config.json")
    config, tokenizer = config_from_hf(values), load_hf_tokenizer(folder, values)
    return LoadedModel(
        name=folder.name,
        module=load_hf_decoder(folder, config, dtype=dtype),
        config=config,
        tokenizer=tokenizer,
        eos_token_ids=tokenizer.eos_token_ids if tokenizer else hf_eos_token_ids(folder, values),
        fingerprint=fingerprint(folder),
    )


def _load_checkpoint(folder: Path, dtype: str) -> LoadedModel:
    module, config, tokenizer, ends = checkpoint.restore(folder, dtype=dtype)
    return LoadedModel(
        name=folder.name,
        module=module,
        config=config,
        tokenizer=tokenizer,
        eos_token_ids=ends,
        fingerprint=fingerprint(folder),
    )


def _load_random(path: str, dtype: str, seed: int) -> LoadedModel:
    config = shape_config(path.removeprefix(RANDOM))
    return LoadedModel(
        name=path,
        module=random_decoder(config, dtype=dtype, seed=seed),
        config=config,
        tokenizer=None,
        eos_token_ids=(),
        fingerprint=fingerprint(path, seed=seed),
    )
