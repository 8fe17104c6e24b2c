"""Frames: bytes in, frames out; no input or output of its own.

    prefix   32 bytes, little-endian: magic "HJXF", version u8, type u8, zero u16, header bytes u32, body bytes u64,
             number in its direction u64, CRC-32 of the 28 bytes before and of the header u32
    header   msgpack, at most 64 KiB
    body     raw tensors
    tag      32 bytes where the connection is authenticated: HMAC-SHA256 of everything above

A body may be larger than memory allows to believe a mere claim: no more than four times what has arrived is allocated.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

from transport.buffers import BufferPool, Bytes
from transport.errors import FrameError, IntegrityError

WIRE_VERSION = 1
MAX_HEADER_BYTES = 1 << 16
PREFIX_BYTES = 32
TAG_BYTES = 32

_MAGIC = b"HJXF"
_PREFIX = struct.Struct("<4sBBHIQQ")  # and a CRC
_CRC = struct.Struct("<I")
_STAGING_BYTES = 4096  # small frames come whole in one read; of large ones no more than this is copied
_FIRST_BODY_BYTES = 1 << 19
_GROWTH = 2  # with the smaller ones, which the pool keeps: four times what has arrived

Buffer: TypeAlias = bytes | memoryview


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

    def encode(self, type_: int, header: bytes, body: Sequence[memoryview] = ()) -> list[Buffer]:
        """The buffers to send, in order; tensors are among them uncopied.

        Raises:
          FrameError: the header or the body is too long.
        """
        body_bytes = sum(map(len, body))
        _check_lengths(len(header), body_bytes, self._limits)
        prefix = _PREFIX.pack(_MAGIC, WIRE_VERSION, type_, 0, len(header), body_bytes, self._number)
        head = b"".join((prefix, _CRC.pack(zlib.crc32(header, zlib.crc32(prefix))), header))
        self._number += 1
        parts: list[Buffer] = [head, *body]
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
        self._pool = BufferPool()
        self._number = 0
        self._staging = memoryview(bytearray(_STAGING_BYTES))
        self._prefix = memoryview(bytearray(PREFIX_BYTES))
        self._tag = memoryview(bytearray(TAG_BYTES if self._mac is not None else 0))
        self._begin()

    def receive_buffer(self) -> memoryview:
        """Where the next bytes go; never empty, and valid until `received` is told."""
        missing = self._section[self._filled :]
        self._direct = len(missing) >= _STAGING_BYTES
        return missing if self._direct else self._staging

    def received(self, count: int) -> list[Frame]:
        """Frames that are complete now that `count` bytes were written into `receive_buffer()`.

        Raises:
          FrameError: the bytes are no frames.
          IntegrityError: a frame was altered, repeated, left out or moved.
        """
        frames: list[Frame] = []
        if self._direct:
            self._filled += count
            self._advance(frames)
            return frames
        data = self._staging[:count]
        while data:
            taken = min(len(data), len(self._section) - self._filled)
            self._section[self._filled : self._filled + taken] = data[:taken]
            self._filled += taken
            data = data[taken:]
            self._advance(frames)
        return frames

    @property
    def between_frames(self) -> bool:
        """No frame has begun: here a stream may end."""
        return self._section is self._prefix and not self._filled

    def _begin(self) -> None:
        self._header = memoryview(b"")
        self._body = _EMPTY
        self._await(self._prefix)

    def _await(self, section: memoryview, filled: int = 0) -> None:
        self._section, self._filled = section, filled

    def _advance(self, frames: list[Frame]) -> None:
        """Go on to the next section as long as the present one is full; the tag's end is the frame's."""
        while self._filled == len(self._section):
            if self._section is self._prefix:
                self._read_prefix()
                self._header = memoryview(bytearray(self._header_bytes))
                self._await(self._header)
            elif self._section is self._header:
                self._check_crc()
                self._grow_body()
            elif self._section is not self._tag:
                self._grow_body()
            else:
                self._check_tag()
                frames.append(Frame(self._type, bytes(self._header), self._body))
                self._begin()

    def _read_prefix(self) -> None:
        magic, version, self._type, zero, self._header_bytes, self._body_bytes, number = _PREFIX.unpack_from(
            self._prefix
        )
        if magic != _MAGIC:
            raise FrameError(f"a frame begins with {magic!r}; allowed: {_MAGIC!r}")
        if version != WIRE_VERSION or zero:
            raise FrameError(f"a frame has version {version} and reserved bits {zero}; allowed: {WIRE_VERSION} and 0")
        _check_lengths(self._header_bytes, self._body_bytes, self._limits)
        if number != self._number:
            raise IntegrityError(f"frame number {number} came; expected: {self._number}")
        self._number += 1

    def _check_crc(self) -> None:
        (seen,) = _CRC.unpack_from(self._prefix, _PREFIX.size)
        expected = zlib.crc32(self._header, zlib.crc32(self._prefix[: _PREFIX.size]))
        if seen != expected:
            raise IntegrityError(f"a frame's checksum is {seen:#010x}; its prefix and header have {expected:#010x}")

    def _grow_body(self) -> None:
        """Room for more of the body than has come so far; where all of it has, on to the tag."""
        have = len(self._body)
        if have == self._body_bytes:
            return self._await(self._tag)
        whole = self._pool.reuse(self._body_bytes)
        size = min(self._body_bytes, max(_FIRST_BODY_BYTES, _GROWTH * have))
        larger = self._pool.allocate(size) if whole is None else whole
        larger[:have] = self._body
        self._body = larger
        self._await(larger.data, have)

    def _check_tag(self) -> None:
        if self._mac is not None:
            expected = self._mac.tag([self._prefix, self._header, self._body.data])
            if not hmac.compare_digest(expected, self._tag):
                raise IntegrityError(f"frame {self._number - 1} has a wrong authentication tag")


_EMPTY: Bytes = np.empty(0, np.uint8)


class _Mac:
    def __init__(self, key: bytes) -> None:
        self._keyed = hmac.new(key, digestmod=hashlib.sha256)

    def tag(self, parts: Sequence[Buffer]) -> bytes:
        mac = self._keyed.copy()
        for part in parts:
            mac.update(part)
        return mac.digest()


def _check_lengths(header_bytes: int, body_bytes: int, limits: FrameLimits) -> None:
    if header_bytes > MAX_HEADER_BYTES:
        raise FrameError(f"a header of {header_bytes} bytes; allowed: at most {MAX_HEADER_BYTES}")
    if body_bytes > limits.max_body_bytes:
        raise FrameError(f"tensors of {body_bytes} bytes in a frame; allowed: at most {limits.max_body_bytes}")
