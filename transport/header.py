"""Headers of messages: msgpack read by a schema, value by value, so that nothing is built that was not asked for.

The unpacker itself may build no container at all: arrays are opened only where the schema has one, with a length that
is checked first. Nesting therefore ends where the schema's does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import ml_dtypes
import msgpack  # pyright: ignore[reportMissingTypeStubs]
import numpy as np

from transport.buffers import ALIGNMENT, Bytes, Tensor
from transport.errors import FrameError
from transport.frames import MAX_HEADER_BYTES

Scalar: TypeAlias = int | float | str | bool | None

# Element types that may travel, by their number on the wire.
DTYPES: tuple[np.dtype[Any], ...] = tuple(
    np.dtype(kind)
    for kind in (np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.uint8, np.int32, np.int64, np.bool_)
)
MAX_AXES = 8
MAX_VALUES = 8192  # in a header, arrays counted too: what they become in memory stays below 1 MB
MAX_TEXT_BYTES = 4096

_MAX_EMPTY_SPAN = 1 << 31
_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
_msgpack = cast("Any", msgpack)  # it has no types


class HeaderWriter:
    """Collects a message's header and, uncopied, its tensors."""

    def __init__(self) -> None:
        self.values: list[object] = []
        self.body: list[memoryview] = []

    def header(self) -> bytes:
        """The header in msgpack."""
        return _msgpack.packb(self.values)

    def tensor(self, tensor: Tensor) -> list[int]:
        """What the header says of a tensor: its element type's number and its shape.

        Raises:
          FrameError: another element type or too many axes.
        """
        if tensor.dtype not in _CODES or tensor.ndim > MAX_AXES:
            allowed = ", ".join(str(dtype) for dtype in DTYPES)
            raise FrameError(f"a tensor {tensor.dtype}{tensor.shape}; allowed: {allowed} with at most {MAX_AXES} axes")
        raw = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
        self.body.append(raw.data)
        if padding := -len(raw) % ALIGNMENT:
            self.body.append(_PADDING[:padding])
        return [_CODES[tensor.dtype], *tensor.shape]


class HeaderReader:
    """Reads what a schema asks for from a header, and views of its tensors from the body.

    Every method raises FrameError where the header has something else.
    """

    def __init__(self, header: bytes, body: Bytes) -> None:
        unpacker = _msgpack.Unpacker(
            max_buffer_size=MAX_HEADER_BYTES,
            max_str_len=MAX_TEXT_BYTES,
            max_bin_len=0,
            max_array_len=0,
            max_map_len=0,
            max_ext_len=0,
        )
        unpacker.feed(header)
        self._unpack: Callable[[], object] = unpacker.unpack
        self._read_array_header: Callable[[], int] = unpacker.read_array_header
        self._tell: Callable[[], int] = unpacker.tell
        self._header_bytes = len(header)
        self._body, self._body_read = body, 0
        self._values_left = MAX_VALUES

    def value(self, allowed: tuple[type, ...]) -> Any:
        """A scalar of exactly one of these types."""
        self._count()
        try:
            value = self._unpack()
        except (ValueError, _msgpack.UnpackException) as error:
            raise FrameError(f"a header cannot be read: {error or type(error).__name__}") from None
        if type(value) not in allowed:
            names = ", ".join(kind.__name__ for kind in allowed)
            raise FrameError(f"a header has a {type(value).__name__} where only {names} may be")
        return value

    def natural(self) -> int:
        """An integer, zero or more; msgpack itself ends at 64 bits."""
        value: int = self.value((int,))
        if value < 0:
            raise FrameError(f"a header has {value}; allowed: 0 or more")
        return value

    def length(self, low: int, high: int) -> int:
        """The length of an array that begins here, in [low, high]."""
        self._count()
        try:
            length = self._read_array_header()
        except (ValueError, _msgpack.UnpackException) as error:
            raise FrameError(f"a header has no array where one must be: {error or type(error).__name__}") from None
        if not low <= length <= high:
            raise FrameError(f"a header has an array of {length} items; allowed: {low} to {high}")
        return length

    def tensor(self, *, optional: bool = False) -> Tensor | None:
        """A view of the body's next bytes; None where `optional` and the description is empty."""
        items = self.length(0 if optional else 1, 1 + MAX_AXES)
        if not items:
            return None
        code, *shape = [self.natural() for _ in range(items)]
        if code >= len(DTYPES):
            raise FrameError(f"a tensor has element type number {code}; allowed: 0 to {len(DTYPES) - 1}")
        dtype = DTYPES[code]
        size = math.prod(shape) * dtype.itemsize
        padded = size + -size % ALIGNMENT
        start = self._body_read
        # NumPy must be able to count the other axes of an empty tensor.
        countable = size or math.prod(axis or 1 for axis in shape) <= _MAX_EMPTY_SPAN
        if padded > len(self._body) - start or not countable:
            raise FrameError(f"a tensor {dtype}{tuple(shape)} needs {padded} bytes, {len(self._body) - start} are left")
        self._body_read = start + padded
        return self._body[start : start + size].view(dtype).reshape(shape)

    def _count(self) -> None:
        self._values_left -= 1
        if self._values_left < 0:
            raise FrameError(f"a header has more than the {MAX_VALUES} values that are allowed")

    def end(self) -> None:
        """Nothing may be left over."""
        if self._tell() != self._header_bytes or self._body_read != len(self._body):
            raise FrameError(
                f"a message uses {self._tell()} of {self._header_bytes} bytes of its header "
                f"and {self._body_read} of {len(self._body)} of its body; allowed: all"
            )


_PADDING = memoryview(bytes(ALIGNMENT))
