"""A module from a GGUF file."""

from __future__ import annotations

import numpy as np

from models.errors import ModelFormatError, UnsupportedModelError
from models.families import LanguageModel, ModelConfig
from models.gguf_config import ROPE_FACTORS
from models.gguf_file import GgufFile
from models.gguf_layout import gguf_tensor
from models.weights import StoredTensor, read_decoder, tensor_shapes


def load_gguf_decoder(file: GgufFile, config: ModelConfig, *, dtype: str) -> LanguageModel:
    """Dequantises every tensor into a module; a missing, surplus or misshapen tensor is an error with its name."""
    used = {gguf_tensor(config, name, shape).name for name, shape in tensor_shapes(config).items()} | {ROPE_FACTORS}
    surplus = sorted(set(file.tensors) - used)
    if surplus:
        raise UnsupportedModelError(f"{file.path}: tensor {surplus[0]!r} has no place in a {config.model_type} decoder")

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        stored = gguf_tensor(config, name, shape)
        _check(file, stored)
        return stored.restore(file.tensor(stored.name, index=stored.index))

    return read_decoder(config, read, dtype=dtype)


def _check(file: GgufFile, stored: StoredTensor) -> None:
    info = file.tensors.get(stored.name)
    if info is None:
        raise ModelFormatError(f"{file.path}: tensor {stored.name!r} of shape {stored.shape} is missing")
    if info.shape != stored.shape:
        raise ModelFormatError(
            f"{file.path}: tensor {stored.name!r} has shape {info.shape}, the config needs {stored.shape}"
        )
