"""A site's own subgraph as a function of arrays: its oracle, and how it runs where no kernel knows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from partition.analysis import Analysis
from partition.evaluate import evaluate, widen_type
from partition.jaxpr import Equation, Value
from partition.labels import Axis, Kind
from partition.rules import axis_map, resized_params
from partition.sites import End, Ends, Site, operand_ends, row_end


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteFunction:
    """Evaluates a site's own subgraph for any query and key positions.

    widened: compute in f32 where the model computes in a 16-bit type (for reading its parameters exactly).
    """

    analysis: Analysis
    site: Site
    widened: bool = False

    def __call__(
        self,
        operands: Sequence[jax.Array],
        query_positions: Any,
        key_positions: Any,
        weights: Sequence[Any] = (),
    ) -> list[jax.Array]:
        """Outputs for operands in the traced layout, T replaced by the number of queries or of keys.

        Args:
          operands: in the order of `site.operands`.
          query_positions: [num_queries] int32.
          key_positions: [num_keys] int32.
          weights: in the order of `site.weights`.
        """
        run = _Run(self, dict(zip(self.site.operands, operands, strict=True)), query_positions, key_positions)
        run.weights = dict(zip(self.site.weights, weights, strict=True))
        for eqn in self.site.equations:
            run.member(eqn)
        return [run.values[value] for value in self.site.outputs]


class _Run:
    def __init__(self, function: SiteFunction, operands: dict[tuple[Value, End], Any], queries: Any, keys: Any) -> None:
        self.function = function
        self.analysis, self.site = function.analysis, function.site
        self.traced = self.analysis.traced
        self.positions = {"query": jnp.asarray(queries), "key": jnp.asarray(keys)}
        self.operands = operands
        self.weights: dict[Value, Any] = {}
        self.values: dict[Value, Any] = {}
        self.others: dict[tuple[Value, Ends], Any] = {}

    def member(self, eqn: Equation) -> None:
        args = []
        for position, value in enumerate(eqn.inputs):
            args.append(self.read(value, operand_ends(self.analysis, eqn, position, self.site.ends)))
        results = self.evaluate(eqn, args, self.site.ends[eqn.outputs[0]])
        self.values.update(zip(eqn.outputs, results, strict=True))

    def evaluate(self, eqn: Equation, args: list[Any], ends: Ends) -> list[Any]:
        shape = self.resized(eqn.outputs[0], ends)
        params = resized_params(eqn, shape)
        if self.function.widened:
            params = {name: widen_type(value) for name, value in params.items()}
        return evaluate(eqn, args, shape, [None if end is None else self.positions[end] for end in ends], params)

    def resized(self, value: Value, ends: Ends) -> tuple[int, ...]:
        return tuple(
            size if end is None else self.positions[end].shape[0] for size, end in zip(value.shape, ends, strict=True)
        )

    def read(self, value: Value, ends: Ends) -> Any:
        if value in self.values:
            return self.values[value]
        if self.analysis.facts[value].kind is Kind.TOKEN:
            operand = (value, row_end(self.analysis, value, ends))
            if operand in self.operands:
                return self.operands[operand]
        if (value, ends) not in self.others:
            self.others[(value, ends)] = self.from_outside(value, ends)
        return self.others[(value, ends)]

    def from_outside(self, value: Value, ends: Ends) -> Any:
        """A weight, constant or position-only value, or a change of shape before an operand's use."""
        if value in self.weights:
            return self.constant(self.weights[value])
        if value in self.traced.position_tables:
            table = jnp.asarray(self.traced.position_tables[value])
            for axis, end in enumerate(ends):
                table = table if end is None else jnp.take(table, self.positions[end], axis=axis, mode="clip")
            return self.constant(table)
        if value in self.traced.program.constants:
            return self.constant(self.traced.program.constants[value])
        if value is self.traced.positions:
            return self.positions[row_end(self.analysis, value, ends)].reshape(self.resized(value, ends))
        eqn = self.analysis.made_by[value]
        args = [
            self.read(operand, self.outside_ends(eqn, position, ends)) for position, operand in enumerate(eqn.inputs)
        ]
        results = self.evaluate(eqn, args, ends)
        return results[eqn.outputs.index(value)]

    def outside_ends(self, eqn: Equation, position: int, ends: Ends) -> Ends:
        labels = self.analysis.facts[eqn.inputs[position]].labels
        if all(label is Axis.PLAIN for label in labels):
            return (None,) * len(labels)
        targets = axis_map(eqn).to_output[position]
        return tuple(
            None if label is Axis.PLAIN or out is None else ends[out]
            for label, out in zip(labels, targets, strict=True)
        )

    def constant(self, array: Any) -> Any:
        array = jnp.asarray(array)
        return array.astype(widen_type(array.dtype)) if self.function.widened else array
