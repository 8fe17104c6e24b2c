"""Turns the stages of a plan into functions of arrays, and weights into what the stages take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from partition.cut import Stage
from partition.evaluate import evaluate_rows, evaluate_tables, row_shape
from partition.jaxpr import Value
from partition.labels import Axis, Kind
from partition.plan import Plan


def prepare_weights(plan: Plan, params: Any, device: Any = None) -> dict[Value, jax.Array]:
    """Everything that the stages read besides rows: weights, values made of weights alone, and position tables.

    Args:
      params: the pytree that the plan was made from, with arrays where the stages read it.
      device: where they are put, each by itself: of the stacked weights of a scan it only gets the slices.
    Returns:
      an array for each external of each stage; position tables have `plan.max_rows` rows along their row axis.
    """
    return _prepared(plan, params, (value for stage in plan.stages for value in stage.externals), device)


def prepare_site_weights(plan: Plan, params: Any, device: Any = None) -> dict[Value, jax.Array]:
    """The same of the weights that sites read."""
    return _prepared(plan, params, (value for site in plan.sites for value in site.weights), device)


def _prepared(plan: Plan, params: Any, values: Iterable[Value], device: Any) -> dict[Value, jax.Array]:
    traced = plan.analysis.traced
    env: dict[Value, Any] = dict(zip(traced.weights, jax.tree.leaves(params), strict=True))
    env.update({value: jnp.asarray(array) for value, array in plan.constants.items()})
    env[traced.positions] = jnp.arange(plan.max_rows, dtype=jnp.int32).reshape(
        row_shape(traced.positions, traced.rows, plan.max_rows)
    )
    wanted = dict.fromkeys(values)
    env = evaluate_tables(wanted, traced.program, env, traced_rows=traced.rows, max_rows=plan.max_rows)
    return {value: jax.device_put(env[value], device) for value in wanted}


@dataclass(frozen=True, eq=False)
class StageFunction:
    """A stage as a function of arrays, for any number of rows R.

    (externals, tokens [R] int32, positions [R] int32, reads) -> (writes, sends): reads, writes are in the model's own
    layout with T replaced by R; what a site gives comes, and what it takes goes, in the layout of its port.
    """

    plan: Plan
    stage: Stage

    def __call__(
        self, externals: Sequence[jax.Array], tokens: jax.Array, positions: jax.Array, reads: Sequence[jax.Array]
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        env = self._inputs(externals, tokens, positions, reads)
        for eqn in self.stage.equations:
            args = [env[value] for value in eqn.inputs]
            if eqn in self.plan.analysis.orderings:
                args[1] = jax.lax.iota(args[1].dtype, args[1].shape[0])  # entries of this call, not positions
            results = evaluate_rows(eqn, args, positions, traced_rows=self.plan.analysis.traced.rows)
            env.update(zip(eqn.outputs, results, strict=True))
        writes = tuple(env[value] for value in self.stage.writes)
        return writes, tuple(send.port.layout.to_canonical(env[send.value]) for send in self.stage.sends)

    def _inputs(
        self, externals: Sequence[jax.Array], tokens: jax.Array, positions: jax.Array, reads: Sequence[jax.Array]
    ) -> dict[Value, Any]:
        traced = self.plan.analysis.traced
        env: dict[Value, Any] = dict(traced.program.constants)
        count = tokens.shape[0]
        env.update({value: jnp.asarray(a * count + b, value.dtype) for value, (a, b) in traced.counts.items()})
        env[traced.tokens] = tokens.reshape(row_shape(traced.tokens, traced.rows, tokens.shape[0]))
        env[traced.positions] = positions.reshape(row_shape(traced.positions, traced.rows, tokens.shape[0]))
        for value, array in zip(self.stage.externals, externals, strict=True):
            env[value] = self._gathered(value, array, positions)
        outputs = {port.value: port for site in self.plan.sites for port in site.outputs}
        for value, array in zip(self.stage.reads, reads, strict=True):
            env[value] = outputs[value].layout.from_canonical(array) if value in outputs else array
        return env

    def _gathered(self, value: Value, array: jax.Array, positions: jax.Array) -> jax.Array:
        facts = self.plan.analysis.facts[value]
        if facts.kind is not Kind.POSITION:
            return array
        return jnp.take(array, positions, axis=facts.labels.index(Axis.ROW), mode="clip")

    def select(
        self,
        externals: Sequence[jax.Array],
        tokens: jax.Array,
        positions: jax.Array,
        reads: Sequence[jax.Array],
        chosen: jax.Array,
    ) -> tuple[jax.Array, ...]:
        """The stage's writes for the rows `chosen` [S] int32 only: all is token-wise, so rows may be dropped first."""
        kept = [
            jnp.take(array, chosen, axis=self._row_axis(value))
            for value, array in zip(self.stage.reads, reads, strict=True)
        ]
        return self(externals, tokens[chosen], positions[chosen], kept)[0]

    def _row_axis(self, value: Value) -> int:
        if any(value in item.site.outputs for item in self.plan.sites):
            return 0
        return self.plan.analysis.facts[value].labels.index(Axis.ROW)


def stage_functions(plan: Plan, wrap: Callable[[StageFunction], Any]) -> list[Any]:
    """`wrap(function)` of every stage; structurally equal stages get the same object, so they share executables."""
    made: dict[str, Any] = {}
    for stage in plan.stages:
        if stage.key not in made:
            made[stage.key] = wrap(StageFunction(plan, stage))
    return [made[stage.key] for stage in plan.stages]
