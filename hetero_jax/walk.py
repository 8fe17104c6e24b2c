"""One microbatch on its way D0 -> A0 -> D1 -> A1 ... -> DL -> sampler."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from hetero_jax.attention_layout import AttentionLayout
from hetero_jax.dense_tier import DenseTier
from hetero_jax.devices import are_ready, land
from hetero_jax.rows import PackedRows
from hetero_jax.sampler import RowSampling, SamplerOutputs, build_inputs, sample
from hetero_jax.tracing import TIER1, Trace
from partition import Plan, Stage, Value


class Tier2(Protocol):
    """What serves the attention: `AttentionTier` in this process, `RemoteTier` elsewhere.

    What `place_layout` gives goes into `attend`, and so does what `begin` makes of each array that is sent; what that
    gives goes into `fetch`, for the rows [R, heads, v_head_dim]. Rows of a pool that is lost on the way come back as
    something finite.

    waited_s: seconds that `fetch` has waited.
    """

    waited_s: float

    def place_layout(self, layout: AttentionLayout, pools: Sequence[int]) -> Any: ...

    def begin(self, arrays: tuple[jax.Array, ...]) -> Sequence[Any]: ...

    def attend(self, site: int, layouts: Any, inputs: Sequence[Any]) -> Any: ...

    def is_ready(self, pending: Any) -> bool: ...

    def record(self, trace: Trace, name: str, inputs: Sequence[Any], pending: Any) -> None: ...

    def fetch(self, pending: Any) -> tuple[jax.Array, ...]: ...

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
    """The microbatch to step next, of those in flight by number.

    One that need not wait: the deepest, which ends soonest and makes room (Glinthawk), or the oldest. None can starve:
    those that overtake it are finite in number, as they end too and new ones begin behind it. Where all wait, the one
    that waits for tier 1: what is computed there comes soon, and tier 2 lacks work until it is sent. Else the oldest.
    """
    ready = [number for number, wait in waits.items() if wait.is_ready()]
    if ready:
        return max(ready, key=lambda number: (waits[number].stage if order == "deepest" else 0, -number))
    return min(waits, key=lambda number: (not waits[number].for_tier1, number))


class Timings:
    """Seconds spent in dense stages, attention and sampling; stays 0 unless `enabled`, as measuring means waiting."""

    def __init__(self) -> None:
        self.enabled = False
        self.seconds = {"dense": 0.0, "attention": 0.0, "sample": 0.0}

    @contextmanager
    def measure(self, part: str) -> Iterator[Callable[..., None]]:
        """Time the block; it passes its arrays to the function it gets, which waits for them if enabled."""
        start_s = time.perf_counter()
        yield self._wait
        if self.enabled:
            self.seconds[part] += time.perf_counter() - start_s

    def _wait(self, *arrays: Any) -> None:
        if self.enabled:
            jax.block_until_ready(arrays)


class Tiers:
    """What a walk passes through. trace: of what runs; None: nothing is recorded."""

    def __init__(self, plan: Plan, dense: DenseTier, attention: Tier2, timings: Timings) -> None:
        self.plan, self.dense, self.attention, self.timings = plan, dense, attention, timings
        self.trace: Trace | None = None

    def release(self, values: dict[Value, jax.Array], stage: Stage) -> None:
        """Drop what is not carried behind `stage`: the carry is the only state that tier 1 keeps per row."""
        for value in values.keys() - frozenset(stage.carried):
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
        tokens, positions = dense.place(self.rows.tokens), dense.place(self.rows.positions)
        values: dict[Value, jax.Array] = {}
        yield from run_stages(self._tiers, self.rows, tokens, positions, values)
        # A microbatch of prefill chunks alone has nothing to sample and skips the last stage.
        if self._sampling:
            yield from self._sample(tokens, positions, [values[value] for value in self._tiers.plan.stages[-1].reads])

    def _sample(self, tokens: jax.Array, positions: jax.Array, reads: Sequence[jax.Array]) -> Iterator[Wait]:
        dense, timings = self._tiers.dense, self._tiers.timings
        slots = len(self.rows.sampled)
        inputs, variant = build_inputs(self._sampling, vocab_size=self._tiers.plan.vocab_size, num_slots=slots)
        with timings.measure("dense") as wait:
            logits = dense.logits(tokens, positions, reads, dense.place(self.rows.sampled))
            wait(logits)
        with timings.measure("sample") as wait:
            sampled = sample(logits, dense.place(inputs), variant)
            wait(sampled)
        if self._tiers.trace is not None:
            self._tiers.trace.computed(TIER1, "last stage and sampler", reads, sampled)
        yield Wait(len(self._tiers.plan.sites), True, lambda: are_ready(jax.tree.leaves(sampled)))
        self.sampled = jax.tree.map(np.asarray, sampled)


def run_stages(
    tiers: Tiers, rows: PackedRows, tokens: jax.Array, positions: jax.Array, values: dict[Value, jax.Array]
) -> Iterator[Wait]:
    """D0 -> A0 -> ... -> A(L-1), leaving in `values` what the last stage reads; pauses where a tier is waited for."""
    plan, dense, attention, timings = tiers.plan, tiers.dense, tiers.attention, tiers.timings
    layouts = attention.place_layout(rows.layout, rows.pools)
    sends: dict[tuple[int, int], Any] = {}  # as `attention` wants them
    for stage, site in zip(plan.stages, plan.sites, strict=False):
        with timings.measure("dense") as wait:
            writes, sent = dense.run(stage.index, tokens, positions, [values[value] for value in stage.reads])
            wait(writes, sent)
        if tiers.trace is not None:
            reads = [values[value] for value in stage.reads]
            tiers.trace.computed(TIER1, f"stage {stage.index}", reads, (writes, sent))
        values.update(zip(stage.writes, writes, strict=True))
        tiers.release(values, stage)
        leaving = attention.begin(sent)
        sends.update({(send.site, send.index): array for send, array in zip(stage.sends, leaving, strict=True)})
        yield Wait(stage.index, True, functools.partial(are_ready, sent))
        inputs = [sends.pop((stage.index, index)) for index in site.sent]
        with timings.measure("attention") as wait:
            outputs = attention.attend(stage.index, layouts, inputs)
            wait(outputs)
        if tiers.trace is not None:
            attention.record(tiers.trace, f"site {stage.index}", inputs, outputs)
        yield Wait(stage.index, False, functools.partial(attention.is_ready, outputs))
        found = (land(array, dense.device) for array in attention.fetch(outputs))
        values.update(zip(site.site.outputs, found, strict=True))
