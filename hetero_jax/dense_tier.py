"""Tier 1: the weights and the jitted dense stages, on one device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from hetero_jax.wire import from_wire, to_wire
from partition import Plan, StageFunction, prepare_weights, stage_functions


class DenseTier:
    """Runs the stages of a plan. Structurally equal stages share one jitted function and take their own weights.

    Args:
      device: where they run.
      wire_dtype: of rows that go to workers and come back: stages give and take them as they travel; None: as they are.
    """

    def __init__(self, plan: Plan, params: Any, *, device: Any, wire_dtype: str | None = None) -> None:
        self.device = device
        self._plan = plan
        with jax.default_device(device):
            prepared = prepare_weights(plan, params, device)
        self._externals = [tuple(prepared[value] for value in stage.externals) for stage in plan.stages]
        self._place = jax.jit(lambda *arrays: arrays, out_shardings=jax.sharding.SingleDeviceSharding(device))
        self._stages = stage_functions(plan, lambda stage: jax.jit(_WiredStage(stage, wire_dtype)))
        self._selects = stage_functions(plan, lambda stage: jax.jit(_WiredStage(stage, wire_dtype).select))

    @property
    def weight_bytes(self) -> int:
        """Bytes of all arrays that the stages read besides rows."""
        unique = {id(array): array.nbytes for externals in self._externals for array in externals}
        return sum(unique.values())

    def place(self, *arrays: np.ndarray) -> tuple[jax.Array, ...]:
        """Host arrays on this tier's device; by a jitted call, a quarter of the time of `jax.device_put`."""
        return self._place(*arrays)

    def run(
        self, stage: int, tokens: jax.Array, positions: jax.Array, reads: Sequence[jax.Array | np.ndarray]
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """(writes, sends) of a stage for all rows."""
        return self._stages[stage](self._externals[stage], tokens, positions, reads)

    def logits(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        reads: Sequence[jax.Array | np.ndarray],
        chosen: jax.Array | np.ndarray,
    ) -> jax.Array:
        """The last stage for the rows `chosen` [S] only: logits [S, vocab]."""
        (logits,) = self._selects[-1](self._externals[-1], tokens, positions, reads, chosen)
        return logits.reshape(chosen.shape[0], self._plan.vocab_size)


class _WiredStage:
    """A stage as a function of arrays, of which those that come from sites and go to sites are as they travel."""

    def __init__(self, stage: StageFunction, wire_dtype: str | None) -> None:
        self._stage, self._wire_dtype = stage, wire_dtype
        self._answers = {port.value for site in stage.plan.sites for port in site.outputs}

    def __call__(
        self, externals: Sequence[jax.Array], tokens: jax.Array, positions: jax.Array, reads: Sequence[jax.Array]
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        writes, sends = self._stage(externals, tokens, positions, self._landed(reads))
        return writes, sends if self._wire_dtype is None else to_wire(sends, self._wire_dtype)

    def select(
        self,
        externals: Sequence[jax.Array],
        tokens: jax.Array,
        positions: jax.Array,
        reads: Sequence[jax.Array],
        chosen: jax.Array,
    ) -> tuple[jax.Array, ...]:
        return self._stage.select(externals, tokens, positions, self._landed(reads), chosen)

    def _landed(self, reads: Sequence[jax.Array]) -> Sequence[jax.Array]:
        if (wire_dtype := self._wire_dtype) is None:
            return reads
        return [
            from_wire(array, wire_dtype, value.dtype) if value in self._answers else array
            for value, array in zip(self._stage.stage.reads, reads, strict=True)
        ]
