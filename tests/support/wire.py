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


def joined(parts: Iterable[Any]) -> bytes:
    """The bytes of an encoded frame."""
    return b"".join(parts)
