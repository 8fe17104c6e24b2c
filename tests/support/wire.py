"""Bytes into decoders and connections, as a socket would bring them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def feed(receiver: Any, data: bytes, chunks: Iterable[int] = ()) -> list[Any]:
    """What a decoder, handshake or connection makes of `data` that comes in pieces of these sizes, then the rest."""
    results: list[Any] = []
    left = memoryview(data)
    sizes = iter(chunks)
    while left:
        piece, left = (left[: (size := next(sizes, len(left)))], left[size:])
        while piece:
            room = receiver.receive_buffer()
            count = min(len(room), len(piece))
            room[:count] = piece[:count]
            piece = piece[count:]
            results += receiver.received(count) or []
    return results


def joined(encoded: tuple[list[Any], int]) -> bytes:
    """The bytes of an encoded frame, as many as were announced."""
    parts, num_bytes = encoded
    data = b"".join(parts)
    assert len(data) == num_bytes
    return data
