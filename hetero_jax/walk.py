"""One microbatch on its way D0 -> A0 -> D1 -> A1 ... -> DL -> sampler."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import jax
import numpy as np

from hetero_jax.attention_layout import AttentionLayout
from hetero_jax.dense_tier import DenseTier
from hetero_jax.devices import land
from hetero_jax.rows import PackedRows
from hetero_jax.sampler import RowSampling, SamplerOutputs, build_inputs, sample
from partition import Plan, Stage, Value


class Tier2(Protocol):
    """What serves the attention: `AttentionTier` in this process, `RemoteTier` elsewhere.

    What `place_layout` gives goes into `attend`, and so does what `begin` makes of each array that is sent; what that
    gives goes into `fetch`, for the rows [R, heads, v_head_dim]. Rows of a pool that is lost on the way come back as
    something finite.
    """

    def place_layout(self, layout: AttentionLayout, pools: Sequence[int]) -> Any: ...

    def begin(self, arrays: tuple[jax.Array, ...]) -> Sequence[Any]: ...

    def attend(self, site: int, layouts: Any, inputs: Sequence[Any]) -> Any: ...

    def fetch(self, pending: Any) -> tuple[jax.Array, ...]: ...


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
    """What a walk passes through."""

    def __init__(self, plan: Plan, dense: DenseTier, attention: Tier2, timings: Timings) -> None:
        self.plan, self.dense, self.attention, self.timings = plan, dense, attention, timings

    def release(self, values: dict[Value, jax.Array], stage: Stage) -> None:
        """Drop what is not carried behind `stage`: the carry is the only state that tier 1 keeps per row."""
        for value in values.keys() - frozenset(stage.carried):
            del values[value]


class Walk:
    """The steps of one microbatch; each ends where the next thing to do waits for the other tier.

    Stepping several walks in turn keeps both tiers busy: JAX dispatches asynchronously, and only copies between
    devices and the sampled tokens are waited for.

    sampled: tokens and log probabilities of `rows.samplers`, in order, once `step` has returned True.
    """

    def __init__(self, tiers: Tiers, rows: PackedRows, sampling: Sequence[RowSampling]) -> None:
        self.rows = rows
        self.sampled: SamplerOutputs | None = None
        self._tiers, self._sampling = tiers, sampling
        self._steps = self._walk()

    def step(self) -> bool:
        """Go on to the next wait; True at the end."""
        return next(self._steps, self) is self

    def _walk(self) -> Iterator[None]:
        dense = self._tiers.dense
        tokens, positions = dense.place(self.rows.tokens), dense.place(self.rows.positions)
        values: dict[Value, jax.Array] = {}
        yield from run_stages(self._tiers, self.rows, tokens, positions, values)
        # A microbatch of prefill chunks alone has nothing to sample and skips the last stage.
        if self._sampling:
            yield from self._sample(tokens, positions, [values[value] for value in self._tiers.plan.stages[-1].reads])

    def _sample(self, tokens: jax.Array, positions: jax.Array, reads: Sequence[jax.Array]) -> Iterator[None]:
        dense, timings = self._tiers.dense, self._tiers.timings
        slots = len(self.rows.sampled)
        inputs, variant = build_inputs(self._sampling, vocab_size=self._tiers.plan.vocab_size, num_slots=slots)
        with timings.measure("dense") as wait:
            logits = dense.logits(tokens, positions, reads, dense.place(self.rows.sampled))
            wait(logits)
        with timings.measure("sample") as wait:
            sampled = sample(logits, dense.place(inputs), variant)
            wait(sampled)
        yield
        self.sampled = jax.tree.map(np.asarray, sampled)


def run_stages(
    tiers: Tiers, rows: PackedRows, tokens: jax.Array, positions: jax.Array, values: dict[Value, jax.Array]
) -> Iterator[None]:
    """D0 -> A0 -> ... -> A(L-1), leaving in `values` what the last stage reads; pauses where a tier is waited for."""
    plan, dense, attention, timings = tiers.plan, tiers.dense, tiers.attention, tiers.timings
    layouts = attention.place_layout(rows.layout, rows.pools)
    sends: dict[tuple[int, int], Any] = {}  # as `attention` wants them
    for stage, site in zip(plan.stages, plan.sites, strict=False):
        with timings.measure("dense") as wait:
            writes, sent = dense.run(stage.index, tokens, positions, [values[value] for value in stage.reads])
            wait(writes, sent)
        values.update(zip(stage.writes, writes, strict=True))
        tiers.release(values, stage)
        leaving = attention.begin(sent)
        sends.update({(send.site, send.index): array for send, array in zip(stage.sends, leaving, strict=True)})
        yield
        inputs = [sends.pop((stage.index, index)) for index in range(len(site.inputs))]
        with timings.measure("attention") as wait:
            outputs = attention.attend(stage.index, layouts, inputs)
            wait(outputs)
        yield
        found = (land(array, dense.device) for array in attention.fetch(outputs))
        values.update(zip(site.site.outputs, found, strict=True))
