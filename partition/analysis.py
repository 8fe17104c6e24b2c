"""Abstract interpretation over the token axis: which axes follow the tokens, and where two of them meet.

Every value gets a kind (what it depends on) and one label per axis; see `labels`.

Where two token axes meet a pairing opens (scores; a mask made from token ids); where a reduction over one of its sides,
the key side, gives ROW again, it closes. A pairing that meets a later one in the same two axes is absorbed by it: a
score absorbs its mask. Anything else that would combine, move or drop rows is refused, so the rest is token-wise.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from partition.dispatch import Dispatch, regrouped
from partition.errors import TokenMixingError, TraceError, UnsupportedSiteError
from partition.jaxpr import Equation, Value
from partition.labels import Axis, Facts, Kind, Label, Side, is_row
from partition.rules import RUNNING, AxisMap, axes_by_position, axis_map
from partition.structure import closure, producers
from partition.trace import Traced, depends_on_count


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """Facts of every value, and of every pairing.

    openings: per pairing the equation where its token axes met.
    key_sides: per pairing that was reduced, its key side (0 or 1).
    absorbed: absorbed[p][q]: pairing p took in q; its side i is q's side i (0) or 1 - i (1).
    orderings: equations that sort the entries of a call: their second operand numbers these.
    """

    traced: Traced
    facts: dict[Value, Facts]
    openings: tuple[Equation, ...]
    key_sides: dict[int, int]
    absorbed: dict[int, dict[int, int]]
    orderings: frozenset[Equation]

    @functools.cached_property
    def made_by(self) -> dict[Value, Equation]:
        """The equation that makes each value."""
        return producers(self.traced.program.equations)

    @functools.cached_property
    def users(self) -> dict[Value, list[Equation]]:
        """The equations that read each value."""
        found: dict[Value, list[Equation]] = {}
        for eqn in self.traced.program.equations:
            for value in eqn.inputs:
                found.setdefault(value, []).append(eqn)
        return found

    def is_weight(self, value: Value) -> bool:
        """A parameter, or one layer's slice of stacked ones."""
        eqn = self.made_by.get(value)
        if eqn is None or eqn.primitive != "take_layer" or self.facts[value].kind is not Kind.CONSTANT:
            return value in self.weights
        made_of = closure([value], self.made_by, lambda _: True)
        return any(operand in self.weights for each in made_of for operand in each.inputs)

    @functools.cached_property
    def weights(self) -> frozenset[Value]:
        """The parameters."""
        return frozenset(self.traced.weights)


def analyse(traced: Traced) -> Analysis:
    """Label every value of the program, and so prove all but the attention sites token-wise.

    Raises:
      TokenMixingError: an equation outside attention combines, moves or drops rows.
      UnsupportedPrimitiveError: a primitive without a rule meets a token axis.
      UnsupportedSiteError: an attention operator that has no single key side.
    """
    interpreter = _Interpreter(traced)
    for eqn in traced.program.equations:
        interpreter.step(eqn)
    return interpreter.result()


