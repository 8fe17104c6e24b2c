"""Frames: bytes in, frames out; no input or output of its own.

    prefix   64 bytes, little-endian: magic "HJXF", CRC-32 of all from here to the padding's end u32, version u8,
             type u8, zero u16, header bytes u32, body bytes u64, number in its direction u64, four numbers of the
             message u64
    header   msgpack, at most 64 KiB
    padding  zeros, so that the body begins at a multiple of 64
    tag      32 bytes where the connection is authenticated: HMAC-SHA256 of the frame without it
    body     raw tensors, a multiple of 64 bytes

So frames that follow each other in one block of memory have their bodies aligned, and stay where they were received.
A frame of up to 260 KiB comes whole in one read if the last one was as large; of others all but the first 16 KiB is
received into memory of its own. A body may be larger than memory allows to believe a mere claim: no more than four
times what has arrived is allocated.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from transport.buffers import ALIGNMENT, EMPTY, BufferPool, Bytes
from transport.errors import FrameError, IntegrityError

WIRE_VERSION = 2
MAX_HEADER_BYTES = 1 << 16
PREFIX_BYTES = 64
TAG_BYTES = 32
NUMBERS = 4  # in the prefix, for the message

_MAGIC = b"HJXF"
_START = struct.Struct("<4sI")  # magic and CRC
_REST = struct.Struct("<BBHIQQ4Q")  # of the prefix
_PREFIX = struct.Struct("<4sIBBHIQQ4Q")
_SMALLEST_READ_BYTES = 1 << 14
_LARGEST_READ_BYTES = (1 << 18) + (1 << 12)  # a round body and its head; no larger frame need lie in a block
_BLOCK_BYTES = 2 * _LARGEST_READ_BYTES
_FIRST_BODY_BYTES = 1 << 18
_ZEROS = bytes(ALIGNMENT)
_GROWTH = 2  # with the smaller ones, which the pool keeps: four times what has arrived

Buffer: TypeAlias = Any  # bytes, memoryview or a contiguous array, for which Python 3.11 has no type in common


@dataclass(frozen=True, kw_only=True)
class FrameLimits:
    """What a peer may send. max_body_bytes: tensors of one frame."""

    max_body_bytes: int = 1 << 30


class Frame(NamedTuple):
    """A frame as it came.

    type: [0, 255].
    numbers: four of 64 bits without a sign.
    header: in msgpack.
    body: the raw bytes of the tensors, aligned to 64.
    """

    type: int
    numbers: Sequence[int]
    header: bytes
    body: Bytes


class FrameEncoder:
    """Numbers, checks and, with a key, signs the frames of one direction."""

    def __init__(self, key: bytes | None = None, limits: FrameLimits | None = None) -> None:
        self._limits = limits or FrameLimits()
        self._mac = _Mac(key) if key is not None else None
        self._tag_bytes = 0 if key is None else TAG_BYTES
        self._number = 0

    def encode(
        self, type_: int, numbers: Sequence[int], header: bytes, body: Sequence[Buffer] = (), body_bytes: int = 0
    ) -> tuple[list[Buffer], int]:
        """The buffers to send, in order, those of the body (`body_bytes` in all) uncopied, and how many bytes they are.

        Raises:
          FrameError: the header or the body is too long, or a number does not fit.
        """
        _check_lengths(len(header), body_bytes, self._limits)
        try:
            rest = _REST.pack(WIRE_VERSION, type_, 0, len(header), body_bytes, self._number, *numbers)
        except struct.error:
            raise FrameError(f"numbers {numbers} in a message; allowed: {NUMBERS} from 0 to 2**64 - 1") from None
        checked = rest + header + _ZEROS[: -(len(header) + self._tag_bytes) % ALIGNMENT]
        head = _START.pack(_MAGIC, zlib.crc32(checked)) + checked
        self._number += 1
        if self._mac is not None:
            head += self._mac.tag([head, *body])
        return [head, *body], len(head) + body_bytes


class FrameDecoder:
    """Bytes of one direction in, frames out.

    Ask for `receive_buffer()`, write into it, and tell `received()` how much. After an error the stream is worthless:
    close the connection.
    """

    def __init__(self, key: bytes | None = None, limits: FrameLimits | None = None) -> None:
        self._limits = limits or FrameLimits()
        self._mac = _Mac(key) if key is not None else None
        self._tag_bytes = 0 if key is None else TAG_BYTES
        self._pool = BufferPool()
        self._number = 0
        self._read_bytes = _SMALLEST_READ_BYTES
        # What has come of frames that have not begun: [start, end) of the block.
        self._block = EMPTY
        self._view: memoryview = EMPTY.data
        self._start = self._end = 0
        # The frame that has begun: all that is before its body, and of the body's bytes, how many have come.
        self._frame: Frame | None = None
        self._head: memoryview = EMPTY.data
        self._body_bytes = self._filled = 0

    def receive_buffer(self) -> memoryview:
        """Where the next bytes go; never empty, and valid until `received` is told."""
        if self._frame is not None:
            return self._frame.body.data[self._filled :]
        if self._end + self._read_bytes > len(self._view):
            self._begin_block()
        return self._view[self._end : self._end + self._read_bytes]

    def received(self, count: int) -> list[Frame]:
        """Frames that are complete now that `count` bytes were written into `receive_buffer()`.

        Raises:
          FrameError: the bytes are no frames.
          IntegrityError: a frame was altered, repeated, left out or moved.
        """
        if self._frame is None:
            self._end += count
        else:
            self._filled += count
        frames: list[Frame] = []
        while (frame := self._frame or self._begin_frame()) is not None and self._is_complete(frame):
            frames.append(self._finish(frame))
        return frames

    @property
    def between_frames(self) -> bool:
        """No frame has begun: here a stream may end."""
        return self._frame is None and self._start == self._end

    def _begin_block(self) -> None:
        """Go on in another block, with what is left in this one: the beginning of a head, or of a body."""
        block, left = self._pool.take(_BLOCK_BYTES), self._end - self._start
        block[:left] = self._block[self._start : self._end]
        self._block, self._view, self._start, self._end = block, block.data, 0, left

    def _begin_frame(self) -> Frame | None:
        """The next frame, once all that comes before its body is there; the body is where its bytes arrive."""
        start, view = self._start, self._view
        if self._end - start < PREFIX_BYTES:
            return None
        magic, crc, version, type_, zero, header_bytes, body_bytes, number, *numbers = _PREFIX.unpack_from(view, start)
        self._check(magic, version, zero, header_bytes, body_bytes, number)
        header_end = start + PREFIX_BYTES + header_bytes
        body_start = start + _head_bytes(header_bytes, self._tag_bytes)
        if body_start > self._end:
            return None
        self._head = view[start:body_start]
        if crc != (expected := zlib.crc32(view[start + _START.size : body_start - self._tag_bytes])):
            raise IntegrityError(f"a frame's checksum is {crc:#010x}; its prefix and header have {expected:#010x}")
        self._start = body_start
        header = bytes(view[start + PREFIX_BYTES : header_end])
        self._frame = Frame(type_, numbers, header, self._begin_body(body_bytes))
        return self._frame

    def _check(self, magic: bytes, version: int, zero: int, header_bytes: int, body_bytes: int, number: int) -> None:
        if magic != _MAGIC:
            raise FrameError(f"a frame begins with {magic!r}; allowed: {_MAGIC!r}")
        if version != WIRE_VERSION or zero:
            raise FrameError(f"a frame has version {version} and reserved bits {zero}; allowed: {WIRE_VERSION} and 0")
        _check_lengths(header_bytes, body_bytes, self._limits)
        if number != self._number:
            raise IntegrityError(f"frame number {number} came; expected: {self._number}")

    def _begin_body(self, size: int) -> Bytes:
        """Where the body stays, with what has come of it: in the block, or in memory of its own if it is too large."""
        if self._start + size > len(self._view) and size <= _LARGEST_READ_BYTES:
            self._begin_block()
        start, end = self._start, self._start + size
        self._body_bytes = size
        if end <= len(self._view):
            self._filled = min(size, self._end - start)
            self._start, self._end = end, max(self._end, end)
            return self._block[start:end]
        self._filled = self._end - start
        body = self._allocate(size, self._filled)
        body[: self._filled] = self._block[start : self._end]
        self._start = self._end
        return body

    def _is_complete(self, frame: Frame) -> bool:
        """Whether its body has come. Where there was room for a part only and that is full, makes room for more."""
        filled, size = self._filled, self._body_bytes
        if filled == len(frame.body) < size:
            body = self._allocate(size, filled)
            body[:filled] = frame.body
            self._frame = frame._replace(body=body)
        return filled == size

    def _allocate(self, size: int, have: int) -> Bytes:
        """Room for `size` bytes, or for as many as may be believed where `have` have come."""
        whole = self._pool.reuse(size)
        return self._pool.allocate(min(size, max(_FIRST_BODY_BYTES, _GROWTH * have))) if whole is None else whole

    def _finish(self, frame: Frame) -> Frame:
        if self._mac is not None:
            head, tag = self._head[:-TAG_BYTES], self._head[-TAG_BYTES:]
            if not hmac.compare_digest(self._mac.tag([head, frame.body]), tag):
                raise IntegrityError(f"frame {self._number} has a wrong authentication tag")
        self._number += 1
        self._frame = None
        # If the next one is as large, it comes whole, or nearly all of it is received where it stays.
        size = len(self._head) + self._body_bytes
        self._read_bytes = size if _SMALLEST_READ_BYTES < size <= _LARGEST_READ_BYTES else _SMALLEST_READ_BYTES
        return frame


class _Mac:
    """HMAC-SHA256 (RFC 2104) by two hashes of the keyed blocks: Python's own costs twice as much for small frames."""

    def __init__(self, key: bytes) -> None:
        assert len(key) <= 64, "longer keys would be hashed first"
        block = key.ljust(64, b"\0")
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in block))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in block))

    def tag(self, parts: Sequence[Buffer]) -> bytes:
        inner, outer = self._inner.copy(), self._outer.copy()
        for part in parts:
            inner.update(part)
        outer.update(inner.digest())
        return outer.digest()


def _check_lengths(header_bytes: int, body_bytes: int, limits: FrameLimits) -> None:
    if header_bytes > MAX_HEADER_BYTES:
        raise FrameError(f"a header of {header_bytes} bytes; allowed: at most {MAX_HEADER_BYTES}")
    if body_bytes > limits.max_body_bytes or body_bytes % ALIGNMENT:
        allowed = f"multiples of {ALIGNMENT}, at most {limits.max_body_bytes}"
        raise FrameError(f"tensors of {body_bytes} bytes in a frame; allowed: {allowed}")


def _head_bytes(header_bytes: int, tag_bytes: int) -> int:
    """Of a frame, before its body."""
    return PREFIX_BYTES + header_bytes + tag_bytes + -(header_bytes + tag_bytes) % ALIGNMENT
