"""Cuts the token-wise rest of the program into dense stages between the attention sites."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from partition.analysis import Analysis
from partition.errors import TokenMixingError, UnsupportedSiteError
from partition.jaxpr import Equation, Value
from partition.labels import Axis, Kind
from partition.layouts import Port
from partition.planned_site import PlannedSite
from partition.rules import SHAPE_ONLY
from partition.structure import closure, in_order_of_need, size_bytes, structure_key

_LARGEST_INLINE_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Send:
    """A value that leaves a stage for tier 2: what a site takes through one of its ports, by its index."""

    site: int
    index: int
    port: Port

    @property
    def value(self) -> Value:
        """What is sent, in the model's layout."""
        return self.port.value


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """One dense slice: (weights, tokens, positions, reads) -> (writes, sends).

    reads: token values made by earlier stages (the carry) or by a site (in the layout of its port).
    writes: token values that later stages read; they stay on tier 1.
    sends: what the sites behind this stage take.
    externals: weights, prepared weights and position tables, in order of first use.
    key: equal for stages that can share an executable.
    """

    index: int
    equations: tuple[Equation, ...]
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    sends: tuple[Send, ...]
    externals: tuple[Value, ...]
    key: str


def cut(analysis: Analysis, sites: Sequence[PlannedSite]) -> tuple[Stage, ...]:
    """Stages 0 .. len(sites); stage i may read the outputs of sites before i."""
    return _Cutter(analysis, sites).stages()


