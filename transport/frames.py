"""Frames: bytes in, frames out; no input or output of its own.

    prefix   64 bytes, little-endian: magic "HJXF", CRC-32 of all from here to the padding's end u32, version u8,
             type u8, zero u16, header bytes u32, body bytes u64, number in its direction u64, four numbers of the
             message u64
    header   msgpack, at most 64 KiB
    padding  zeros, so that the body begins at a multiple of 64
    tag      32 bytes where the connection is authenticated: HMAC-SHA256 of the frame without it
    body     raw tensors, a multiple of 64 bytes

So frames that follow each other in one block of memory have their bodies aligned, and stay where they were received.
A frame of up to 128 KiB comes whole in one read if the last one was as large; of others all but the first 16 KiB is
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
_BLOCK_BYTES = 1 << 18
_SMALLEST_READ_BYTES = 1 << 14
_LARGEST_READ_BYTES = 1 << 17  # and largest frame that may lie in a block
_FIRST_BODY_BYTES = 1 << 19
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
    ) -> list[Buffer]:
        """The buffers to send, in order; those of the body, `body_bytes` long in all, are among them uncopied.

        Raises:
          FrameError: the header or the body is too long, or a number does not fit.
        """
        _check_lengths(len(header), body_bytes, self._limits)
        try:
            rest = _REST.pack(WIRE_VERSION, type_, 0, len(header), body_bytes, self._number, *numbers)
        except struct.error:
            raise FrameError(f"numbers {numbers} in a message; allowed: {NUMBERS} from 0 to 2**64 - 1") from None
        checked = rest + header + bytes(_padding(len(header), self._tag_bytes))
        head = _START.pack(_MAGIC, zlib.crc32(checked)) + checked
        self._number += 1
        if self._mac is not None:
            head += self._mac.tag([head, *body])
        return [head, *body]


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
        # What has come and is not a frame yet: [start, end) of the block; of a frame's body, `filled` bytes of payload.
        self._block = EMPTY
        self._view: memoryview = EMPTY.data
        self._start = self._end = 0
        self._head: _Head | None = None  # of the frame whose body comes in
        self._payload, self._filled = EMPTY, 0

    def receive_buffer(self) -> memoryview:
        """Where the next bytes go; never empty, and valid until `received` is told."""
        if self._head is not None:
            return self._payload.data[self._filled :]
        if self._end + self._read_bytes > len(self._block):
            self._begin_block()
        return self._view[self._end : self._end + self._read_bytes]

    def received(self, count: int) -> list[Frame]:
        """Frames that are complete now that `count` bytes were written into `receive_buffer()`.

        Raises:
          FrameError: the bytes are no frames.
          IntegrityError: a frame was altered, repeated, left out or moved.
        """
        if self._head is not None:
            self._filled += count
            return [self._finish(self._head)] if self._payload_complete(self._head) else []
        self._end += count
        frames: list[Frame] = []
        while (head := self._read_head()) is not None:
            self._begin_payload(head)
            if not self._payload_complete(head):
                self._head = head
                break
            frames.append(self._finish(head))
        return frames

    @property
    def between_frames(self) -> bool:
        """No frame has begun: here a stream may end."""
        return self._head is None and self._start == self._end

    def _begin_block(self) -> None:
        """Go on in another block, with what is left in this one: the beginning of a head, or of a body."""
        block, left = self._pool.take(_BLOCK_BYTES), self._end - self._start
        block[:left] = self._block[self._start : self._end]
        self._block, self._view, self._start, self._end = block, block.data, 0, left

    def _read_head(self) -> _Head | None:
        """What comes before the body of the frame at the block's start, once it is there."""
        start, have = self._start, self._end - self._start
        if have < PREFIX_BYTES:
            return None
        magic, crc, version, type_, zero, header_bytes, body_bytes, number, *numbers = _PREFIX.unpack_from(
            self._view, start
        )
        if magic != _MAGIC:
            raise FrameError(f"a frame begins with {magic!r}; allowed: {_MAGIC!r}")
        if version != WIRE_VERSION or zero:
            raise FrameError(f"a frame has version {version} and reserved bits {zero}; allowed: {WIRE_VERSION} and 0")
        _check_lengths(header_bytes, body_bytes, self._limits)
        if number != self._number:
            raise IntegrityError(f"frame number {number} came; expected: {self._number}")
        header_end = start + PREFIX_BYTES + header_bytes
        tag_start = header_end + _padding(header_bytes, self._tag_bytes)
        if tag_start + self._tag_bytes > self._end:
            return None
        if crc != (expected := zlib.crc32(self._view[start + _START.size : tag_start])):
            raise IntegrityError(f"a frame's checksum is {crc:#010x}; its prefix and header have {expected:#010x}")
        self._start = tag_start + self._tag_bytes
        header = bytes(self._view[start + PREFIX_BYTES : header_end])
        return _Head(type_, numbers, header, body_bytes, self._view[start : self._start])

    def _begin_payload(self, head: _Head) -> None:
        """Room for the body, and in it what has come: in the block, or of its own where it is too large for one."""
        size = head.body_bytes
        if self._start + size > len(self._block) and size <= _LARGEST_READ_BYTES:
            self._begin_block()
        have = self._filled = min(size, self._end - self._start)
        if self._start + size <= len(self._block):
            self._payload = self._block[self._start : self._start + size]
            self._start += size
            self._end = max(self._start, self._end)
        else:
            self._payload = self._allocate(size, have)
            self._payload[:have] = self._block[self._start : self._end]
            self._start = self._end

    def _payload_complete(self, head: _Head) -> bool:
        """All of it has come; where there is room for a part of it only and that is full, makes room for more."""
        if self._filled == len(self._payload) < head.body_bytes:
            larger = self._allocate(head.body_bytes, self._filled)
            larger[: self._filled] = self._payload
            self._payload = larger
        return self._filled == head.body_bytes

    def _allocate(self, size: int, have: int) -> Bytes:
        """Room for `size` bytes, or for as many as may be believed where `have` have come."""
        whole = self._pool.reuse(size)
        return self._pool.allocate(min(size, max(_FIRST_BODY_BYTES, _GROWTH * have))) if whole is None else whole

    def _finish(self, head: _Head) -> Frame:
        body, before = self._payload, head.data
        if self._mac is not None:
            before, tag = before[:-TAG_BYTES], before[-TAG_BYTES:]
            if not hmac.compare_digest(self._mac.tag([before, body]), tag):
                raise IntegrityError(f"frame {self._number} has a wrong authentication tag")
        self._number += 1
        self._head, self._payload = None, EMPTY
        # If the next one is as large, it comes whole, or nearly all of it is received where it stays.
        size = len(head.data) + len(body)
        self._read_bytes = max(size, _SMALLEST_READ_BYTES) if size <= _LARGEST_READ_BYTES else _SMALLEST_READ_BYTES
        return Frame(head.type, head.numbers, head.header, body)


class _Head(NamedTuple):
    type: int
    numbers: Sequence[int]
    header: bytes
    body_bytes: int
    data: memoryview  # all of the frame before its body


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


def _padding(header_bytes: int, tag_bytes: int) -> int:
    return -(PREFIX_BYTES + header_bytes + tag_bytes) % ALIGNMENT
