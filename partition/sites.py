"""Attention sites: which equations belong to one, what enters on the query and on the key side, what leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from partition.analysis import Analysis, Axis, Kind, Side
from partition.errors import UnsupportedSiteError
from partition.jaxpr import Equation, Value
from partition.rules import axis_map, resized_params
from partition.structure import closure, structure_key

End = Literal["query", "key"]
Ends = tuple[End | None, ...]  # per axis: which token axis of the site it is


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """The attention subgraph of one site.

    equations: those that touch a score, and those between them (say the row maximum), in program order.
    operands: token-dependent values from outside, each with the side on which it enters.
    outputs: values that leave, one row per query.
    ends: for each value of the site, which of its axes is the query and which the key axis.
    key: equal for sites that compute the same function.
    """

    index: int
    opening: Equation
    equations: tuple[Equation, ...]
    operands: tuple[tuple[Value, End], ...]
    outputs: tuple[Value, ...]
    ends: Mapping[Value, Ends]
    key: str


def find_sites(analysis: Analysis) -> tuple[Site, ...]:
    """The attention sites in program order.

    Raises:
      UnsupportedSiteError: a reduced score comes back on the key side.
    """
    return tuple(_extract(analysis, index, members) for index, members in enumerate(_members(analysis)))


def _members(analysis: Analysis) -> list[list[Equation]]:
    """Per site, in program order: equations with a score, and those on a path from one score to another."""
    spans: list[list[int]] = [[] for _ in analysis.openings]
    for position, eqn in enumerate(analysis.traced.program.equations):
        touched = {side.site for value in (*eqn.inputs, *eqn.outputs) for side in analysis.facts[value].sides}
        for site in touched:
            spans[site].append(position)
    return [_between(analysis, span) for span in spans]


def _between(analysis: Analysis, span: list[int]) -> list[Equation]:
    window = analysis.traced.program.equations[span[0] : span[-1] + 1]
    scores = {analysis.traced.program.equations[position] for position in span}
    reached: set[Value] = set()
    after = set()
    for eqn in window:
        if eqn in scores or any(value in reached for value in eqn.inputs):
            after.add(eqn)
            reached.update(eqn.outputs)
    needed: set[Value] = set()
    members = []
    for eqn in reversed(window):
        if eqn in scores or (eqn in after and any(value in needed for value in eqn.outputs)):
            members.append(eqn)
            needed.update(eqn.inputs)
    return members[::-1]


def _extract(analysis: Analysis, index: int, members: list[Equation]) -> Site:
    facts, program = analysis.facts, analysis.traced.program
    member_set = set(members)
    inside = {value for eqn in members for value in eqn.outputs}
    ends = {value: _ends_of_member(analysis, value) for value in inside}
    operands: dict[tuple[Value, End], None] = {}
    for eqn in members:
        for position, value in enumerate(eqn.inputs):
            entering = operand_ends(analysis, eqn, position, ends)
            if value in inside:
                _check_same_side(analysis, eqn, value, ends[value], entering)
            elif facts[value].kind is Kind.TOKEN:
                operands[(value, row_end(entering))] = None
    outputs = tuple(value for eqn in members for value in eqn.outputs if _leaves(analysis, value, member_set))
    outer = closure(
        [value for eqn in members for value in eqn.inputs],
        analysis.made_by,
        lambda value: facts[value].kind is not Kind.TOKEN,
    )
    whole = [eqn for eqn in program.equations if eqn in outer or eqn in member_set]
    constants = {**program.constants, **analysis.traced.position_tables}
    return Site(
        index=index,
        opening=analysis.openings[index],
        equations=tuple(members),
        operands=tuple(operands),
        outputs=outputs,
        ends=ends,
        key=structure_key(whole, [value for value, _ in operands], outputs, constants, str([e for _, e in operands])),
    )


def _leaves(analysis: Analysis, value: Value, members: set[Equation]) -> bool:
    is_output = value in analysis.traced.program.outputs
    return is_output or any(user not in members for user in analysis.users.get(value, ()))


def _ends_of_member(analysis: Analysis, value: Value) -> Ends:
    def end(label: Any) -> End | None:
        if isinstance(label, Side):
            return "key" if analysis.key_sides[label.site] == label.side else "query"
        return "query" if label is Axis.ROW else None

    return tuple(end(label) for label in analysis.facts[value].labels)


def operand_ends(analysis: Analysis, eqn: Equation, position: int, ends: Mapping[Value, Ends]) -> Ends:
    """The token axes of one operand of a member equation, as the equation uses them."""
    value, axes = eqn.inputs[position], axis_map(eqn)
    if value in ends and analysis.facts[value].sides:
        return ends[value]
    out_ends = ends.get(eqn.outputs[0], ())
    partner = {**dict(axes.paired)} if position == 0 else {rhs: lhs for lhs, rhs in axes.paired}
    result: list[End | None] = []
    for axis, out in enumerate(axes.to_output[position]):
        if analysis.facts[value].labels[axis] is Axis.PLAIN:
            result.append(None)
        elif out is not None:
            result.append(out_ends[out])
        else:
            other = eqn.inputs[1 - position]
            result.append(ends[other][partner[axis]])
    return tuple(result)


def row_end(ends: Ends) -> End:
    """The one token axis of a value that has one row per query or per key."""
    for end in ends:
        if end is not None:
            return end
    raise AssertionError("the value has no token axis")


def _check_same_side(analysis: Analysis, eqn: Equation, value: Value, made: Ends, used: Ends) -> None:
    for label, end_made, end_used in zip(analysis.facts[value].labels, made, used, strict=True):
        if label is Axis.ROW and end_made != end_used:
            raise UnsupportedSiteError(
                f"'{eqn.primitive}' at {eqn.where} brings a value reduced over the keys back on the {end_used} side; "
                "only the query side is allowed"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteFunction:
    """Evaluates a site's own subgraph for any query and key positions: the oracle of the site.

    widened: compute in f32 where the model computes in a 16-bit type (for reading its parameters exactly).
    """

    analysis: Analysis
    site: Site
    widened: bool = False

    def __call__(
        self, operands: Sequence[jax.Array], query_positions: np.ndarray, key_positions: np.ndarray
    ) -> list[jax.Array]:
        """Outputs for operands in the traced layout, T replaced by the number of queries or of keys.

        Args:
          operands: in the order of `site.operands`.
          query_positions: [num_queries] int32.
          key_positions: [num_keys] int32.
        """
        run = _Run(self, dict(zip(self.site.operands, operands, strict=True)), query_positions, key_positions)
        for eqn in self.site.equations:
            run.member(eqn)
        return [run.values[value] for value in self.site.outputs]


class _Run:
    def __init__(
        self, function: SiteFunction, operands: dict[tuple[Value, End], Any], queries: np.ndarray, keys: np.ndarray
    ) -> None:
        self.function = function
        self.analysis, self.site = function.analysis, function.site
        self.traced = self.analysis.traced
        self.positions = {"query": jnp.asarray(queries), "key": jnp.asarray(keys)}
        self.operands = operands
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
        if eqn.primitive == "iota" and ends[eqn.params["dimension"]] is not None:
            rows = self.positions[ends[eqn.params["dimension"]] or "query"].astype(eqn.outputs[0].dtype)
            return [jax.lax.broadcast_in_dim(rows, shape, (eqn.params["dimension"],))]
        params = resized_params(eqn, shape)
        if self.function.widened:
            params = {name: _widen_type(value) for name, value in params.items()}
        return eqn.evaluate(args, params)

    def resized(self, value: Value, ends: Ends) -> tuple[int, ...]:
        return tuple(
            size if end is None else self.positions[end].shape[0] for size, end in zip(value.shape, ends, strict=True)
        )

    def read(self, value: Value, ends: Ends) -> Any:
        if value in self.values:
            return self.values[value]
        if any(ends) and (value, row_end(ends)) in self.operands:
            return self.operands[(value, row_end(ends))]
        if (value, ends) not in self.others:
            self.others[(value, ends)] = self.from_outside(value, ends)
        return self.others[(value, ends)]

    def from_outside(self, value: Value, ends: Ends) -> Any:
        """A constant or position-only value, evaluated at this site's positions."""
        if value in self.traced.position_tables:
            table = jnp.asarray(self.traced.position_tables[value])
            for axis, end in enumerate(ends):
                table = table if end is None else jnp.take(table, self.positions[end], axis=axis)
            return self.constant(table)
        if value in self.traced.program.constants:
            return self.constant(self.traced.program.constants[value])
        if value is self.traced.positions:
            return self.positions[row_end(ends)].reshape(self.resized(value, ends))
        eqn = self.analysis.made_by.get(value)
        if eqn is None:
            raise UnsupportedSiteError(
                f"the attention opened at {self.site.opening.where} uses a weight of shape {value.shape} directly; "
                "only q, k, v, constants and positions are allowed inside a site"
            )
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
        return array.astype(_widen_type(array.dtype)) if self.function.widened else array


def _widen_type(value: Any) -> Any:
    is_short = isinstance(value, (np.dtype, type)) and value in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    return np.dtype(np.float32) if is_short else value
