"""Positions counted by a running sum of a padding mask that is made from token ids.

How many real tokens there are up to one depends on the tokens before it. That is attention with a weight of one for
each: the flags are cached, and summed up for every row. Integers alone are taken, whose sums are exact in any order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from partition.jaxpr import Equation, Program, Value, trace_onto
from partition.structure import closure, producers


def count_by_attention(program: Program, rows: int) -> Program:
    """The program with masked sums in place of running sums, along the tokens, of integers made from ids alone."""
    made_by, constants = producers(program.equations), dict(program.constants)
    equations: list[Equation] = []
    for eqn in program.equations:
        if not _is_count(eqn, program, rows, made_by):
            equations.append(eqn)
            continue
        axis = eqn.params["axis"]
        traced = trace_onto(eqn.inputs, lambda flags, axis=axis: _masked_sum(flags, axis), eqn.where)
        *others, last = traced.equations
        equations += [*others, dataclasses.replace(last, outputs=eqn.outputs)]
        constants.update(traced.constants)
    return dataclasses.replace(program, equations=tuple(equations), constants=constants)


def _is_count(eqn: Equation, program: Program, rows: int, made_by: Mapping[Value, Equation]) -> bool:
    if eqn.primitive != "cumsum" or eqn.params["reverse"] or eqn.inputs[0].shape[eqn.params["axis"]] != rows:
        return False
    *weights, tokens, _ = program.inputs
    made_of = {value for each in closure(eqn.inputs, made_by, lambda _: True) for value in each.inputs} | {*eqn.inputs}
    return jnp.issubdtype(eqn.outputs[0].dtype, jnp.integer) and tokens in made_of and made_of.isdisjoint(weights)


def _masked_sum(flags: jax.Array, axis: int) -> jax.Array:
    rows = flags.shape[axis]
    earlier = jax.lax.iota(jnp.int32, rows)[:, None] >= jax.lax.iota(jnp.int32, rows)
    keys = jnp.moveaxis(flags, axis, -1)[..., None, :]
    return jnp.moveaxis(jnp.where(earlier, keys, 0).sum(axis=-1, dtype=flags.dtype), -1, axis)
