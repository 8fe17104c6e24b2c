"""One microbatch on its way D0 -> A0 -> D1 -> A1 ... -> DL -> sampler."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from hetero_jax.attention_layout import GroupedLayout
from hetero_jax.dense_tier import DenseTier
from hetero_jax.devices import are_ready
from hetero_jax.rows import PackedRows
from hetero_jax.sampler import RowSampling, SamplerOutputs, build_inputs, sample
from hetero_jax.tracing import TIER1, Trace
from partition import Plan, Stage, Value


class Tier2(Protocol):
    """What serves the attention: `AttentionTier` in this process, `RemoteTier` elsewhere.

    What `place_layout` gives goes into `attend`, and so does what a stage of `DenseTier` sends, once `begin` has seen
    it; what that gives goes into `fetch`, for what the next stage reads. Rows of a pool that is lost on the way come
    back as something finite.

    waited_s: seconds that `fetch` has waited.
    """

    waited_s: float

    def place_layout(self, layout: GroupedLayout, pools: Sequence[int]) -> Any: ...

    def begin(self, arrays: tuple[jax.Array, ...]) -> None: ...

    def attend(self, site: int, layouts: Any, inputs: Sequence[jax.Array]) -> Any: ...

    def is_ready(self, pending: Any) -> bool: ...

    def record(self, trace: Trace, name: str, inputs: Sequence[jax.Array], pending: Any) -> None: ...

    def fetch(self, pending: Any) -> Sequence[jax.Array | np.ndarray]: ...

    def away_s(self) -> float:
        """Seconds of a call that are not tier 1's: on the wire and in tier 2; 0 where it is not known."""
        ...


class Wait(NamedTuple):
    """What a microbatch waits for.

    stage: that it was in. for_tier1: arrays that tier 1 computes; else what tier 2 does. is_ready: it need not wait.
    """

    stage: int
    for_tier1: bool
    is_ready: Callable[[], bool]


def choose(waits: Mapping[int, Wait], order: str) -> int:
    """The microbatch to step next, of those in flight by number, the least recently stepped first.

    One that need not wait: the deepest, which ends soonest and makes room (Glinthawk), or the oldest. None can starve:
    those that overtake it are finite in number, as they end too and new ones begin behind it. Where all wait, one that
    waits for tier 1: what is computed there comes soon, and tier 2 lacks work until it is sent. Else, and of several,
    the one that has waited longest: calls are served in their order.
    """
    # All are asked: that reads what has come, and the depth rule wants to know when it came.
    ready = [number for number, wait in waits.items() if wait.is_ready()]
    if ready:
        return max(ready, key=lambda number: (waits[number].stage if order == "deepest" else 0, -number))
    return min(waits, key=lambda number: not waits[number].for_tier1)


class Timings:
    """Seconds spent in dense stages, attention and sampling; stays 0 unless `enabled`, as measuring means waiting."""

    def __init__(self) -> None:
        self.enabled = False
        self.seconds = {"dense": 0.0, "attention": 0.0, "sample": 0.0}

    def add(self, part: str, begin_s: float, arrays: Any) -> None:
        """Add the time from `begin_s`, of the performance counter, until these arrays are there."""
        if self.enabled:
            jax.block_until_ready(arrays)
            self.seconds[part] += time.perf_counter() - begin_s


class Tiers:
    """What a walk passes through. trace: of what runs; None: nothing is recorded."""

    def __init__(self, plan: Plan, dense: DenseTier, attention: Tier2, timings: Timings) -> None:
        self.plan, self.dense, self.attention, self.timings = plan, dense, attention, timings
        self.trace: Trace | None = None

    def release(self, values: dict[Value, Any], stage: Stage) -> None:
        """Drop what is not carried behind `stage`: the carry is the only state that tier 1 keeps per row."""
        for value in [value for value in values if value not in stage.carried]:
            del values[value]