class _Cutter:
    def __init__(self, analysis: Analysis, sites: Sequence[PlannedSite]) -> None:
        self.analysis, self.sites = analysis, sites
        self.program = analysis.traced.program
        self.rows = analysis.traced.rows
        self.site_outputs = {port.value: (item, port) for item in sites for port in item.outputs}
        self.live = self._live_equations()
        self.stage_of = self._stage_of_values()
        self.sends = self._sends()

    def _stage_of_values(self) -> dict[Value, int]:
        found = {self.analysis.traced.tokens: 0}
        found.update({value: item.site.index + 1 for value, (item, _) in self.site_outputs.items()})
        for eqn in self.live:
            stage = max(found[value] for value in eqn.inputs if self.is_token(value))
            found.update(dict.fromkeys(eqn.outputs, stage))
        return found

    def is_token(self, value: Value) -> bool:
        return self.analysis.facts[value].kind is Kind.TOKEN

    def _sends(self) -> list[Send]:
        found = []
        for item in self.sites:
            for index, port in enumerate(item.inputs):
                if self.stage_of[port.value] > item.site.index:
                    raise UnsupportedSiteError(
                        f"the attention opened at {item.site.opening.where} takes {port.value.shape}, which needs its "
                        "own output or a later one's; allowed: what the layers before it give"
                    )
                found.append(Send(site=item.site.index, index=index, port=port))
        return found

    def stages(self) -> tuple[Stage, ...]:
        return tuple(self._stage(index, self.live) for index in range(len(self.sites) + 1))

    def _live_equations(self) -> list[Equation]:
        """Token equations that the logits and the sites need of the dense stages.

        Work whose result the model drops is not done. What stands between the reductions of a site and is needed
        behind it too (the weights of learned keys) is done in both.
        """
        needed = [*self.program.outputs, *(port.value for item in self.sites for port in item.inputs)]
        live = closure(
            needed, self.analysis.made_by, lambda value: self.is_token(value) and value not in self.site_outputs
        )
        return [eqn for eqn in self.program.equations if eqn in live]

    def _stage(self, index: int, live: Sequence[Equation]) -> Stage:
        mine = [eqn for eqn in live if self.stage_of[eqn.outputs[0]] == index]
        sends = tuple(send for send in self.sends if self.stage_of[send.value] == index)
        made = {value for eqn in mine for value in eqn.outputs}
        needed = [value for eqn in mine for value in eqn.inputs] + [send.value for send in sends]
        reads = _unique(
            value
            for value in needed
            if self.is_token(value) and value not in made and value is not self.analysis.traced.tokens
        )
        later = {value for eqn in live if self.stage_of[eqn.outputs[0]] > index for value in eqn.inputs}
        later |= {send.value for send in self.sends if self.stage_of[send.value] > index}
        later |= set(self.program.outputs)
        writes = tuple(value for eqn in mine for value in eqn.outputs if value in later)
        for value in writes:
            if Axis.ROW not in self.analysis.facts[value].labels:
                raise TokenMixingError(
                    f"{value.shape}, made at {self.analysis.made_by[value].where}, is needed behind an attention but "
                    "has no row per token; allowed: rows sorted by expert are put back before the next attention"
                )
        helpers, externals = self._support(needed)
        results = [*writes, *(send.value for send in sends)]
        equations = in_order_of_need(results, self.analysis.made_by, {*mine, *helpers})
        externals = self._in_order_of_use(equations, sends, externals)
        return Stage(
            index=index,
            equations=equations,
            reads=reads,
            writes=writes,
            sends=sends,
            externals=externals,
            key=self._key(equations, reads, writes, sends, externals),
        )

    def _in_order_of_use(
        self, equations: Sequence[Equation], sends: Sequence[Send], externals: set[Value]
    ) -> tuple[Value, ...]:
        used = [value for eqn in equations for value in eqn.inputs] + [send.value for send in sends]
        return _unique(value for value in used if value in externals)

    def _key(
        self,
        equations: Sequence[Equation],
        reads: Sequence[Value],
        writes: Sequence[Value],
        sends: Sequence[Send],
        externals: Sequence[Value],
    ) -> str:
        site_layouts = [self.site_outputs[value][1].layout if value in self.site_outputs else None for value in reads]
        note = f"{site_layouts} {[(send.index, send.port.layout) for send in sends]} {len(reads)} {len(externals)}"
        note += str([self.analysis.facts[value] for value in externals])
        traced = self.analysis.traced
        inputs = (traced.tokens, traced.positions, *reads, *externals)
        outputs = (*writes, *(send.value for send in sends))
        return structure_key(equations, inputs, outputs, self.program.constants, note)

    def _support(self, needed: Iterable[Value]) -> tuple[set[Equation], set[Value]]:
        """Equations on constants and positions to copy into the stage, and the values to look up instead."""
        helpers: set[Equation] = set()
        externals: set[Value] = set()
        stack = [value for value in needed if not self.is_token(value)]
        while stack:
            value = stack.pop()
            if self.is_external(value):
                externals.add(value)
            elif value in self.analysis.made_by and self.analysis.made_by[value] not in helpers:
                helpers.add(self.analysis.made_by[value])
                stack.extend(self.analysis.made_by[value].inputs)
        return helpers, externals

    def is_external(self, value: Value) -> bool:
        facts = self.analysis.facts[value]
        if self.analysis.is_weight(value):
            return True  # of stacked weights each layer takes its slice, and all the same executable
        if value in self.program.constants:
            return self.rows in value.shape or size_bytes(value) > _LARGEST_INLINE_BYTES
        if facts.kind is Kind.POSITION:
            return self._is_table(value)
        return self._is_prepared(value)

    def _is_table(self, value: Value) -> bool:
        """Worth a table: one row per position, computed by more than a change of shape."""
        eqn = self.analysis.made_by.get(value)
        if eqn is None or eqn.primitive in SHAPE_ONLY or eqn.primitive == "iota":
            return False
        labels = self.analysis.facts[value].labels
        return labels.count(Axis.ROW) == 1 and Axis.UNIFORM not in labels

    def _is_prepared(self, value: Value) -> bool:
        """Worth computing once: made from weights alone and no larger than they are.

        Pure changes of layout are left to the compiler, which folds them into the product that reads them: measured on
        XLA CPU, a product with a transposed weight is as fast, and a transposed copy of a tied embedding is large.
        """
        eqn = self.analysis.made_by.get(value)
        if eqn is not None and eqn.primitive == "take_layer":
            return True  # a layer's number, say: all layers share an executable
        if eqn is None or eqn.primitive in SHAPE_ONLY or not value.shape:
            return False
        if any(label is not Axis.PLAIN for label in self.analysis.facts[value].labels):
            return False
        leaves = closure_leaves(value, self.analysis)
        return 0 < size_bytes(value) <= sum(size_bytes(leaf) for leaf in leaves)


def closure_leaves(value: Value, analysis: Analysis) -> set[Value]:
    """The weights, or one layer's slices of them, that a constant value is made from."""
    equations = closure([value], analysis.made_by, lambda each: not analysis.is_weight(each))
    return {operand for eqn in equations for operand in eqn.inputs if analysis.is_weight(operand)}


def _unique(values: Iterable[Value]) -> tuple[Value, ...]:
    return tuple(dict.fromkeys(values))


def constants_of(analysis: Analysis) -> dict[Value, Any]:
    """Captured arrays, those with a token axis at the largest number of rows."""
    return {**analysis.traced.program.constants, **analysis.traced.position_tables}
