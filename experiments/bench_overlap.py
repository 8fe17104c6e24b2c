"""How much of tier 2 and of the wire hides behind tier 1, with the engine on one core and a worker on another.

    python -m experiments.bench_overlap

Balance: decode steps of models of several widths at contexts that make tier 2 slower and slower, with 1 and 2
microbatches: the time of a step beside that for which each tier computed (target: 1.10 of the larger). Tier 1's is the
processor time of XLA's threads in the engine's process: a trace's slices would count what Python takes of the core
meanwhile, whose time has a column of its own ("host"). Tier 2's is what the worker says, by way of a trace.
Latency: tokens per second behind a proxy that holds every byte back, with 2 microbatches and with as many as the depth
rule says, beside none held back (target: 0.95 at 20 ms). A microbatch has --rows rows, whatever the depth.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

import hetero_jax as hj
from experiments.delay_proxy import wire
from experiments.markdown import print_header, print_row
from experiments.pinned_worker import pinned_worker
from experiments.plain_decoder import HEAD_DIM, forward, generate, params
from experiments.polled import polled

_POINTS = flags.DEFINE_list(
    "points",
    [
        *("256x32x64", "256x32x256", "256x32x1024"),
        *("512x64x128", "512x64x384", "512x64x1024"),
        *("1024x64x128", "1024x64x512"),
    ],
    "WIDTHxSEQUENCESxCONTEXT of each model and its decode steps, for balance.",
)
_LATENCIES = flags.DEFINE_list("latencies_ms", ["0", "2", "5", "10", "20", "50", "100"], "One way.")
_DEPTHS = flags.DEFINE_list("microbatches", ["1", "2"], "In flight, for balance.")
_ROWS = flags.DEFINE_integer("rows", 16, "Sequences of a microbatch, for latency.", lower_bound=1)
_TOKENS = flags.DEFINE_integer(
    "tokens", 48, "Steps of decoding at width 1024, for balance; as many more as the model is narrower.", lower_bound=1
)
_SECONDS = flags.DEFINE_float(
    "seconds", 4.0, "Of each point, for latency; the second half of what ends counts.", lower_bound=0.5
)
_WIDTH = flags.DEFINE_integer("width", 1024, "Of the model, for latency.", lower_bound=64)
_CORES = flags.DEFINE_list("cores", ["0", "1"], "Of the engine, and of the worker.")

_LAYERS = 4
_TICK_S = 0.02
_BUDGET = 512  # rows of a microbatch
_FEWEST = 16  # that must have ended, however slow the machine is


def main(argv: list[str]) -> None:
    """Print both tables."""
    del argv
    engine_core, worker_core = map(int, _CORES.value)
    os.sched_setaffinity(0, {engine_core})  # before JAX counts cores
    with ExitStack() as stack:
        address, _ = stack.enter_context(pinned_worker(worker_core, kv_cache_bytes="2G"))
        columns = ["step ms", "tier 1 ms", "tier 2 ms", "host ms", "step / larger", "step / sum"]
        print_header(["width", "sequences", "context", "microbatches", *columns])
        for point in _POINTS.value:
            width, sequences, context = map(int, point.split("x"))
            for microbatches in map(int, _DEPTHS.value):
                cells = _balance(address, width, sequences, context, microbatches)
                print_row([width, sequences, context, microbatches, *cells])
        print()
        print_header(["one way ms", "2 microbatches, tokens/s", "of none", "re-planned, tokens/s", "of none", "depth"])
        _compare_latencies(address, _WIDTH.value)


def _balance(address: str, width: int, count: int, context: int, microbatches: int) -> list[str]:
    """Milliseconds of a decode step, of the tiers and of Python in it, and ratios."""
    steps = _TOKENS.value * 1024 // width
    # The first sequence decodes for so many steps before the last one does.
    ahead = 1 + math.ceil(count * context / (_BUDGET - count) / microbatches)
    tokens = ahead + steps
    engine = _engine(
        address,
        width,
        num_microbatches=microbatches,
        max_num_batched_tokens=_BUDGET,
        max_num_seqs=count,
        max_model_len=context + tokens + 1,
    )
    engine.trace = trace = hj.Trace()
    with _processor_times() as times:
        generate(engine, sequences=count, context=context, tokens=tokens)
    # While all decode, without the first of these steps, which compile.
    counted = [(at_s, value) for name, at_s, value in trace.counts if name == "tokens"]
    inner = [each for each in counted if 0.3 <= (each[1] / count - ahead / 2) / steps <= 0.9]
    (begin_s, first), (end_s, last) = inner[0], inner[-1]
    step_ms = 1e3 * (end_s - begin_s) * count / (last - first)
    parts = [times.share("xla", begin_s, end_s), trace.busy_s(f"worker {address}", begin_s, end_s) / (end_s - begin_s)]
    tier1_ms, tier2_ms = (step_ms * part for part in parts)
    host_ms = step_ms * times.share("python", begin_s, end_s)
    ratios = step_ms / max(tier1_ms, tier2_ms), step_ms / (tier1_ms + tier2_ms)
    return [f"{each:.2f}" for each in (step_ms, tier1_ms, tier2_ms, host_ms, *ratios)]


class _Times(NamedTuple):
    """Seconds of processor time until a moment of the monotonic clock."""

    at_s: float
    python: float  # of the main thread
    xla: float  # of threads that are not Python's


class _ProcessorTimes(list[_Times]):
    def share(self, kind: str, begin_s: float, end_s: float) -> float:
        """Of the time between two moments, in which such threads ran."""
        at_s, values = [each.at_s for each in self], [getattr(each, kind) for each in self]
        begin, end = np.interp([begin_s, end_s], at_s, values)
        return float(end - begin) / (end_s - begin_s)


@contextmanager
def _processor_times() -> Iterator[_ProcessorTimes]:
    """What the threads of this process take, looked at every now and then by one of them."""
    found = _ProcessorTimes()

    def look() -> None:
        python = [_thread_s(each.ident) for each in threading.enumerate() if each.ident]  # the main thread first
        found.append(_Times(time.monotonic(), python[0], time.process_time() - sum(python)))

    look()
    with polled(look, _TICK_S):
        yield found
    look()


def _thread_s(ident: int) -> float:
    return time.clock_gettime(time.pthread_getcpuclockid(ident))


def _compare_latencies(address: str, hidden: int) -> None:
    fixed_none = planned_none = math.nan
    for latency_ms in map(float, _LATENCIES.value):
        with wire(address, one_way_s=latency_ms / 1e3) as behind:
            fixed, _ = _tokens_per_s(behind, hidden, 2)
            planned, depth = _tokens_per_s(behind, hidden, 0)
        if latency_ms == 0:
            fixed_none, planned_none = fixed, planned
        cells = [f"{fixed:.0f}", f"{fixed / fixed_none:.2f}", f"{planned:.0f}", f"{planned / planned_none:.2f}"]
        print_row([f"{latency_ms:g}", *cells, depth])


def _tokens_per_s(address: str, hidden: int, num_microbatches: int) -> tuple[float, int]:
    """Over the second half of the time, and how many microbatches are in flight at its end."""
    rows = _ROWS.value
    engine = _engine(
        address, hidden, num_microbatches=num_microbatches, max_num_batched_tokens=rows, max_num_seqs=32 * rows
    )
    chance = np.random.default_rng(0)
    requests = [  # of many lengths, so that some end all the time: between them, the clock can be looked at
        hj.Request(
            id=str(n),
            prompt_token_ids=(1 + n % 100, 2),
            sampling_params=hj.SamplingParams(max_tokens=int(chance.integers(1, 100)), ignore_eos=True),
        )
        for n in range(64 * rows)
    ]
    seen: list[tuple[float, int]] = []
    for _ in engine.generate(requests):
        seen.append((time.perf_counter(), engine.stats.tokens_generated))
        if len(seen) >= _FEWEST and seen[-1][0] - seen[0][0] > _SECONDS.value:
            break
    (begin_s, first), (end_s, last) = seen[len(seen) // 2], seen[-1]
    return (last - first) / (end_s - begin_s), engine.stats.num_microbatches


def _engine(address: str, hidden: int, *, max_model_len: int = 128, **config: Any) -> hj.Engine:
    heads = 2 * hidden // HEAD_DIM  # so that keys and values are as wide as the model
    plan = hj.partition(forward, params(hidden, _LAYERS, heads=heads), max_rows=max_model_len)
    return hj.Engine(plan, hj.EngineConfig(workers=(address,), max_model_len=max_model_len, page_size=16, **config))


if __name__ == "__main__":
    app.run(main)
