"""The header of a GGUF file: metadata and where each tensor lies. Every length is checked against the file first.

Types, block sizes and dequantisation are the `gguf` package's. Its reader is not used: on a truncated array it loops
as often as the damaged length says, and it makes one NumPy view per vocabulary entry (seconds for a large one).
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from models.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError

VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor of the file. `shape` is in NumPy's order: the contiguous axis is the last."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset_bytes: int
    size_bytes: int
    row_bytes: int


class GgufFile:
    """Metadata by key and tensors by name; tensors are decoded when asked for, from a memory map.

    Raises ModelFormatError naming the key or tensor at which the file breaks off or makes no sense.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._data = _map(self.path)
        cursor = _Cursor(self._data, self.path)
        tensor_count, key_count = _read_preamble(cursor)
        metadata: dict[str, Any] = {}
        for index in range(key_count):
            key = cursor.string(f"key {index} of {key_count}")
            if key in metadata:
                raise ModelFormatError(f"{self.path}: key {key!r} appears twice")
            metadata[key] = cursor.value(f"key {key!r}")
        self.metadata: Mapping[str, Any] = MappingProxyType(metadata)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(self._read_tensors(cursor, tensor_count))

    def _read_tensors(self, cursor: _Cursor, count: int) -> dict[str, TensorInfo]:
        rows = [_read_tensor_row(cursor, f"tensor {index} of {count}") for index in range(count)]
        alignment = self.metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise ModelFormatError(f"{self.path}: general.alignment must be in 1..{1 << 20}, not {alignment!r}")
        start = -(-cursor.offset // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in rows:
            if name in tensors:
                raise ModelFormatError(f"{self.path}: tensor {name!r} appears twice")
            tensors[name] = self._locate(name, shape, kind, start + offset)
        return tensors

    def _locate(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorInfo:
        try:
            quantization = GGMLQuantizationType(kind)
        except ValueError:
            raise UnsupportedModelError(f"{self.path}: tensor {name!r} has the unknown type {kind}") from None
        block, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
        if shape[-1] % block:
            raise ModelFormatError(
                f"{self.path}: tensor {name!r} of shape {shape}: rows do not divide into blocks of {block} "
                f"({quantization.name})"
            )
        row_bytes = shape[-1] // block * block_bytes
        size = row_bytes
        for extent in shape[:-1]:
            size *= extent
        if offset + size > len(self._data):
            raise ModelFormatError(
                f"{self.path}: tensor {name!r} of shape {shape} ({quantization.name}) needs bytes "
                f"{offset}..{offset + size}, the file ends at {len(self._data)} (truncated?)"
            )
        return TensorInfo(
            name=name, shape=shape, kind=quantization, offset_bytes=offset, size_bytes=size, row_bytes=row_bytes
        )

    def tensor(self, name: str, *, index: int | None = None) -> np.ndarray:
        """The named tensor, or the part of it at `index` of its leading axis, dequantised to f32."""
        info = self.tensors[name]
        raw = np.frombuffer(self._data, np.uint8, info.size_bytes, info.offset_bytes)
        raw = raw.reshape(*info.shape[:-1], info.row_bytes)
        raw, shape = (raw, info.shape) if index is None else (raw[index], info.shape[1:])
        try:
            values = gguf.quants.dequantize(raw, info.kind)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"{self.path}: tensor {name!r} has type {info.kind.name}, which the gguf package does not dequantise"
            ) from error
        if np.may_share_memory(values, raw):  # f32: JAX may keep the buffer, and the file may change under it
            values = values.copy()
        return values.reshape(shape)


class _Cursor:
    """Reads little-endian values in sequence; `what` names the thing being read for the error."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.offset = data, path, 0

    def take(self, count: int, what: str) -> bytes:
        end = self.offset + count
        if end > len(self.data):
            raise ModelFormatError(
                f"{self.path}: {what} needs bytes {self.offset}..{end}, the file ends at {len(self.data)} (truncated?)"
            )
        piece = self.data[self.offset : end]
        self.offset = end
        return piece

    def scalar(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def string(self, what: str) -> str:
        raw = self.take(self.scalar("Q", what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise ModelFormatError(f"{self.path}: {what} is not UTF-8") from None

    def value(self, what: str) -> Any:
        return self._value(self.scalar("I", what), what)

    def _value(self, kind: int, what: str) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string(what)
        if kind == GGUFValueType.ARRAY:
            return self._array(what)
        return self.scalar(self._code(kind, what), what)

    def _array(self, what: str) -> list[Any]:
        kind, count = self.scalar("I", what), self.scalar("Q", what)
        if kind == GGUFValueType.ARRAY:
            raise UnsupportedModelError(f"{self.path}: {what} is an array of arrays")
        if kind == GGUFValueType.STRING:
            if count * 8 > len(self.data) - self.offset:  # each string is at least its 8-byte length
                raise ModelFormatError(f"{self.path}: {what} claims {count} strings, more than the file holds")
            return [self.string(what) for _ in range(count)]
        dtype = np.dtype("<" + self._code(kind, what))
        return np.frombuffer(self.take(count * dtype.itemsize, what), dtype).tolist()

    def _code(self, kind: int, what: str) -> str:
        code = _SCALARS.get(kind)  # type: ignore[arg-type]
        if code is None:
            raise ModelFormatError(f"{self.path}: {what} has the unknown value type {kind}; allowed: 0..12")
        return code


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < 24:
                raise ModelFormatError(f"{path}: {os.fstat(file.fileno()).st_size} bytes is too short for a GGUF file")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ModelNotFoundError(f"{path}: no such file") from error


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    """Checks magic and version; gives the counts of tensors and of keys."""
    magic = cursor.take(4, "the magic")
    if magic != b"GGUF":
        raise ModelFormatError(f"{cursor.path}: starts with {magic!r}, not with b'GGUF'")
    version = cursor.scalar("I", "the version")
    if version not in VERSIONS:
        raise UnsupportedModelError(
            f"{cursor.path}: GGUF version {version:#x} is not supported; allowed: {VERSIONS}, little-endian"
        )
    return cursor.scalar("Q", "the tensor count"), cursor.scalar("Q", "the key count")


def _read_tensor_row(cursor: _Cursor, what: str) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string(what)
    what = f"tensor {name!r}"
    dimensions = cursor.scalar("I", what)
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise ModelFormatError(f"{cursor.path}: {what} has {dimensions} dimensions; allowed: 1..{_MAX_DIMENSIONS}")
    extents = [cursor.scalar("Q", what) for _ in range(dimensions)]
    if min(extents) < 1:
        raise ModelFormatError(f"{cursor.path}: {what} has an empty axis: {extents}")
    return name, tuple(reversed(extents)), cursor.scalar("I", what), cursor.scalar("Q", what)
