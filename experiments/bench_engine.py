"""Prefill and decode rates of our own engine, from outside: by what `engine.stats` says over time.

The scheduler lets early sequences decode while later ones are still prefilled, so the difference of a long run and a
prefill is no decode rate: with few new tokens and long prompts the first sequences would end before the last begin.
Decode is timed between two moments at which every sequence has its prompt cached and none has ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import jax
import numpy as np

import hetero_jax as hj
from experiments.bench_point import Figures, Point, peak_bytes, prompts
from experiments.polled import polled

_POLL_S = 0.001
_SETTLE_STEPS = 2  # the first pure decode step may compile
_ATTEMPTS = 3  # a run that compiled within what is timed is made again


@dataclass(frozen=True, kw_only=True)
class _Moment:
    time_s: float
    stats: hj.EngineStats


class _CompileLog:
    """(end, seconds) of every XLA compilation of this process."""

    def __init__(self) -> None:
        self.events: list[tuple[float, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._record)

    def _record(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            self.events.append((time.perf_counter(), duration_secs))

    def total_s(self) -> float:
        return sum(seconds for _, seconds in self.events)

    def within(self, start_s: float, end_s: float) -> bool:
        return any(start_s < at_s <= end_s + _POLL_S for at_s, _ in self.events)


def run_hetero_jax(point: Point) -> Figures:
    """Throughput, then, in a profiled run that waits after every call, the parts of a decode step."""
    compiled = _CompileLog()
    engine = _engine(point)
    prefill_per_s = _prefill(engine, point, compiled)
    first, last = _decode(engine, point, compiled)
    peak, compile_s = peak_bytes(), compiled.total_s()
    engine.profile = True
    split = _split(*_decode(engine, point, compiled), point)
    tokens = last.stats.tokens_generated - first.stats.tokens_generated
    return Figures(
        prefill_per_s=prefill_per_s,
        decode_per_s=tokens / (last.time_s - first.time_s),
        decode_context=first.stats.rows_computed / point.sequences,
        peak_bytes=peak,
        compile_s=compile_s,
        split=split,
    )


def head_starts(point: Point) -> np.ndarray:
    """[sequences] int64: about how many tokens each sequence generates while those after it are prefilled.

    If sequence i's prompt is shorter by that, all have the same context when the last prompt is cached. With B rows
    per step and context c that takes T = sequences * c / B steps, and B t / (c - T + t) prompts are cached after t.
    """
    rows = point.max_num_batched_tokens * point.num_microbatches
    if point.sequences >= rows:
        raise ValueError(
            f"sequences={point.sequences}; allowed: fewer than num_microbatches * max_num_batched_tokens = {rows}, "
            "as decode rows would leave no room for the last prompts"
        )
    index = np.arange(1, point.sequences + 1)
    steps = point.sequences * point.context / rows
    cached_at = index * (point.context - steps) / (rows - index)
    return np.rint(steps - cached_at).astype(np.int64).clip(0, point.context - 1)


def _engine(point: Point) -> hj.Engine:
    model = hj.load(point.model, dtype=point.dtype)
    longest = point.context + point.new_tokens + _SETTLE_STEPS + 1
    per_token = model.config.num_hidden_layers * model.config.num_key_value_heads * model.config.head_dim * 2
    item_bytes = 4 if point.dtype == "float32" else 2
    tokens = (point.sequences + 1) * (longest + 2 * point.page_size)
    config = hj.EngineConfig(
        kv_cache_bytes=point.kv_cache_bytes or tokens * per_token * item_bytes,
        page_size=point.page_size,
        max_num_batched_tokens=point.max_num_batched_tokens,
        max_num_seqs=point.sequences,
        num_microbatches=point.num_microbatches,
        enable_prefix_caching=False,  # the same prompts again must cost the same again
        max_model_len=max(longest, 64),
    )
    return hj.Engine(model, config)


def _prefill(engine: hj.Engine, point: Point, compiled: _CompileLog) -> float:
    """Prompt tokens per second of a run that ends with every sequence's first token."""
    ids = list(prompts(point))
    params = hj.SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    few = min(point.sequences, 2 + 3 * point.max_num_batched_tokens // point.context)
    list(engine.generate(ids[:few], params))  # compiles: every call of a prefill has one of a few shapes

    def run() -> tuple[float, float]:
        start_s = time.perf_counter()
        list(engine.generate(ids, params))
        return start_s, time.perf_counter()

    start_s, end_s = _without_compiling(run, lambda span: compiled.within(*span))
    return point.sequences * point.context / (end_s - start_s)


def _decode(engine: hj.Engine, point: Point, compiled: _CompileLog) -> tuple[_Moment, _Moment]:
    """Two moments between which all sequences decode; counters are relative to the start of the run."""
    requests = _decode_requests(point)
    num_prompt_tokens = sum(len(request.prompt_token_ids or ()) for request in requests)

    def run() -> tuple[_Moment, _Moment]:
        before = engine.stats
        with _watched(engine) as moments:
            list(engine.generate(requests))
        return _all_decoding([_relative(each, before) for each in moments], num_prompt_tokens, point)

    return _without_compiling(run, lambda ends: compiled.within(ends[0].time_s, ends[1].time_s))


def _decode_requests(point: Point) -> list[hj.Request]:
    """Prompts and limits by which all sequences decode together, from the same context on."""
    timed = _SETTLE_STEPS + point.new_tokens + 1
    return [
        hj.Request(
            id=str(index),
            prompt_token_ids=tuple(ids[: point.context - ahead].tolist()),
            sampling_params=hj.SamplingParams(max_tokens=int(ahead) + timed, temperature=0, ignore_eos=True),
        )
        for index, (ids, ahead) in enumerate(zip(prompts(point), head_starts(point), strict=True))
    ]


def _without_compiling(run: Callable[[], tuple], compiled: Callable[[tuple], bool]) -> tuple:
    for _ in range(_ATTEMPTS):
        found = run()
        if not compiled(found):
            return found
    raise RuntimeError(f"{_ATTEMPTS} runs at the same shapes, and the last one still compiled")


@contextmanager
def _watched(engine: hj.Engine) -> Iterator[list[_Moment]]:
    """The engine's counters after every step, as another thread sees them."""
    moments: list[_Moment] = []

    def look() -> None:
        stats = engine.stats
        if not moments or stats.steps != moments[-1].stats.steps:
            moments.append(_Moment(time_s=time.perf_counter(), stats=stats))

    with polled(look, _POLL_S):
        yield moments


def _relative(moment: _Moment, before: hj.EngineStats) -> _Moment:
    counters = ("sequences_done", "tokens_generated", "rows_computed", "steps", "preemptions")
    since = {name: getattr(moment.stats, name) - getattr(before, name) for name in counters}
    return replace(moment, stats=replace(moment.stats, **since))


def _all_decoding(moments: list[_Moment], num_prompt_tokens: int, point: Point) -> tuple[_Moment, _Moment]:
    """The first and the last moment of pure decode, after some steps to settle.

    A decode row gives a token, a prompt of n rows gives one: rows less tokens grow until every prompt is cached.
    """
    cached = num_prompt_tokens - point.sequences
    pure = [
        each
        for each in moments
        if each.stats.sequences_done == 0 and each.stats.rows_computed - each.stats.tokens_generated >= cached
    ]
    settled = [m for m in pure if m.stats.steps >= pure[0].stats.steps + _SETTLE_STEPS * point.num_microbatches]
    if len(settled) < 2 or settled[-1].stats.preemptions:
        preemptions = moments[-1].stats.preemptions if moments else 0
        raise RuntimeError(
            f"{len(settled)} moments with all {point.sequences} sequences decoding and {preemptions} preemptions; "
            "needed: at least 2 and none (more new_tokens, a larger kv_cache_bytes)"
        )
    return settled[0], settled[-1]


def _split(first: _Moment, last: _Moment, point: Point) -> dict[str, float]:
    """Seconds per decode step (one token for every sequence) by part; host is what the calls leave of the clock."""
    steps = (last.stats.tokens_generated - first.stats.tokens_generated) / point.sequences
    parts = {
        name: (getattr(last.stats, name) - getattr(first.stats, name)) / steps
        for name in ("dense_s", "attention_s", "sample_s")
    }
    return {**parts, "host_s": (last.time_s - first.time_s) / steps - sum(parts.values())}