class _Interpreter:
    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self.rows = traced.rows
        self.running: list[Value] = []
        self.openings: list[Equation] = []
        self.key_sides: dict[int, int] = {}
        self.absorbed: dict[int, dict[int, int]] = {}
        self.facts: dict[Value, Facts] = {}
        self.dispatch = Dispatch(traced, self.facts)
        for value in traced.weights:
            self.facts[value] = Facts(Kind.CONSTANT, (Axis.PLAIN,) * len(value.shape))
        self.facts[traced.tokens] = Facts(Kind.TOKEN, self._by_size(traced.tokens))
        self.facts[traced.positions] = Facts(Kind.POSITION, self._by_size(traced.positions))
        for value in traced.program.constants:
            kind = Kind.POSITION if self.rows in value.shape else Kind.CONSTANT
            self.facts[value] = Facts(kind, self._by_size(value))

    def _by_size(self, value: Value) -> tuple[Label, ...]:
        return tuple(Axis.ROW if size == self.rows else Axis.PLAIN for size in value.shape)

    def result(self) -> Analysis:
        for value in self.traced.program.outputs:
            if self.facts[value].labels.count(Axis.ROW) != 1 or self.facts[value].kind is not Kind.TOKEN:
                raise TokenMixingError(f"the logits {value.shape} are not one row per token")
        return Analysis(
            traced=self.traced.with_tables(self.running),
            facts=self.facts,
            openings=tuple(self.openings),
            key_sides=self.key_sides,
            absorbed=self.absorbed,
            orderings=frozenset(self.dispatch.orderings),
        )

    def step(self, eqn: Equation) -> None:
        operands = [self.facts[value] for value in eqn.inputs]
        kind = max((facts.kind for facts in operands), default=Kind.CONSTANT)
        found = self.dispatch.step(eqn)
        if found is not None:
            self.facts.update({value: Facts(kind, labels) for value, labels in zip(eqn.outputs, found, strict=True)})
            return
        self._refuse_counting(eqn, operands)
        if self._is_plain(eqn, operands):
            labels = None
        else:
            counted = axes_by_position(eqn, self.rows) if kind is not Kind.TOKEN else frozenset()
            kind = max(kind, Kind.POSITION) if counted else kind
            labels = self._transfer(eqn, operands, kind, counted)
            self._check_table(eqn, labels, counted)
        for value in eqn.outputs:
            self.facts[value] = Facts(kind, (Axis.PLAIN,) * len(value.shape) if labels is None else labels)

    def _refuse_counting(self, eqn: Equation, operands: list[Facts]) -> None:
        numbers = any(Axis.ENTRY in facts.labels for facts in operands)
        if numbers or any(value in self.traced.counts for value in eqn.inputs):
            raise depends_on_count(eqn)

    def _is_plain(self, eqn: Equation, operands: list[Facts]) -> bool:
        """Nothing but weights and constants, and no token axis: any primitive will do."""
        touches = any(label is not Axis.PLAIN for facts in operands for label in facts.labels)
        makes = any(size % self.rows == 0 for value in eqn.outputs for size in value.shape)
        return not touches and not makes and all(facts.kind is Kind.CONSTANT for facts in operands)

    def _transfer(self, eqn: Equation, operands: list[Facts], kind: Kind, counted: frozenset[int]) -> tuple[Label, ...]:
        if eqn.primitive == "reshape" and (labels := regrouped(eqn, operands[0].labels, self.rows)) is not None:
            return labels
        axes = axis_map(eqn)
        self._refuse_mixing(eqn, operands, axes, counted)
        self._close_sites(eqn, operands, axes)
        labels, token_rows = self._join(eqn, operands, axes)
        for axis in counted:
            labels[axis] = Axis.ROW
        self._refuse_new_rows(eqn, axes, counted)
        return self._settle(eqn, labels, token_rows, kind)

    def _check_table(self, eqn: Equation, labels: tuple[Label, ...], counted: frozenset[int]) -> None:
        """Tables reach as far as sequences do; a running sum can only be looked up if it has one token axis."""
        longest = self.traced.max_rows
        if counted and eqn.primitive == "slice":
            entries = min(eqn.inputs[0].shape[axis] - eqn.params["start_indices"][axis] for axis in counted)
            if entries < longest:
                raise TraceError(
                    f"the model has {entries} positions in the table {eqn.inputs[0].shape} that it slices at "
                    f"{eqn.where}; allowed: sequences of at most {entries} tokens, not {longest}"
                )
        elif counted and eqn.primitive in RUNNING:
            if sum(label is not Axis.PLAIN for label in labels) > 1:
                raise _mixes(eqn, "sums up a value with two token axes")
            self.running.append(eqn.outputs[0])

    def _refuse_mixing(self, eqn: Equation, operands: list[Facts], axes: AxisMap, counted: frozenset[int]) -> None:
        for index, facts in enumerate(operands):
            # What is made by position keeps its rank, so an axis of an operand is that of the output.
            if any(facts.labels[axis] is not Axis.PLAIN for axis in axes.mixed_axes(index) - counted):
                raise _mixes(eqn, "moves, drops or combines rows along the token axis" + self._hint(eqn.inputs[index]))

    def _hint(self, value: Value) -> str:
        if self.dispatch.is_choice(value):
            return "; experts of limited capacity let tokens compete"
        if all(size % self.rows for each in self.traced.program.outputs for size in each.shape):
            return "; logits of one token must be made of the last row alone"
        return ""

    def _refuse_new_rows(self, eqn: Equation, axes: AxisMap, counted: frozenset[int]) -> None:
        """An axis over the tokens comes from one of an operand, from positions, or from repeating a value."""
        if eqn.primitive in ("broadcast_in_dim", "iota"):
            return
        known = {out for targets in axes.to_output for out in targets} | counted
        new = [axis for axis, size in enumerate(eqn.outputs[0].shape) if size % self.rows == 0 and axis not in known]
        if new:
            raise _mixes(eqn, "makes one row per token out of what has none")

    def _close_sites(self, eqn: Equation, operands: list[Facts], axes: AxisMap) -> None:
        paired: set[tuple[int, int]] = set()
        for lhs, rhs in axes.paired:
            paired |= {(0, lhs), (1, rhs)}
            self._close_pair(eqn, operands, operands[0].labels[lhs], operands[1].labels[rhs])
        for index, facts in enumerate(operands):
            for axis in axes.reduced_axes(index):
                if (index, axis) in paired or facts.labels[axis] is Axis.PLAIN:
                    continue
                self._reduce_side(eqn, facts.labels[axis])

    def _close_pair(self, eqn: Equation, operands: list[Facts], lhs: Label, rhs: Label) -> None:
        if lhs is Axis.PLAIN and rhs is Axis.PLAIN:
            return
        sides = [label for label in (lhs, rhs) if isinstance(label, Side)]
        if len(sides) != 1:
            raise _mixes(eqn, "contracts the token axis outside an attention site")
        self._reduce_side(eqn, sides[0])

    def _reduce_side(self, eqn: Equation, label: Label) -> None:
        if not isinstance(label, Side):
            raise _mixes(eqn, "reduces over the token axis")
        if self.key_sides.setdefault(label.pairing, label.side) != label.side:
            raise UnsupportedSiteError(
                f"'{eqn.primitive}' at {eqn.where} reduces the scores made at {self.openings[label.pairing].where} "
                "over their query side; only reductions over the keys are allowed"
            )

    def _join(self, eqn: Equation, operands: list[Facts], axes: AxisMap) -> tuple[list[Label], set[int]]:
        shape = eqn.outputs[0].shape
        labels: list[Label] = [Axis.PLAIN if size % self.rows else Axis.UNIFORM for size in shape]
        token_rows: set[int] = set()
        for facts, targets in zip(operands, axes.to_output, strict=True):
            for label, out in zip(facts.labels, targets, strict=True):
                if out is None or label in (Axis.PLAIN, Axis.UNIFORM):
                    continue
                labels[out] = self._join_label(eqn, labels[out], label)
                if facts.kind is Kind.TOKEN:
                    token_rows.add(out)
        return labels, token_rows

    def _join_label(self, eqn: Equation, old: Label, new: Label) -> Label:
        if is_row(old) and is_row(new) and old != new:
            raise _mixes(eqn, "combines rows in different orders")
        if not isinstance(old, Side) or not isinstance(new, Side):
            return old if isinstance(old, Side) else new
        if old == new:
            return old
        later, earlier = (old, new) if old.pairing > new.pairing else (new, old)
        flip = later.side ^ earlier.side
        known = self.absorbed.setdefault(later.pairing, {}).setdefault(earlier.pairing, flip)
        if later.pairing == earlier.pairing or known != flip:
            raise UnsupportedSiteError(f"'{eqn.primitive}' at {eqn.where} combines scores with their transpose")
        return later

    def _settle(self, eqn: Equation, labels: list[Label], token_rows: set[int], kind: Kind) -> tuple[Label, ...]:
        """One token axis: a row. Two: a pairing, a new one if neither is a side yet. More: refused."""
        rows = [axis for axis, label in enumerate(labels) if is_row(label)]
        sides = [label for label in labels if isinstance(label, Side)]
        if kind is not Kind.TOKEN or len(rows) + len(sides) <= 1:
            return tuple(Axis.ROW if isinstance(label, Side) else label for label in labels)
        if not sides and [labels[axis] for axis in rows] == [Axis.ROW] * 2 and token_rows.intersection(rows):
            labels[rows[0]], labels[rows[1]] = Side(len(self.openings), 0), Side(len(self.openings), 1)
            self.openings.append(eqn)
            return tuple(labels)
        if len(sides) == 2 and not rows and sides[0].pairing == sides[1].pairing:
            return tuple(labels)
        raise _mixes(eqn, "lets more than one token axis meet other than as the scores of one attention site")


def _mixes(eqn: Equation, what: str) -> TokenMixingError:
    shapes = ", ".join(str(value.shape) for value in eqn.inputs)
    return TokenMixingError(
        f"'{eqn.primitive}' of {shapes} at {eqn.where} {what}; outside attention every operation must be token-wise"
    )
