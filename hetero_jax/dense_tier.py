"""Tier 1: the weights and the jitted dense stages, on one device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from partition import Plan, StageFunction, prepare_weights, stage_functions


class DenseTier:
    """Runs the stages of a plan. Structurally equal stages share one jitted function and take their own weights."""

    def __init__(self, plan: Plan, params: Any, *, device: Any) -> None:
        self.device = device
        self._plan = plan
        with jax.default_device(device):
            prepared = prepare_weights(plan, params, device)
        self._externals = [tuple(prepared[value] for value in stage.externals) for stage in plan.stages]
        self._stages = stage_functions(plan, jax.jit)
        self._selects = stage_functions(plan, _jit_select)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all arrays that the stages read besides rows."""
        unique = {id(array): array.nbytes for externals in self._externals for array in externals}
        return sum(unique.values())

    def place(self, array: Any) -> jax.Array:
        """A host array on this tier's device."""
        return jax.device_put(array, self.device)

    def run(
        self, stage: int, tokens: jax.Array, positions: jax.Array, reads: Sequence[jax.Array]
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """(writes, sends) of a stage for all rows."""
        return self._stages[stage](self._externals[stage], tokens, positions, reads)

    def logits(
        self, tokens: jax.Array, positions: jax.Array, reads: Sequence[jax.Array], chosen: jax.Array
    ) -> jax.Array:
        """The last stage for the rows `chosen` [S] only: logits [S, vocab]."""
        (logits,) = self._selects[-1](self._externals[-1], tokens, positions, reads, chosen)
        return logits.reshape(chosen.shape[0], self._plan.vocab_size)


def _jit_select(function: StageFunction) -> Any:
    return jax.jit(function.select)
