"""Feeds mutated frames to the decoder: what comes out must be a message, a FrameError, or a wait for more bytes.

    python -m experiments.fuzz_frames --frames=10000000

Exit code 0 if nothing else came out, memory grew by less than 32 MB, and no frame that was looked at allocated more
than four times its size and 1 MB; 1 if not.
"""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
import zlib
from collections import Counter
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
from absl import app, flags

from experiments.bench_point import peak_bytes
from transport.buffers import ALIGNMENT
from transport.codec import decode_message, encode_message
from transport.errors import FrameError
from transport.frames import PREFIX_BYTES, FrameDecoder, FrameEncoder
from transport.messages import (
    Attend,
    Drain,
    Error,
    FetchPages,
    Hello,
    Layout,
    Message,
    Pages,
    Ping,
    Pong,
    Release,
    Result,
    Stats,
    StatsRequest,
    StorePages,
)

_FRAMES = flags.DEFINE_integer("frames", 1_000_000, "How many mutated frames.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the mutations.")

MAX_GROWTH_BYTES = 32 << 20
_WARM_UP = 2000  # frames before memory is looked at: imports, caches
_TRACED_EVERY = 1009  # frames; tracing makes one twenty times slower
_TYPE_AT, _LENGTHS_AT = 9, 12


@dataclass(kw_only=True)
class Report:
    """What came out of a run.

    outcomes: how often "message", "waiting", and each error's name.
    failures: inputs in hexadecimal that gave anything else, with what they gave.
    growth_bytes: of the peak of resident memory.
    worst_allocation: largest allocation of a traced frame as a share of what is allowed.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    growth_bytes: int = 0
    worst_allocation: float = 0.0
    slowest_s: float = 0.0
    seconds: float = 0.0


def fuzz(frames: int, seed: int) -> Report:
    """Decode this many mutations; the same seed gives the same ones."""
    chance, report = random.Random(seed), Report()
    corpus = [_frame(message) for message in sample_messages()]
    start_s, start_bytes = time.perf_counter(), 0
    for index in range(frames):
        if index == min(_WARM_UP, frames - 1):
            start_bytes = peak_bytes()
        data = mutate(chance.choice(corpus), chance)
        if index % _TRACED_EVERY == 0:
            report.worst_allocation = max(report.worst_allocation, _allocation(data))
        begin_s = time.perf_counter()
        outcome = _decode(data)
        report.slowest_s = max(report.slowest_s, time.perf_counter() - begin_s)
        report.outcomes[outcome] += 1
        if outcome.startswith("!"):
            report.failures.append(f"{outcome}: {data.hex()}")
    report.growth_bytes = peak_bytes() - start_bytes
    report.seconds = time.perf_counter() - start_s
    return report


def sample_messages() -> list[Message]:
    """One of every kind, some with tensors of every sort."""
    rows = {"positions": np.arange(6, dtype=np.int32), "last": np.array([True, False])}
    q = np.linspace(-1, 1, 6 * 4 * 8).astype(ml_dtypes.bfloat16).reshape(6, 4, 8)
    sites = ({"kind": "softmax", "scale": 0.125, "heads": 4, "window": None, "causal": True},) * 3
    return [
        Hello(
            fingerprint="a" * 32, generation=1, page_budget=100, sites=sites, artifacts=(np.arange(9, dtype=np.uint8),)
        ),
        Layout(slot=3, arrays=rows),
        Attend(request_id=1, site=2, layout=3, q=q, k=q[:, :2], v=q[:, 2:]),
        Attend(request_id=2, site=0, layout=0, q=q.astype(np.int8)),
        Result(request_id=1, out=q, log_sum_exp=np.ones((6, 4), np.float32)),
        Release(pages=np.array([3, 1 << 40], np.int64)),
        FetchPages(request_id=4, pages=np.arange(5)),
        Pages(request_id=4, arrays=(np.arange(35, dtype=np.uint8).reshape(5, 7), np.zeros((5, 64), np.uint8))),
        StorePages(pages=np.arange(2), arrays=(np.ones((2, 9), np.uint8),)),
        StatsRequest(request_id=3),
        Stats(request_id=3, values={"free_pages": 7, "busy_s": 1.5}),
        Ping(token=1 << 60),
        Pong(token=0),
        Drain(reason="SIGTERM"),
        Error(request_id=0, kind="RefusedError", text="why"),
    ]


def mutate(frame: bytes, chance: random.Random) -> bytes:
    """Between one and four changes; most frames then get lengths and a checksum that fit, to reach what lies behind."""
    data = bytearray(frame)
    for _ in range(chance.randint(1, 4)):
        chance.choice(_MUTATIONS)(data, chance)
    if chance.random() < 0.7 and len(data) >= PREFIX_BYTES:
        _repair(data, chance)
    return bytes(data)


def main(argv: list[str]) -> int:
    """Run and report."""
    del argv
    report = fuzz(_FRAMES.value, _SEED.value)
    print(f"{_FRAMES.value} frames, seed {_SEED.value}: {_FRAMES.value / report.seconds:.0f}/s")
    print(", ".join(f"{outcome} {count}" for outcome, count in report.outcomes.most_common()))
    print(f"peak memory grew by {report.growth_bytes / 1e6:.1f} MB; slowest frame {report.slowest_s * 1e3:.1f} ms")
    print(f"largest allocation: {report.worst_allocation:.2f} of four times the frame and 1 MB")
    for failure in report.failures[:10]:
        print(failure)
    return int(bool(report.failures) or report.growth_bytes >= MAX_GROWTH_BYTES or report.worst_allocation > 1)


def _frame(message: Message) -> bytes:
    return b"".join(FrameEncoder().encode(*encode_message(message))[0])


def _decode(data: bytes) -> str:
    decoder, left = FrameDecoder(), memoryview(data)
    outcome = "waiting"
    try:
        while left:
            room = decoder.receive_buffer()
            count = min(len(room), len(left))
            room[:count] = left[:count]
            left = left[count:]
            for frame in decoder.received(count):
                decode_message(frame)
                outcome = "message"
    except FrameError as error:
        return type(error).__name__
    except Exception as error:
        return f"!{type(error).__name__} {error}"
    return outcome


def _allocation(data: bytes) -> float:
    """Largest memory that decoding `data` held, as a share of what is allowed."""
    tracemalloc.start()
    _decode(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak / (4 * len(data) + (1 << 20))


def _flip(data: bytearray, chance: random.Random) -> None:
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _set(data: bytearray, chance: random.Random) -> None:
    if data:
        data[chance.randrange(len(data))] = chance.choice(_TELLING)


def _cut(data: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(data) + 1)
    del data[start : start + chance.choice((1, 4, 32, len(data)))]


def _insert(data: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(data) + 1)
    data[start:start] = chance.randbytes(chance.choice((1, 4, 64)))


def _repeat(data: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(data) + 1)
    data[start:start] = data[start : start + chance.choice((1, 8, 64))] * chance.choice((1, 2, 100))


def _new_header(data: bytearray, chance: random.Random) -> None:
    length = chance.choice((1, 10, 100, 3000, 65535))
    data[PREFIX_BYTES:] = (
        bytes([chance.choice(_TELLING)]) * length if chance.random() < 0.5 else chance.randbytes(length)
    )


def _lengths(data: bytearray, chance: random.Random) -> None:
    if len(data) >= PREFIX_BYTES:
        lengths = chance.choice((0, 1, 65536, (1 << 32) - 1)), chance.choice((0, 64, 1 << 30, 1 << 63))
        struct.pack_into("<IQ", data, _LENGTHS_AT, *lengths)


# Containers, strings and extensions with and without a length, integers of every width, nil, the byte that is none.
_TELLING = (*range(0x80, 0xA1), *range(0xC0, 0xE0), 0, 1, 0x7F, 0xFF)
_MUTATIONS = (_flip, _set, _cut, _insert, _repeat, _new_header, _lengths)


def _repair(data: bytearray, chance: random.Random) -> None:
    header_bytes, body_bytes = struct.unpack_from("<IQ", data, _LENGTHS_AT)
    if fitting := chance.random() < 0.7:
        header_bytes = min(header_bytes, len(data) - PREFIX_BYTES, 1 << 16)
    head_bytes = PREFIX_BYTES + header_bytes + -header_bytes % ALIGNMENT
    if fitting:
        data += bytes(max(0, head_bytes - len(data)))
        body_bytes = (len(data) - head_bytes) // ALIGNMENT * ALIGNMENT
        del data[head_bytes + body_bytes :]
    struct.pack_into("<BBHIQQ", data, 8, 2, data[_TYPE_AT], 0, header_bytes, body_bytes, 0)
    struct.pack_into("<4sI", data, 0, b"HJXF", zlib.crc32(data[8:head_bytes]))


if __name__ == "__main__":
    app.run(main)
