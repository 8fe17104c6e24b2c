"""A module from a Hugging Face folder: config.json and *.safetensors, one file or sharded by an index."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from models.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError
from models.families import LanguageModel, ModelConfig
from models.files import read_json
from models.hf_layout import hf_file_name, hf_tensor, is_ignored
from models.weights import read_decoder, tensor_shapes

DTYPES = ("F32", "F16", "BF16", "F64")
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class _Owner(NamedTuple):
    path: Path
    file: Any  # the open safetensors file
    name: str  # the tensor's name in it


def load_hf_decoder(folder: Path, config: ModelConfig, *, dtype: str) -> LanguageModel:
    """Reads every tensor into a module; a missing, surplus or misshapen tensor is an error with its name."""
    with contextlib.ExitStack() as stack:
        owners = {
            hf_file_name(config, name): _Owner(path, file, name)
            for path, file in _open_all(folder, stack)
            for name in _names(file)
        }
        _refuse_surplus(owners, config)

        def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
            stored = hf_tensor(config, name, shape)
            if stored.name not in owners:
                raise ModelFormatError(f"{folder}: tensor {stored.name!r} of shape {stored.shape} is missing")
            return stored.restore(_read(owners[stored.name], stored.shape))

        return read_decoder(config, read, dtype=dtype)


def _names(file: Any) -> list[str]:
    return file.keys()  # not a mapping: it cannot be iterated


def _open_all(folder: Path, stack: contextlib.ExitStack) -> Iterator[tuple[Path, Any]]:
    for path in weight_files(folder):
        try:
            # opening checks the header's length and that the tensors tile the file exactly
            yield path, stack.enter_context(safe_open(path, framework="numpy"))
        except FileNotFoundError as error:
            raise ModelNotFoundError(f"{path}: no such file, though {_INDEX} names it") from error
        except (SafetensorError, OSError) as error:
            raise ModelFormatError(f"{path}: not a sound safetensors file ({error})") from error


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a folder, by its index where it has one."""
    if not (folder / _INDEX).exists():
        if not (folder / _SINGLE).exists():
            raise ModelNotFoundError(f"{folder}: neither {_SINGLE} nor {_INDEX} is there")
        return (folder / _SINGLE,)
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFormatError(f"{folder / _INDEX}: the key 'weight_map' must be an object, not {weight_map!r}")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if Path(name).name != name:  # an index must not lead out of its folder
            raise ModelFormatError(f"{folder / _INDEX}: {name!r} is not a plain file name")
    return tuple(folder / name for name in names)


def _refuse_surplus(owners: Mapping[str, _Owner], config: ModelConfig) -> None:
    used = {hf_tensor(config, name, shape).name for name, shape in tensor_shapes(config).items()}
    for name in sorted(owners.keys() - used):
        if not is_ignored(name):
            raise UnsupportedModelError(
                f"{owners[name].path}: tensor {owners[name].name!r} has no place in a {config.model_type} decoder"
            )


def _read(owner: _Owner, shape: tuple[int, ...]) -> np.ndarray:
    path, file, name = owner
    view = file.get_slice(name)
    if tuple(view.get_shape()) != shape:
        raise ModelFormatError(f"{path}: tensor {name!r} has shape {tuple(view.get_shape())}, the config needs {shape}")
    if view.get_dtype() not in DTYPES:
        raise UnsupportedModelError(f"{path}: tensor {name!r} has dtype {view.get_dtype()}; allowed: {DTYPES}")
    return file.get_tensor(name)
