"""Headers of messages: one flat msgpack array of scalars, read by a schema.

What nests in a message is written as its length and then its items, so the unpacker may build no container at all:
nesting ends where the schema's does, and memory with the number of values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice
from typing import Any, NamedTuple, NoReturn, TypeAlias, cast

import ml_dtypes
import msgpack  # pyright: ignore[reportMissingTypeStubs]
import numpy as np

from transport.buffers import ALIGNMENT, Bytes, Tensor
from transport.errors import FrameError
from transport.frames import MAX_HEADER_BYTES, Buffer

Scalar: TypeAlias = int | float | str | bool | None
Form: TypeAlias = tuple[np.dtype[Any], tuple[int, ...]]  # what a header says of a tensor: element type and shape

# Element types that may travel, by their number on the wire.
DTYPES: tuple[np.dtype[Any], ...] = tuple(
    np.dtype(kind)
    for kind in (np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.uint8, np.int32, np.int64, np.bool_)
)
MAX_AXES = 8
MAX_VALUES = 8192  # in a header: what they become in memory stays below 1 MB
MAX_TEXT_BYTES = 4096

_MAX_EMPTY_SPAN = 1 << 31
_NO_TENSOR = 0
_CODES = {dtype: code for code, dtype in enumerate(DTYPES, _NO_TENSOR + 1)}
_msgpack = cast("Any", msgpack)  # it has no types


class Place(NamedTuple):
    """A tensor in a body, which begins there at byte `start`."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int

    def view(self, body: Bytes) -> Tensor:
        """The tensor."""
        return np.ndarray(self.shape, self.dtype, body, self.start)


class HeaderWriter:
    """Collects a message's header and, uncopied, its tensors.

    body_bytes: of the tensors, each padded to ALIGNMENT.
    """

    def __init__(self) -> None:
        self.values: list[Scalar] = []
        self.tensors: list[Tensor] = []
        self.body_bytes = 0

    def header(self) -> bytes:
        """The header in msgpack.

        Raises:
          FrameError: more values than a header may have.
        """
        if len(self.values) > MAX_VALUES:
            raise FrameError(f"a header of {len(self.values)} values; allowed: at most {MAX_VALUES}")
        return _msgpack.packb(self.values)

    def tensor(self, tensor: Tensor | None) -> None:
        """Adds a tensor, and to the header what it says of it.

        Raises:
          FrameError: another element type or too many axes.
        """
        if tensor is not None:
            self.tensors.append(tensor)
        self.form(None if tensor is None else (tensor.dtype, tensor.shape))

    def form(self, form: Form | None) -> None:
        """As `tensor`, to the header alone: the element type's number, how many axes it has, and these."""
        if form is None:
            self.values.append(_NO_TENSOR)
            return
        dtype, shape = form
        code = _CODES.get(dtype)
        if code is None or len(shape) > MAX_AXES:
            allowed = ", ".join(str(dtype) for dtype in DTYPES)
            raise FrameError(f"a tensor {dtype}{shape}; allowed: {allowed} with at most {MAX_AXES} axes")
        self.values += (code, len(shape), *shape)
        size = math.prod(shape) * dtype.itemsize
        self.body_bytes += size + -size % ALIGNMENT


def body_parts(tensors: Iterable[Tensor | None]) -> list[Buffer]:
    """The buffers of a body: tensors, uncopied where they are contiguous, and what pads them."""
    parts: list[Buffer] = []
    for tensor in tensors:
        if tensor is not None and (size := tensor.nbytes):
            parts.append(tensor if tensor.flags.c_contiguous else np.ascontiguousarray(tensor))
            if padding := -size % ALIGNMENT:
                parts.append(_PADDING[:padding])
    return parts


class HeaderReader:
    """Reads what a schema asks for from a header, and where its tensors are in the body.

    Every method raises FrameError where the header has something else.
    """

    def __init__(self, header: bytes, body_bytes: int) -> None:
        self._values = _read_values(header)
        self._values.append(_END)
        self._read = 0
        self._body_bytes, self._body_read = body_bytes, 0

    def value(self, allowed: tuple[type, ...]) -> Any:
        """A scalar of exactly one of these types."""
        value = self._values[self._read]
        if type(value) not in allowed:
            self._refuse(value, " or ".join(kind.__name__ for kind in allowed))
        self._read += 1
        return value

    def natural(self) -> int:
        """An integer, zero or more; msgpack itself ends at 64 bits."""
        value = self._values[self._read]
        if type(value) is not int or value < 0:
            self._refuse(value, "int of 0 or more")
        self._read += 1
        return value

    def _refuse(self, value: object, allowed: str) -> NoReturn:
        if value is _END:
            raise FrameError(f"a header ends after {self._read} values, before the message does")
        seen = value if isinstance(value, int) else f"a {type(value).__name__}"
        raise FrameError(f"a header has {seen} where only {allowed} may be")

    def length(self, high: int) -> int:
        """How many items follow, at most `high`."""
        length = self.natural()
        if length > high:
            raise FrameError(f"a header has {length} items where at most {high} may be")
        return length

    def tensor(self, *, optional: bool = False) -> Place | None:
        """The body's next bytes; None where `optional` and there is none."""
        code = self.natural()
        if optional and code == _NO_TENSOR:
            return None
        if not 1 <= code <= len(DTYPES):
            raise FrameError(f"a tensor has element type number {code}; allowed: 1 to {len(DTYPES)}")
        dtype = DTYPES[code - 1]
        read = self._read + 1
        self._read = read + self.length(MAX_AXES)
        shape = tuple(self._values[read : self._read])
        for axis in shape:
            if type(axis) is not int or axis < 0:
                self._refuse(axis, "int of 0 or more")
        size = math.prod(shape) * dtype.itemsize
        padded = size + -size % ALIGNMENT
        start, left = self._body_read, self._body_bytes - self._body_read
        # NumPy must be able to count the other axes of an empty tensor.
        countable = size or math.prod(axis or 1 for axis in shape) <= _MAX_EMPTY_SPAN
        if padded > left or not countable:
            raise FrameError(f"a tensor {dtype}{shape} needs {padded} bytes, {left} are left")
        self._body_read = start + padded
        return Place(dtype, shape, start)

    def end(self) -> None:
        """Nothing may be left over."""
        count = len(self._values) - 1
        if self._read != count or self._body_read != self._body_bytes:
            raise FrameError(
                f"a message uses {self._read} of {count} values of its header "
                f"and {self._body_read} of {self._body_bytes} bytes of its body; allowed: all"
            )


def _read_values(header: bytes) -> list[Any]:
    unpacker = _msgpack.Unpacker(
        max_buffer_size=MAX_HEADER_BYTES,
        max_str_len=MAX_TEXT_BYTES,
        max_bin_len=0,
        max_array_len=0,
        max_map_len=0,
        max_ext_len=0,
    )
    unpacker.feed(header)
    try:
        count = unpacker.read_array_header()
        if count > MAX_VALUES:
            raise FrameError(f"a header has {count} values; allowed: at most {MAX_VALUES}")
        values: list[Any] = list(islice(unpacker, count))
    except (ValueError, _msgpack.UnpackException) as error:
        raise FrameError(f"a header cannot be read: {error or type(error).__name__}") from None
    if len(values) != count or unpacker.tell() != len(header):
        raise FrameError(f"a header of {count} values has {len(values)} in {unpacker.tell()} of {len(header)} bytes")
    return values


_END = object()  # after the values, so that no index is past them
_PADDING = memoryview(bytes(ALIGNMENT))
