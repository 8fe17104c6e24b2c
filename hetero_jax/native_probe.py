"""What this machine can do at most, measured with the kernel's own instructions: for benchmarks."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from hetero_jax.native_attention import load_library

_READ_BYTES = 256 << 20  # in all: several times the caches
_STEPS = 2_000_000
_ATTEMPTS = 5


def read_bandwidth(threads: int, attempts: int = _ATTEMPTS) -> float:
    """Bytes per second of a plain streaming read by `threads` threads, each of its own part; the best of `attempts`."""
    probe = load_library().hetero_probe_read
    probe.argtypes, probe.restype = (ctypes.c_void_p, ctypes.c_int64), ctypes.c_float
    buffer = _buffer()
    part = buffer.nbytes // threads
    seconds = _best(threads, lambda thread: probe(buffer.ctypes.data + thread * part, part), attempts)
    return part * threads / seconds


def scattered_read_bandwidth(block_bytes: int, threads: int, attempts: int = _ATTEMPTS) -> float:
    """The same in blocks of `block_bytes` in random order: what no kernel over pages given out at random can pass."""
    probe = load_library().hetero_probe_read_blocks
    probe.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
    probe.restype = ctypes.c_float
    buffer, orders = _buffer(), _orders(block_bytes, threads)
    count = orders.shape[1]
    seconds = _best(
        threads, lambda thread: probe(buffer.ctypes.data, block_bytes, orders[thread].ctypes.data, count), attempts
    )
    return threads * count * block_bytes / seconds


@functools.cache
def _orders(block_bytes: int, threads: int) -> np.ndarray:
    blocks = _READ_BYTES // block_bytes // threads * threads
    return np.random.default_rng(0).permutation(blocks).astype(np.int32).reshape(threads, -1)


@functools.cache
def _buffer() -> np.ndarray:
    buffer = np.ones(_READ_BYTES, np.uint8)
    load_library().hetero_ask_for_huge_pages(buffer.ctypes.data, buffer.nbytes)  # as the pools do
    return buffer


def multiply_add_peak(dtype: str, threads: int) -> float:
    """Multiply-adds per second of `threads` threads with the instructions that serve a pool of `dtype`.

    "bfloat16": its dot products; "int8": dot products of bytes, two for each multiply-add with 16 bits; else float32's.
    """
    probe = load_library().hetero_probe_multiply_add
    probe.argtypes, probe.restype = (ctypes.c_int32, ctypes.c_int64), ctypes.c_int64
    kind = {"bfloat16": 1, "int8": 2}.get(dtype, 0)
    per_step = probe(kind, 1)
    return threads * _STEPS * per_step / _best(threads, lambda _: probe(kind, _STEPS))


def _best(threads: int, run: Callable[[int], object], attempts: int = _ATTEMPTS) -> float:
    """Seconds that `threads` threads take together to run; ctypes lets go of the interpreter lock."""
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(attempts):
            start = time.perf_counter()
            list(pool.map(run, range(threads)))
            seconds.append(time.perf_counter() - start)
    return min(seconds)
