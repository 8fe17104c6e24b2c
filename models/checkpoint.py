"""A loaded model as an Orbax checkpoint: a folder with weights/, decoder.json and perhaps tokenizer.json."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from models.errors import ModelExistsError, ModelFormatError, UnsupportedModelError
from models.families import LanguageModel, ModelConfig, config_from_dict, config_to_dict
from models.files import read_json
from models.hf_tokenizer import read_backend
from models.loaded import LoadedModel
from models.tokenizer import Tokenizer
from models.weights import abstract_decoder, merge_decoder, resolve_dtype

MARKER = "decoder.json"  # written last: a folder without it is no checkpoint
_FORMAT = 1


def save(loaded: LoadedModel, folder: str | os.PathLike[str]) -> None:
    """Writes the model so that `models.load(folder)` gives it back; ModelExistsError if something is there."""
    target = Path(folder).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelExistsError(f"{target} already exists and is not an empty folder")
    target.mkdir(parents=True, exist_ok=True)
    flat = nnx.to_flat_state(nnx.state(loaded.module))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(target / "weights", {_key(path): leaf.get_value() for path, leaf in flat})
    tokenizer = loaded.tokenizer
    if tokenizer is not None:
        (target / "tokenizer.json").write_text(tokenizer.backend.to_str(), encoding="utf-8")
    header = {
        "format": _FORMAT,
        "config": config_to_dict(loaded.config),
        "eos_token_ids": loaded.eos_token_ids,
        "bos_token_id": tokenizer.bos_token_id if tokenizer else None,
        "chat_template": tokenizer.chat_template if tokenizer else None,
    }
    (target / MARKER).write_text(json.dumps(header, indent=1), encoding="utf-8")


def restore(folder: Path, *, dtype: str) -> tuple[LanguageModel, ModelConfig, Tokenizer | None, tuple[int, ...]]:
    """Module, config, tokenizer and end tokens of a checkpoint; errors name the leaf or the key."""
    header = read_json(folder / MARKER)
    if header.get("format") != _FORMAT:
        raise UnsupportedModelError(f"{folder / MARKER}: format {header.get('format')!r}; allowed: {_FORMAT}")
    if not isinstance(header.get("config"), dict):
        raise ModelFormatError(f"{folder / MARKER}: the key 'config' must be an object, not {header.get('config')!r}")
    config = config_from_dict(header["config"])
    ends = header.get("eos_token_ids")
    if not isinstance(ends, list) or not all(isinstance(item, int) for item in ends):
        raise ModelFormatError(f"{folder / MARKER}: the key 'eos_token_ids' must be a list of ids, not {ends!r}")
    module = _restore_weights(folder / "weights", config, dtype)
    return module, config, _restore_tokenizer(folder, header, tuple(ends)), tuple(ends)


def _restore_weights(folder: Path, config: ModelConfig, dtype: str) -> LanguageModel:
    graphdef, variables = abstract_decoder(config, resolve_dtype(dtype))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {
        _key(path): jax.ShapeDtypeStruct(leaf.get_value().shape, leaf.get_value().dtype, sharding=device)
        for path, leaf in variables.items()
    }
    with ocp.StandardCheckpointer() as checkpointer:
        _check_leaves(folder, checkpointer, wanted)
        try:
            arrays: dict[str, jax.Array] = checkpointer.restore(folder.absolute(), wanted)
        except Exception as error:  # Orbax reports damaged files through many types
            raise ModelFormatError(f"{folder}: {error}") from error
    return merge_decoder(graphdef, variables, {path: arrays[_key(path)] for path in variables})


def _check_leaves(
    folder: Path, checkpointer: ocp.StandardCheckpointer, wanted: dict[str, jax.ShapeDtypeStruct]
) -> None:
    """Compares names and shapes with what the checkpoint says of itself, before anything is allocated."""
    try:
        item: Any = checkpointer.metadata(folder.absolute()).item_metadata
        found: dict[str, Any] = dict(item.tree)
    except Exception as error:
        raise ModelFormatError(f"{folder}: not a sound Orbax checkpoint ({error})") from error
    for name in sorted(wanted.keys() ^ found.keys()):
        raise ModelFormatError(f"{folder}: leaf {name!r} is {'missing' if name in wanted else 'surplus'}")
    for name, leaf in wanted.items():
        if tuple(found[name].shape) != leaf.shape:
            raise ModelFormatError(
                f"{folder}: leaf {name!r} has shape {tuple(found[name].shape)}, the config needs {leaf.shape}"
            )


def _restore_tokenizer(folder: Path, header: dict[str, Any], ends: tuple[int, ...]) -> Tokenizer | None:
    if not (folder / "tokenizer.json").exists():
        return None
    return Tokenizer(
        backend=read_backend(folder / "tokenizer.json"),
        chat_template=header.get("chat_template"),
        bos_token_id=header.get("bos_token_id"),
        eos_token_ids=ends,
    )


def _key(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
