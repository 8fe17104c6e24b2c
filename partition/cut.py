"""Cuts the token-wise rest of the program into dense stages between the attention sites."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from partition.analysis import Analysis
from partition.cost import carry_flops, flops
from partition.crossing import cheapest_crossing
from partition.errors import UnsupportedSiteError
from partition.jaxpr import Equation, Value
from partition.labels import Axis, Kind
from partition.layouts import Port
from partition.planned_site import PlannedSite
from partition.rules import SHAPE_ONLY
from partition.structure import closure, in_order_of_need, producers, size_bytes, structure_key

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

    equations: those of the sends first, in the order of these.
    repeated: those of the equations that an earlier stage computes too, rather than keep what they make.
    reads: token values made by earlier stages (the carry) or by a site (in the layout of its port).
    writes: token values that later stages read; they stay on tier 1.
    carried: what must stay alive on tier 1 across the site behind this stage: writes, and what was kept before.
    sends: what the sites behind this stage take; for each site what it does not cache (q) first.
    externals: weights, prepared weights and position tables, in order of first use.
    key: equal for stages that can share an executable.
    """

    index: int
    equations: tuple[Equation, ...]
    repeated: tuple[Equation, ...]
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    carried: tuple[Value, ...]
    sends: tuple[Send, ...]
    externals: tuple[Value, ...]
    key: str

    def equations_until(self, values: Iterable[Value]) -> int:
        """How many of the equations are done when all of `values` are made."""
        wanted = set(values)
        made = [number for number, eqn in enumerate(self.equations, 1) if not wanted.isdisjoint(eqn.outputs)]
        return max(made, default=0)


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
        self.own, self.carried = self._assigned()

    def _stage_of_values(self) -> dict[Value, int]:
        """The first stage in which each value can be made."""
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
            for index in item.sent:
                port = item.inputs[index]
                if self.stage_of[port.value] > item.site.index:
                    raise UnsupportedSiteError(
                        f"the attention opened at {item.site.opening.where} takes {port.value.shape}, which needs its "
                        "own output or a later one's; allowed: what the layers before it give"
                    )
                found.append(Send(site=item.site.index, index=index, port=port))
        return sorted(found, key=lambda send: (send.site, send.port.is_cached, send.index))

    def _assigned(self) -> tuple[list[set[Equation]], list[frozenset[Value]]]:
        """Per stage its equations on tokens, and what is carried across the site behind it; from the last stage back.

        A send leaves from the first stage that can make it, and its equations belong there.
        """
        own: list[set[Equation]] = [set() for _ in range(len(self.sites) + 1)]
        carried = [frozenset[Value]()] * len(own)
        made_by = producers(self.live)
        for index in reversed(range(len(own))):
            wanted = [*carried[index], *(send.value for send in self.sends if self.stage_of[send.value] == index)]
            wanted += self.program.outputs if index == len(self.sites) else ()
            own[index] = self._made_from(wanted, lambda value: self.stage_of[value] == index)  # noqa: B023
            if index == 0:
                break
            read = {value for eqn in own[index] for value in eqn.inputs} | set(wanted)
            crossing = cheapest_crossing(
                [value for value in read if self.is_token(value) and self.stage_of[value] < index],
                made_by,
                self._made_from([send.value for send in self.sends if self.stage_of[send.value] < index]),
                carry_cost=self._carry_cost,
                cost=flops,
            )
            own[index] |= crossing.behind
            carried[index - 1] = crossing.carried
        return own, carried

    def _made_from(self, values: Iterable[Value], wanted: Callable[[Value], bool] = lambda _: True) -> set[Equation]:
        """Equations on tokens that lead to `values`, back to where sites give something."""
        return closure(
            values,
            self.analysis.made_by,
            lambda value: self.is_token(value) and value not in self.site_outputs and wanted(value),
        )

    def _carry_cost(self, value: Value) -> int | None:
        if not self.is_token(value) or value is self.analysis.traced.tokens:
            return 0
        labels = self.analysis.facts[value].labels
        has_rows = labels.count(Axis.ROW) == 1 and all(label in (Axis.ROW, Axis.PLAIN) for label in labels)
        return carry_flops(value) if has_rows else None

    def stages(self) -> tuple[Stage, ...]:
        return tuple(self._stage(index) for index in range(len(self.sites) + 1))

    def _live_equations(self) -> list[Equation]:
        """Token equations that the logits and the sites need of the dense stages.

        Work whose result the model drops is not done. What stands between the reductions of a site and is needed
        behind it too (the weights of learned keys) is done in both.
        """
        live = self._made_from([*self.program.outputs, *(port.value for item in self.sites for port in item.inputs)])
        return [eqn for eqn in self.program.equations if eqn in live]

    def _stage(self, index: int) -> Stage:
        mine = [eqn for eqn in self.live if eqn in self.own[index]]
        before = set[Equation]().union(*self.own[:index])
        sends = tuple(send for send in self.sends if self.stage_of[send.value] == index)
        made = {value for eqn in mine for value in eqn.outputs}
        needed = [value for eqn in mine for value in eqn.inputs] + [send.value for send in sends]
        is_read = lambda value: self.is_token(value) and value not in made  # noqa: E731
        reads = _unique(v for v in needed if is_read(v) and v is not self.analysis.traced.tokens)
        kept = self.program.outputs if index == len(self.sites) else self.carried[index]
        writes = tuple(value for eqn in mine for value in eqn.outputs if value in kept)
        helpers, externals = self._support(needed)
        results = [*(send.value for send in sends), *writes]
        equations = in_order_of_need(results, self.analysis.made_by, {*mine, *helpers})
        externals = self._in_order_of_use(equations, sends, externals)
        return Stage(
            index=index,
            equations=equations,
            repeated=tuple(eqn for eqn in equations if eqn in before),
            reads=reads,
            writes=writes,
            carried=tuple(value for value in self.stage_of if value in self.carried[index]),
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