class Walk:
    """The steps of one microbatch; each ends where the next thing to do waits for a tier.

    Stepping several walks keeps both tiers busy: JAX dispatches asynchronously, and only copies between devices,
    answers of workers and the sampled tokens are waited for.

    wait: what the next step waits for.
    host_s: seconds of the steps so far, but for those in which tier 2 was waited for.
    sampled: tokens and log probabilities of `rows.samplers`, in order, once `step` has returned True.
    """

    def __init__(self, tiers: Tiers, rows: PackedRows, sampling: Sequence[RowSampling]) -> None:
        self.rows = rows
        self.sampled: SamplerOutputs | None = None
        self._tiers, self._sampling = tiers, sampling
        self._steps = self._walk()
        self.wait = Wait(0, True, lambda: True)
        self.host_s = 0.0

    def step(self) -> bool:
        """Go on to the next wait; True at the end."""
        attention = self._tiers.attention
        begin_s, waited_s = time.perf_counter(), attention.waited_s
        wait = next(self._steps, None)
        self.host_s += time.perf_counter() - begin_s - (attention.waited_s - waited_s)
        if wait is not None:
            self.wait = wait
        return wait is None

    def _walk(self) -> Iterator[Wait]:
        dense = self._tiers.dense
        tokens, positions = dense.place(self.rows.tokens, self.rows.positions)
        values: dict[Value, Any] = {}
        yield from run_stages(self._tiers, self.rows, tokens, positions, values)
        # A microbatch of prefill chunks alone has nothing to sample and skips the last stage.
        if self._sampling:
            yield from self._sample(tokens, positions, [values[value] for value in self._tiers.plan.stages[-1].reads])

    def _sample(self, tokens: jax.Array, positions: jax.Array, reads: Sequence[Any]) -> Iterator[Wait]:
        dense, timings = self._tiers.dense, self._tiers.timings
        slots = len(self.rows.sampled)
        inputs, variant = build_inputs(self._sampling, vocab_size=self._tiers.plan.vocab_size, num_slots=slots)
        begin_s = time.perf_counter()
        logits = dense.logits(tokens, positions, reads, self.rows.sampled)
        timings.add("dense", begin_s, logits)
        begin_s = time.perf_counter()
        sampled = sample(logits, inputs, variant)
        timings.add("sample", begin_s, sampled)
        if self._tiers.trace is not None:
            self._tiers.trace.computed(TIER1, "last stage and sampler", reads, sampled)
        yield Wait(len(self._tiers.plan.sites), True, lambda: are_ready(jax.tree.leaves(sampled)))
        self.sampled = jax.tree.map(np.asarray, sampled)


def run_stages(
    tiers: Tiers, rows: PackedRows, tokens: jax.Array, positions: jax.Array, values: dict[Value, Any]
) -> Iterator[Wait]:
    """D0 -> A0 -> ... -> A(L-1), leaving in `values` what the last stage reads; pauses where a tier is waited for."""
    plan, dense, attention, timings = tiers.plan, tiers.dense, tiers.attention, tiers.timings
    layouts = attention.place_layout(rows.layout, rows.pools)
    sends: dict[tuple[int, int], jax.Array] = {}
    for stage, site in zip(plan.stages, plan.sites, strict=False):
        reads, begin_s = [values[value] for value in stage.reads], time.perf_counter()
        writes, sent = dense.run(stage.index, tokens, positions, reads)
        timings.add("dense", begin_s, (writes, sent))
        if tiers.trace is not None:
            tiers.trace.computed(TIER1, f"stage {stage.index}", reads, (writes, sent))
        del reads
        values.update(zip(stage.writes, writes, strict=True))
        tiers.release(values, stage)
        attention.begin(sent)
        sends.update({(send.site, send.index): array for send, array in zip(stage.sends, sent, strict=True)})
        yield Wait(stage.index, True, functools.partial(are_ready, sent))
        inputs, begin_s = [sends.pop((stage.index, index)) for index in site.sent], time.perf_counter()
        outputs = attention.attend(stage.index, layouts, inputs)
        timings.add("attention", begin_s, outputs)
        if tiers.trace is not None:
            attention.record(tiers.trace, f"site {stage.index}", inputs, outputs)
        yield Wait(stage.index, False, functools.partial(attention.is_ready, outputs))
        values.update(zip(site.site.outputs, attention.fetch(outputs), strict=True))
