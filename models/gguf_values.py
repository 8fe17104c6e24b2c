"""Metadata of a GGUF file with its mistakes named."""

from __future__ import annotations

from typing import Any

from models.errors import ModelFormatError, UnsupportedModelError
from models.gguf_file import GgufFile


def need(file: GgufFile, key: str) -> Any:
    """The value of a key; ModelFormatError where it is missing."""
    if key not in file.metadata:
        raise ModelFormatError(f"{file.path}: the key {key!r} is missing")
    return file.metadata[key]


def integer(file: GgufFile, key: str) -> int:
    """A positive integer; ModelFormatError where it is missing or something else."""
    value = need(file, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelFormatError(f"{file.path}: {key} must be a positive integer, not {value!r}")
    return value


def get(file: GgufFile, key: str, default: Any) -> Any:
    """The value of a key, or the default where it is missing."""
    return file.metadata.get(key, default)


def vocab_size(file: GgufFile) -> int:
    """How many rows the embedding has."""
    info = file.tensors.get("token_embd.weight")
    if info is None or len(info.shape) != 2:
        raise ModelFormatError(f"{file.path}: tensor 'token_embd.weight' of shape (vocab, hidden) is missing")
    return info.shape[0]


def refuse_options(file: GgufFile, neutral: dict[str, tuple[object, ...]]) -> None:
    """UnsupportedModelError naming a key that is there with a value that means more than "not used"."""
    for key, allowed in {"split.count": (0, 1), **neutral}.items():
        if key in file.metadata and file.metadata[key] not in allowed:
            raise UnsupportedModelError(
                f"{file.path}: {key}={file.metadata[key]!r} is not supported; allowed: {allowed} or absent"
            )
