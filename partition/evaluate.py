"""Equations at another number of rows: sizes follow the rows, and what is made by position follows their positions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partition.jaxpr import Equation, Program, Value
from partition.rules import resized_params
from partition.structure import closure, producers


def evaluate(
    eqn: Equation,
    args: Sequence[Any],
    shape: tuple[int, ...],
    positions: Sequence[jax.Array | None],
    params: Mapping[str, Any] | None = None,
) -> list[jax.Array]:
    """The results of `eqn`, whose first output has `shape` instead of the traced one.

    Args:
      args: operands at the new size.
      positions: per axis of the first output, the position of each of its entries [n] int32; None for ordinary axes.
      params: the resized parameters, if changed further.
    """
    params = resized_params(eqn, shape) if params is None else params
    if eqn.primitive == "iota" and positions[eqn.params["dimension"]] is not None:
        axis = eqn.params["dimension"]
        return [jax.lax.broadcast_in_dim(jnp.asarray(positions[axis], params["dtype"]), shape, (axis,))]
    if eqn.primitive == "slice":
        return [_slice(eqn, args[0], dict(params), positions)]
    return eqn.evaluate(args, params)


def _slice(eqn: Equation, array: Any, params: dict[str, Any], positions: Sequence[jax.Array | None]) -> jax.Array:
    """Axes cut out of a longer table are looked up by position; the others are sliced."""
    (source,), (target,) = eqn.inputs, eqn.outputs
    starts, limits = list(params["start_indices"]), list(params["limit_indices"])
    for axis, at in enumerate(positions):
        if at is not None and source.shape[axis] != target.shape[axis]:
            array = jnp.take(jnp.asarray(array), at + starts[axis], axis=axis, mode="clip")
            starts[axis], limits[axis] = 0, at.shape[0]
    return jax.lax.slice(array, starts, limits, params["strides"])


def row_shape(value: Value, traced_rows: int, rows: int) -> tuple[int, ...]:
    """The shape of a value with one row, or several, per token, for another number of rows."""
    return tuple(size if size % traced_rows else size // traced_rows * rows for size in value.shape)


def evaluate_rows(eqn: Equation, args: Sequence[Any], positions: jax.Array, *, traced_rows: int) -> list[jax.Array]:
    """The results of `eqn` where every token axis has the rows `positions` [n] int32."""
    shape = row_shape(eqn.outputs[0], traced_rows, positions.shape[0])
    by_axis = [positions if size == traced_rows else None for size in eqn.outputs[0].shape]
    return evaluate(eqn, args, shape, by_axis)


def evaluate_tables(
    wanted: Iterable[Value], program: Program, known: Mapping[Value, Any], *, traced_rows: int, max_rows: int
) -> dict[Value, Any]:
    """`known`, and each wanted value made of it for the positions 0 .. max_rows - 1."""
    env = dict(known)
    needed = closure(wanted, producers(program.equations), lambda value: value not in env)
    positions = jnp.arange(max_rows, dtype=jnp.int32)
    for eqn in program.equations:
        if eqn in needed:
            args = [env[value] for value in eqn.inputs]
            env.update(zip(eqn.outputs, evaluate_rows(eqn, args, positions, traced_rows=traced_rows), strict=True))
    return env


def constant_value(value: Value, program: Program) -> np.ndarray | None:
    """What a value of a program is that is made of constants alone, say the sum of a mask of ones; None for others."""
    env = dict(program.constants)
    needed = closure([value], producers(program.equations), lambda each: each not in env)
    equations = [eqn for eqn in program.equations if eqn in needed]
    if not {value, *(each for eqn in equations for each in eqn.inputs)}.isdisjoint(program.inputs):
        return None
    for eqn in equations:
        env.update(zip(eqn.outputs, eqn.evaluate([env[each] for each in eqn.inputs]), strict=True))
    return np.asarray(env[value])


def widen_type(value: Any) -> Any:
    """f32 for a 16-bit float type; anything else as it is."""
    is_short = isinstance(value, (np.dtype, type)) and value in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    return np.dtype(np.float32) if is_short else value
