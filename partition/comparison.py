"""Runs values of a program, loops included, on random numbers, to see whether two of them are the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partition.evaluate import widen_type
from partition.jaxpr import Equation, Loop, Value
from partition.structure import closure, producers

# Of the largest entry: f32 sums in another order agree to about 1e-6.
_TOLERANCE = 1e-5


def draw(random: np.random.Generator, value: Value) -> np.ndarray:
    """Normal numbers in f32 for any float type; ones, or true, for the others."""
    is_float = jnp.issubdtype(value.dtype, jnp.floating)
    return random.normal(size=value.shape).astype(np.float32) if is_float else np.ones(value.shape, value.dtype)


def evaluated(value: Value, equations: Sequence[Equation], env: Mapping[Value, Any]) -> jax.Array:
    """A value computed in f32 where the model computes in a 16-bit type."""
    needed = closure([value], producers(equations), lambda each: each not in env)
    return _run([eqn for eqn in equations if eqn in needed], env)[value]


def _run(equations: Sequence[Equation], env: Mapping[Value, Any]) -> dict[Value, Any]:
    found = {value: _widened(array) for value, array in env.items()}
    for eqn in equations:
        args = [found[value] for value in eqn.inputs]
        if eqn.loop is not None:
            results = _run_loop(eqn.loop, args, env)
        else:
            results = eqn.evaluate(args, {name: widen_type(value) for name, value in eqn.params.items()})
        found.update(zip(eqn.outputs, results, strict=True))
    return found


def _run_loop(loop: Loop, args: Sequence[Any], env: Mapping[Value, Any]) -> list[Any]:
    constants, others = args[: loop.num_constants], [jnp.asarray(each) for each in args[loop.num_constants :]]

    def step(carry: Sequence[Any], entries: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        inputs = dict(zip(loop.body.inputs, [*constants, *carry, *entries], strict=True))
        found = _run(loop.body.equations, {**env, **inputs})
        made = [found[value] for value in loop.body.outputs]
        return made[: loop.num_carry], made[loop.num_carry :]

    carry, entries = others[: loop.num_carry], others[loop.num_carry :]
    last, collected = jax.lax.scan(step, carry, entries, length=loop.length, reverse=loop.reverse)
    return [*last, *collected]


def _widened(array: Any) -> Any:
    return array.astype(widen_type(array.dtype))


def are_close(a: jax.Array, b: jax.Array) -> bool:
    """Do two arrays agree as far as f32 sums in another order do? Not where either is no number."""
    return bool(jnp.abs(a - b).max() <= _TOLERANCE * jnp.abs(a).max())
