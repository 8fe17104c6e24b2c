"""Frames: bytes in, frames out; no input or output of its own.

    prefix   32 bytes, little-endian: magic "HJXF", CRC-32 of all from here to the header's end u32, version u8,
             type u8, zero u16, header bytes u32, body bytes u64, number in its direction u64
    header   msgpack, at most 64 KiB
    body     raw tensors
    tag      32 bytes where the connection is authenticated: HMAC-SHA256 of everything above

A body may be larger than memory allows to believe a mere claim: no more than four times what has arrived is allocated.
Small frames come whole in one read; of large ones all but the first 16 KiB is received where it stays.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from transport.buffers import EMPTY, BufferPool, Bytes
from transport.errors import FrameError, IntegrityError

WIRE_VERSION = 1
MAX_HEADER_BYTES = 1 << 16
PREFIX_BYTES = 32
TAG_BYTES = 32

_MAGIC = b"HJXF"
_START = struct.Struct("<4sI")  # magic and CRC
_REST = struct.Struct("<BBHIQQ")  # of the prefix
_PREFIX = struct.Struct("<4sIBBHIQQ")
_READ_BYTES = 1 << 14
_FIRST_BODY_BYTES = 1 << 19
_GROWTH = 2  # with the smaller ones, which the pool keeps: four times what has arrived

Buffer: TypeAlias = Any  # bytes, memoryview or a contiguous array, for which Python 3.11 has no type in common


@dataclass(frozen=True, kw_only=True)
class FrameLimits:
    """What a peer may send. max_body_bytes: tensors of one frame."""

    max_body_bytes: int = 1 << 30


class Frame(NamedTuple):
    """A frame as it came: `type` [0, 255], the msgpack header, and the raw bytes of the tensors, aligned to 64."""

    type: int
    header: bytes
    body: Bytes


class FrameEncoder:
    """Numbers, checks and, with a key, signs the frames of one direction."""

    def __init__(self, key: bytes | None = None, limits: FrameLimits | None = None) -> None:
        self._limits = limits or FrameLimits()
        self._mac = _Mac(key) if key is not None else None
        self._number = 0

    def encode(self, type_: int, header: bytes, body: Sequence[Buffer] = (), body_bytes: int = 0) -> list[Buffer]:
        """The buffers to send, in order; those of the body, `body_bytes` long in all, are among them uncopied.

        Raises:
          FrameError: the header or the body is too long.
        """
        _check_lengths(len(header), body_bytes, self._limits)
        checked = _REST.pack(WIRE_VERSION, type_, 0, len(header), body_bytes, self._number) + header
        self._number += 1
        parts: list[Buffer] = [_START.pack(_MAGIC, zlib.crc32(checked)) + checked, *body]
        if self._mac is not None:
            parts.append(self._mac.tag(parts))
        return parts


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
        # What has come and is not a frame yet: [start, end) of the staging, then `filled` bytes of the payload.
        self._staging = memoryview(bytearray(2 * _READ_BYTES))
        self._start = self._end = 0
        self._head: _Head | None = None  # of the frame whose payload (body and tag) comes in
        self._payload, self._filled = EMPTY, 0

    def receive_buffer(self) -> memoryview:
        """Where the next bytes go; never empty, and valid until `received` is told."""
        if self._head is not None:
            return self._payload.data[self._filled :]
        return self._staging[self._end : self._end + _READ_BYTES]

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
        self._make_room()
        return frames

    @property
    def between_frames(self) -> bool:
        """No frame has begun: here a stream may end."""
        return self._head is None and self._start == self._end

    def _read_head(self) -> _Head | None:
        """Prefix and header at the staging's start, once they are there."""
        have = self._end - self._start
        if have < PREFIX_BYTES:
            return None
        magic, crc, version, type_, zero, header_bytes, body_bytes, number = _PREFIX.unpack_from(
            self._staging, self._start
        )
        if magic != _MAGIC:
            raise FrameError(f"a frame begins with {magic!r}; allowed: {_MAGIC!r}")
        if version != WIRE_VERSION or zero:
            raise FrameError(f"a frame has version {version} and reserved bits {zero}; allowed: {WIRE_VERSION} and 0")
        _check_lengths(header_bytes, body_bytes, self._limits)
        if number != self._number:
            raise IntegrityError(f"frame number {number} came; expected: {self._number}")
        if have < PREFIX_BYTES + header_bytes:
            return None
        start, self._start = self._start, self._start + PREFIX_BYTES + header_bytes
        head = _Head(type_, bytes(self._staging[start : self._start]), body_bytes)
        if crc != (expected := zlib.crc32(memoryview(head.data)[_START.size :])):
            raise IntegrityError(f"a frame's checksum is {crc:#010x}; its prefix and header have {expected:#010x}")
        return head

    def _make_room(self) -> None:
        """Room for another read behind what is left in the staging: the beginning of a prefix or of a header."""
        left = self._end - self._start
        if self._end + _READ_BYTES > len(self._staging):
            moved = self._staging
            if left + _READ_BYTES > len(moved):
                moved = memoryview(bytearray(2 * len(moved)))
            moved[:left] = self._staging[self._start : self._end]
            self._staging, self._start, self._end = moved, 0, left
        elif not left:
            self._start = self._end = 0

    def _begin_payload(self, head: _Head) -> None:
        size = head.body_bytes + self._tag_bytes
        have = min(size, self._end - self._start)
        if size:
            self._payload = self._allocate(size, have)
            self._payload.data[:have] = self._staging[self._start : self._start + have]
        self._start, self._filled = self._start + have, have

    def _payload_complete(self, head: _Head) -> bool:
        """All of it has come; where there is room for a part of it only and that is full, makes room for more."""
        size = head.body_bytes + self._tag_bytes
        if self._filled == len(self._payload) < size:
            larger = self._allocate(size, self._filled)
            larger[: self._filled] = self._payload
            self._payload = larger
        return self._filled == size

    def _allocate(self, size: int, have: int) -> Bytes:
        """Room for `size` bytes, or for as many as may be believed where `have` have come."""
        whole = self._pool.reuse(size)
        return self._pool.allocate(min(size, max(_FIRST_BODY_BYTES, _GROWTH * have))) if whole is None else whole

    def _finish(self, head: _Head) -> Frame:
        body = self._payload
        if self._mac is not None:
            body, tag = body[: head.body_bytes], body[head.body_bytes :]
            if not hmac.compare_digest(self._mac.tag([head.data, body]), tag.data):
                raise IntegrityError(f"frame {self._number} has a wrong authentication tag")
        self._number += 1
        self._head, self._payload = None, EMPTY
        return Frame(head.type, head.data[PREFIX_BYTES:], body)


class _Head(NamedTuple):
    type: int
    data: bytes  # prefix and header
    body_bytes: int


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
    if body_bytes > limits.max_body_bytes:
        raise FrameError(f"tensors of {body_bytes} bytes in a frame; allowed: at most {limits.max_body_bytes}")
