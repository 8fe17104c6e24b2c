"""What one measurement of `bench_generate` is asked for and what it gives; needs NumPy alone."""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement: `sequences` prompts of `context` tokens, weights and KV cache in `dtype`.

    new_tokens: decode steps to time, every sequence decoding in each.
    num_microbatches, max_num_batched_tokens, page_size, kv_cache_bytes: EngineConfig's, for hetero_jax alone;
      kv_cache_bytes=0 takes what the sequences need.
    """

    model: str
    sequences: int
    context: int
    new_tokens: int
    dtype: str
    num_microbatches: int = 1
    max_num_batched_tokens: int = 512
    page_size: int = 128
    kv_cache_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a contender did.

    prefill_per_s: prompt tokens per second, with the first token of every sequence, and no decoding in between.
    decode_per_s: generated tokens per second while all sequences decode.
    decode_context: mean cached tokens per sequence where the timing of the decode began.
    peak_bytes: largest resident memory of the process, loading included.
    compile_s: compilation, before what is timed.
    split: seconds of one decode step by part, from a run of its own that waits after every call.
    """

    prefill_per_s: float
    decode_per_s: float
    decode_context: float
    peak_bytes: int
    compile_s: float = 0.0
    split: dict[str, float] | None = None


def prompts(point: Point) -> np.ndarray:
    """[sequences, context] int64 token ids, the same for every contender."""
    return np.random.default_rng(0).integers(10, 250, (point.sequences, point.context))  # in every vocabulary


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
