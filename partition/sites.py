"""Attention sites: which equations belong to one, what enters on the query and on the key side, what leaves."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from partition.analysis import Analysis
from partition.errors import UnsupportedSiteError
from partition.jaxpr import Equation, Value
from partition.labels import Axis, Kind, Side
from partition.rules import ELEMENTWISE, REDUCTIONS, SHAPE_ONLY, axis_map
from partition.structure import closure, in_order_of_need, row_bytes, structure_key

End = Literal["query", "key"]
Ends = tuple[End | None, ...]  # per axis: which token axis of the site it is


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """The attention subgraph of one site.

    equations: those that touch a pairing, and those between them (say the row maximum), in program order.
    operands: token-dependent values from outside, each with the side on which it enters. Where that makes them smaller
      they are taken from before changes of shape and type (a repeat of grouped heads), which are then the site's.
    outputs: values that leave, one row per query.
    weights: weights that the site reads (learned sinks, a bias by distance).
    ends: for each value that `equations` make, which of its axes is the query and which the key axis.
    key: equal for sites that compute the same function.
    """

    index: int
    opening: Equation
    equations: tuple[Equation, ...]
    operands: tuple[tuple[Value, End], ...]
    outputs: tuple[Value, ...]
    weights: tuple[Value, ...]
    ends: Mapping[Value, Ends]
    key: str


def find_sites(analysis: Analysis) -> tuple[Site, ...]:
    """The attention sites, each after those that it needs.

    Raises:
      UnsupportedSiteError: a reduced score comes back on the key side.
    """
    found = _Finder(analysis).drafts()
    return tuple(_Extractor(analysis, draft).site(index) for index, draft in enumerate(found))


@dataclass(frozen=True, kw_only=True)
class _Draft:
    """flips: every pairing of the site, and whether its side 0 is side 1 of the one that closes the site."""

    pairing: int
    flips: Mapping[int, int]
    equations: tuple[Equation, ...]
    outputs: tuple[Value, ...]


class _Finder:
    """Walks back from the logits: a pairing whose reduction is needed outside it is a site."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.order = {eqn: index for index, eqn in enumerate(analysis.traced.program.equations)}
        self.sides = {
            eqn: {side.pairing for value in (*eqn.inputs, *eqn.outputs) for side in analysis.facts[value].sides}
            for eqn in self.order
        }
        self.reduced_from = self._reduced_from()
        self.ancestors: dict[int, set[Equation]] = {}
        self.outputs: dict[int, dict[Value, None]] = {}

    def drafts(self) -> list[_Draft]:
        facts = self.analysis.facts
        stack, seen = list(self.analysis.traced.program.outputs), set()
        while stack:
            value = stack.pop()
            eqn = self.analysis.made_by.get(value)
            if value in seen or eqn is None or facts[value].kind is not Kind.TOKEN:
                continue
            seen.add(value)
            if self.sides[eqn]:
                pairing = max(self.sides[eqn])
                self.outputs.setdefault(pairing, {})[value] = None
                members = self.members(pairing, [value])
                needed = [operand for each in members for operand in each.inputs]
                stack.extend(each for each in needed if self.analysis.made_by.get(each) not in members)
            else:
                stack.extend(eqn.inputs)
        drafts = [self.draft(pairing) for pairing in self.outputs]
        return sorted(drafts, key=lambda draft: min(self.order[self.analysis.made_by[v]] for v in draft.outputs))

    def draft(self, pairing: int) -> _Draft:
        outputs = tuple(sorted(self.outputs[pairing], key=lambda value: self.order[self.analysis.made_by[value]]))
        members = self.members(pairing, outputs)
        if len(outputs) > 1:
            members, outputs = self.closed(members, outputs)
        equations = tuple(sorted(members, key=self.order.__getitem__))
        return _Draft(pairing=pairing, flips=self.flips(pairing), equations=equations, outputs=outputs)

    def closed(self, members: set[Equation], outputs: tuple[Value, ...]) -> tuple[set[Equation], tuple[Value, ...]]:
        """With what the model makes of the outputs alone, row by row, if that is one value (say their quotient).

        So a normalisation that stands behind the reductions is the attention's.
        """
        whole = set(members)
        made = {value for eqn in members for value in eqn.outputs if not self.analysis.facts[value].sides}

        def users(value: Value) -> list[Equation]:
            return [eqn for eqn in self.analysis.users.get(value, ()) if eqn not in whole]

        waiting = [self.order[eqn] for value in made for eqn in users(value)]
        while waiting:
            heapq.heapify(waiting)
            eqn = self.analysis.traced.program.equations[heapq.heappop(waiting)]
            if eqn in whole or not self.is_row_by_row(eqn, made):
                continue
            whole.add(eqn)
            made.update(eqn.outputs)
            leaving = [value for value in made if users(value)]
            if len(leaving) == 1:
                return closure(leaving, self.analysis.made_by, lambda value: value in made) | members, tuple(leaving)
            waiting.extend(self.order[user] for user in users(eqn.outputs[0]))
        return members, outputs

    def is_row_by_row(self, eqn: Equation, made: Collection[Value]) -> bool:
        """Does the equation take nothing but `made` values and constants, and keep their rows?"""
        facts = self.analysis.facts
        others = [facts[value].kind for value in eqn.inputs if value not in made]
        rows = [label for label in facts[eqn.outputs[0]].labels if label not in (Axis.PLAIN, Axis.UNIFORM)]
        is_known = eqn.primitive in (*ELEMENTWISE, *SHAPE_ONLY, *REDUCTIONS)
        return is_known and rows == [Axis.ROW] and all(kind is Kind.CONSTANT for kind in others)

    def members(self, pairing: int, outputs: Iterable[Value]) -> set[Equation]:
        """What the outputs need of the pairing, of those it absorbed, and of rows reduced from these on the way."""
        parts = frozenset(self.flips(pairing))

        def inside(value: Value) -> bool:
            eqn = self.analysis.made_by[value]
            between = self.reduced_from.get(value, frozenset()) & parts
            return bool(self.sides[eqn] & parts) or any(eqn in self.leading_to(part) for part in between)

        return closure(outputs, self.analysis.made_by, inside)

    def flips(self, pairing: int) -> dict[int, int]:
        """Every pairing that this one absorbed, and those that they did; and whether its sides are swapped."""
        found = {pairing: 0}
        stack = [pairing]
        while stack:
            part = stack.pop()
            for other, flip in self.analysis.absorbed.get(part, {}).items():
                if other not in found:
                    found[other] = found[part] ^ flip
                    stack.append(other)
                elif found[other] != found[part] ^ flip:
                    where = self.analysis.openings[other].where
                    raise UnsupportedSiteError(f"the scores made at {where} meet their own transpose in one attention")
        return found

    def leading_to(self, pairing: int) -> set[Equation]:
        """All equations that an equation with sides of the pairing needs."""
        if pairing not in self.ancestors:
            roots = [value for eqn, sides in self.sides.items() if pairing in sides for value in eqn.inputs]
            is_token = lambda value: self.analysis.facts[value].kind is Kind.TOKEN  # noqa: E731
            self.ancestors[pairing] = closure(roots, self.analysis.made_by, is_token)
        return self.ancestors[pairing]

    def _reduced_from(self) -> dict[Value, frozenset[int]]:
        """Per row value: the pairings that were last reduced on the way to it."""
        found: dict[Value, frozenset[int]] = {}
        for eqn, sides in self.sides.items():
            origins = frozenset(sides) or frozenset().union(*(found.get(value, frozenset()) for value in eqn.inputs))
            if origins:
                found.update(dict.fromkeys(eqn.outputs, origins))
        return found


class _Extractor:
    def __init__(self, analysis: Analysis, draft: _Draft) -> None:
        self.analysis, self.draft = analysis, draft
        self.inside = {value for eqn in draft.equations for value in eqn.outputs}
        self.key_side = self._key_side()
        self.ends = {value: self._ends(value) for value in self.inside}
        self.pulled: set[Equation] = set()

    def site(self, index: int) -> Site:
        operands = self._operands()
        program, facts = self.analysis.traced.program, self.analysis.facts
        outer = closure(
            [value for eqn in (*self.draft.equations, *self.pulled) for value in eqn.inputs],
            self.analysis.made_by,
            lambda value: facts[value].kind is not Kind.TOKEN and not self.analysis.is_weight(value),
        )
        members = {*self.draft.equations, *self.pulled, *outer}
        whole = in_order_of_need(self.draft.outputs, self.analysis.made_by, members)
        read = dict.fromkeys(value for eqn in whole for value in eqn.inputs)
        weights = tuple(value for value in read if self.analysis.is_weight(value))
        constants = {**program.constants, **self.analysis.traced.position_tables}
        sources = [value for value, _ in operands]
        note = str([end for _, end in operands])
        return Site(
            index=index,
            opening=self.analysis.openings[self.draft.pairing],
            equations=self.draft.equations,
            operands=operands,
            outputs=self.draft.outputs,
            weights=weights,
            ends=self.ends,
            key=structure_key(whole, [*sources, *weights], self.draft.outputs, constants, note),
        )

    def _key_side(self) -> int:
        """The key side of the pairing that closes the site; those it absorbed must agree."""
        known = self.analysis.key_sides
        found = {known[part] ^ flip for part, flip in self.draft.flips.items() if part in known}
        if len(found) != 1:
            where = self.analysis.openings[self.draft.pairing].where
            raise UnsupportedSiteError(f"the scores made at {where} are reduced over both of their token axes")
        return found.pop()

    def _ends(self, value: Value) -> Ends:
        def end(label: Any) -> End | None:
            if isinstance(label, Side):
                return "key" if label.side ^ self.draft.flips[label.pairing] == self.key_side else "query"
            return "query" if label is Axis.ROW else None

        return tuple(end(label) for label in self.analysis.facts[value].labels)

    def _operands(self) -> tuple[tuple[Value, End], ...]:
        found: dict[tuple[Value, End], None] = {}
        for eqn in self.draft.equations:
            for position, value in enumerate(eqn.inputs):
                entering = operand_ends(self.analysis, eqn, position, self.ends)
                if value in self.inside:
                    self._check_same_side(eqn, value, self.ends[value], entering)
                elif self.analysis.facts[value].kind is Kind.TOKEN:
                    end = row_end(self.analysis, value, entering)
                    found.update({(source, end): None for source in self._sources(value)})
        return tuple(found)

    def _check_same_side(self, eqn: Equation, value: Value, made: Ends, used: Ends) -> None:
        for label, end_made, end_used in zip(self.analysis.facts[value].labels, made, used, strict=True):
            if label is Axis.ROW and end_made != end_used:
                raise UnsupportedSiteError(
                    f"'{eqn.primitive}' at {eqn.where} brings a value reduced over the keys back on the {end_used} "
                    "side; only the query side is allowed"
                )

    def _sources(self, value: Value) -> list[Value]:
        """Where to take an operand from: before it was repeated along tokens, and at its smallest form."""
        eqn = self.analysis.made_by.get(value)
        if eqn is not None and Axis.UNIFORM in self.analysis.facts[value].labels:
            self.pulled.add(eqn)
            tokens = [each for each in eqn.inputs if self.analysis.facts[each].kind is Kind.TOKEN]
            return [source for each in tokens for source in self._sources(each)]
        smallest, passed, best = value, [], value
        while eqn is not None and eqn.primitive in SHAPE_ONLY:
            passed.append(eqn)
            smallest = eqn.inputs[0]
            if self._bytes(smallest) < self._bytes(best):
                best = smallest
                self.pulled.update(passed)
            eqn = self.analysis.made_by.get(smallest)
        return [best]

    def _bytes(self, value: Value) -> int:
        return row_bytes(value, self.analysis.traced.rows)


def operand_ends(analysis: Analysis, eqn: Equation, position: int, ends: Mapping[Value, Ends]) -> Ends:
    """The token axes of one operand of a member equation, as the equation uses them."""
    value, axes = eqn.inputs[position], axis_map(eqn)
    if value in ends and analysis.facts[value].sides:
        return ends[value]
    out_ends = ends.get(eqn.outputs[0], ())
    partner = dict(axes.paired) if position == 0 else {rhs: lhs for lhs, rhs in axes.paired}
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


def row_end(analysis: Analysis, value: Value, ends: Ends) -> End:
    """The side of the one axis along which a value has a row per query or per key."""
    for label, end in zip(analysis.facts[value].labels, ends, strict=True):
        if label is Axis.ROW and end is not None:
            return end
    raise AssertionError("the value has no token axis")
