"""Sorted expert dispatch: rows sorted by expert, multiplied group by group, and put back, are proven token-wise.

A dropless mixture of experts sorts its (token, choice) entries by expert, gathers the tokens in that order, multiplies
each run of rows by its expert's weights (`ragged_dot`), and undoes the order or adds each row to its token. No row sees
another, though the program moves them all. What proves it is kept here, beside the labels:

    a choice     a value whose elements are indices in [0, E), from top_k, whatever its shape
    an order     a permutation made by sorting a choice, with an axis label `Sorted` for rows in that order
    an index     a value that is a known function of the place in an order, in the unsorted entries, or of a choice: a
                 table, found by running its equations on 0, 1, 2 ...
    a count      how many entries chose each expert: the group sizes of rows in that order, of no other use
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from partition.errors import TokenMixingError
from partition.jaxpr import Equation, Value
from partition.labels import Axis, Facts, Grouped, Kind, Label, Sorted, grouped
from partition.rules import ELEMENTWISE, SHAPE_ONLY, axis_map, reshape_groups, resized_params
from partition.structure import producers
from partition.trace import Traced


@dataclass(frozen=True)
class _Base:
    """What an index counts: places in order `number`, unsorted entries of order `number`, or choices of `number`."""

    kind: Literal["place", "entry", "choice"]
    number: int


@dataclass(frozen=True)
class _Index:
    """Along `axis` the value at i is table[base value at i]; table has the base's size along that axis."""

    base: _Base
    axis: int
    table: np.ndarray


@dataclass(frozen=True)
class _Order:
    """entry: the label of the unsorted entries. choice: which choice they were sorted by."""

    entry: Label
    choice: int


class Dispatch:
    """Follows choices, orders, indices and counts through the program.

    orderings: sort equations whose second operand numbers the entries of the call.
    """

    def __init__(self, traced: Traced, facts: Mapping[Value, Facts]) -> None:
        self.traced, self.facts = traced, facts
        self.made_by = producers(traced.program.equations)
        self.orderings: set[Equation] = set()
        self._choices: dict[Value, int] = {}
        self._experts: list[int] = []
        self._orders: list[_Order] = []
        self._indices: dict[Value, _Index] = {}
        self._counts: dict[Value, int] = {}

    def step(self, eqn: Equation) -> list[tuple[Label, ...]] | None:
        """Labels of the outputs, if the equation is part of a dispatch; None leaves it to the rules.

        Raises:
          TokenMixingError: counts of experts are used for something else than the sizes of their groups.
        """
        step = getattr(self, "_" + eqn.primitive.replace("-", "_"), None)
        found = step(eqn) if step is not None else None
        if found is None and (eqn.primitive in ELEMENTWISE or eqn.primitive in SHAPE_ONLY):
            found = self._fold(eqn)
        if found is None and any(value in self._counts for value in eqn.inputs):
            raise TokenMixingError(
                f"'{eqn.primitive}' at {eqn.where} uses how many tokens chose each expert; allowed: as the group sizes "
                "of ragged_dot over rows sorted by expert. Experts of limited capacity let tokens compete: refused"
            )
        return found

    def is_choice(self, value: Value) -> bool:
        """Is it made from choices of experts alone (one-hot, say)?"""
        index = self._indices.get(value)
        return value in self._choices or (index is not None and index.base.kind == "choice")

    def _iota(self, eqn: Equation) -> list[tuple[Label, ...]] | None:
        """Numbers of several entries per token."""
        shape, axis, rows = eqn.outputs[0].shape, eqn.params["dimension"], self.traced.rows
        if shape[axis] == rows or shape[axis] % rows:
            return None
        labels: list[Label] = [Axis.PLAIN if size % rows else Axis.UNIFORM for size in shape]
        labels[axis] = Axis.ENTRY
        return [tuple(labels)]

    def _top_k(self, eqn: Equation) -> None:
        """The second output is a choice; the rule says the rest."""
        self._choose(eqn, eqn.outputs[1], eqn.inputs[0].shape[-1])

    def _argmax(self, eqn: Equation) -> None:
        self._choose(eqn, eqn.outputs[0], eqn.inputs[0].shape[eqn.params["axes"][0]])

    def _choose(self, eqn: Equation, chosen: Value, experts: int) -> None:
        if self.facts[eqn.inputs[0]].kind is Kind.TOKEN:
            self._choices[chosen] = len(self._experts)
            self._experts.append(experts)

    def _sort(self, eqn: Equation) -> list[tuple[Label, ...]] | None:
        if len(eqn.inputs) != 2 or eqn.params["num_keys"] != 1:
            return None
        keys, numbers = eqn.inputs
        made = self.made_by.get(numbers)
        if made is None or made.primitive != "iota" or made.params["dimension"] != eqn.params["dimension"]:
            return None
        if self.facts[keys].labels[eqn.params["dimension"]] is Axis.PLAIN:
            return self._choose(eqn, eqn.outputs[1], keys.shape[eqn.params["dimension"]])
        index = self._index(keys)
        return self._order(eqn, index) if index is not None and _is_identity(index) else None

    def _order(self, eqn: Equation, index: _Index) -> list[tuple[Label, ...]] | None:
        """Entries sorted by their choice, or places by their entry, which undoes that."""
        self.orderings.add(eqn)
        if index.base.kind == "choice":
            number = len(self._orders)
            self._orders.append(_Order(entry=self.facts[eqn.inputs[0]].labels[0], choice=index.base.number))
            made, label = _Base("place", number), Sorted(number)
        elif index.base.kind == "place":
            made, label = _Base("entry", index.base.number), self._orders[index.base.number].entry
        else:
            return None
        self._indices[eqn.outputs[1]] = _Index(made, 0, np.arange(eqn.outputs[1].shape[0]))
        return [(label,)] * 2

    def _gather(self, eqn: Equation) -> list[tuple[Label, ...]] | None:
        """Rows taken in an order, or put back from it."""
        operand, indices = eqn.inputs
        numbers = eqn.params["dimension_numbers"]
        index = self._row_index(indices)
        if index is None or len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
            return None
        (taken,) = numbers.start_index_map
        if tuple(numbers.collapsed_slice_dims) != (taken,) or eqn.params["slice_sizes"][taken] != 1:
            return None
        label = self._moved(self.facts[operand].labels[taken], index)
        axes = axis_map(eqn).to_output
        others = [(axis, out) for axis, out in enumerate(axes[0]) if axis != taken]
        if label is None or any(out is None for _, out in others):
            return None
        labels: list[Label] = [Axis.PLAIN] * len(eqn.outputs[0].shape)
        labels[next(out for out in axes[1] if out is not None)] = label
        for axis, out in others:
            labels[out or 0] = self.facts[operand].labels[axis]
        return [tuple(labels)]

    def _moved(self, source: Label, index: _Index) -> Label | None:
        """The label of rows taken from an axis with label `source`; None if they are not the token's own."""
        order = self._orders[index.base.number]
        if index.base.kind == "entry":
            return order.entry if source == Sorted(index.base.number) and _is_identity(index) else None
        return Sorted(index.base.number) if self._points_home(index, source) else None

    def _points_home(self, index: _Index, axis: Label) -> bool:
        """Does each place point into an axis of tokens at the very token of the entry that is sorted there?"""
        entries, targets = _entries(self._orders[index.base.number].entry), _entries(axis)
        places = np.arange(len(index.table))
        return targets > 0 and np.array_equal(index.table // targets, places // entries)

    def _scatter_add(self, eqn: Equation) -> list[tuple[Label, ...]] | None:
        """Sorted rows added to their tokens; or ones added up by choice: a count."""
        operand, indices, updates = eqn.inputs
        if self._is_count(eqn):
            return [(Axis.PLAIN,)]
        index, numbers = self._row_index(indices), eqn.params["dimension_numbers"]
        if index is None or index.base.kind != "place" or tuple(numbers.inserted_window_dims) != (0,):
            return None
        if tuple(numbers.scatter_dims_to_operand_dims) != (0,) or self.facts[updates].labels[0] != Sorted(
            index.base.number
        ):
            return None
        window = tuple(range(1, len(updates.shape)))
        if tuple(numbers.update_window_dims) != window or operand.shape[0] % self.traced.rows:
            return None
        label = grouped(operand.shape[0] // self.traced.rows)
        if self.facts[operand].labels[0] not in (Axis.UNIFORM, label) or not self._points_home(index, label):
            return None
        return [(label, *self.facts[updates].labels[1:])]

    def _is_count(self, eqn: Equation) -> bool:
        operand, indices, updates = eqn.inputs
        index = self._row_index(indices)
        if index is None or index.base.kind != "choice" or not _is_identity(index):
            return False
        start, ones = (self._constant(value) for value in (operand, updates))
        if start is None or ones is None or start.any() or (ones != 1).any() or len(start) != len(index.table):
            return False
        self._counts[eqn.outputs[0]] = index.base.number
        return True

    def _reduce_sum(self, eqn: Equation) -> list[tuple[Label, ...]] | None:
        """A one-hot choice summed over its entries: a count."""
        index = self._indices.get(eqn.inputs[0])
        if index is None or index.base.kind != "choice" or tuple(eqn.params["axes"]) != (index.axis,):
            return None
        if not np.array_equal(np.moveaxis(index.table, index.axis, 0), np.eye(len(index.table))):
            return None
        self._counts[eqn.outputs[0]] = index.base.number
        return [(Axis.PLAIN,)]

    def _ragged_dot_general(self, eqn: Equation) -> list[tuple[Label, ...]] | None:
        """Rows sorted by expert, in groups that the same choice counts: each meets its expert's weights."""
        lhs, rhs, sizes = eqn.inputs[:3]
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        (contract, _), (batch, _) = numbers.dot_dimension_numbers
        labels = self.facts[lhs].labels
        ragged = tuple(numbers.lhs_ragged_dimensions)
        if len(ragged) != 1 or batch or ragged[0] in contract or not isinstance(labels[ragged[0]], Sorted):
            return None
        order = self._orders[labels[ragged[0]].order]
        plain = all(label is Axis.PLAIN for label in self.facts[rhs].labels)
        if self._counts.get(sizes) != order.choice or not plain or len(eqn.inputs) != 3:
            return None
        kept = [label for axis, label in enumerate(labels) if axis not in contract]
        return [tuple(kept) + (Axis.PLAIN,) * (len(eqn.outputs[0].shape) - len(kept))]

    def _fold(self, eqn: Equation) -> list[tuple[Label, ...]] | None:
        """An operation on one index and constants gives an index; on a choice or a count that it copies, the same."""
        source = eqn.inputs[0]
        if eqn.primitive in SHAPE_ONLY and source in self._counts and eqn.outputs[0].shape == source.shape:
            self._counts[eqn.outputs[0]] = self._counts[source]
            return [(Axis.PLAIN,)]
        if eqn.primitive in ("reshape", "squeeze", "convert_element_type", "transpose") and source in self._choices:
            self._choices[eqn.outputs[0]] = self._choices[source]
            return None
        indices = {value: self._index(value) for value in eqn.inputs}
        known = [index for index in indices.values() if index is not None]
        if not known or len({(index.base, index.axis) for index in known}) > 1:
            return None
        if known[0].base.kind == "choice" and any(value in self.traced.counts for value in eqn.inputs):
            return None
        position = next(i for i, value in enumerate(eqn.inputs) if indices[value] is not None)
        axis = axis_map(eqn).to_output[position][known[0].axis]
        size = known[0].table.shape[known[0].axis]
        args = [index.table if index is not None else self._constant(value, size) for value, index in indices.items()]
        if axis is None or any(arg is None for arg in args):
            return None
        by_value = dict(zip(indices, args, strict=True))
        table = _run(eqn, [by_value[value] for value in eqn.inputs], axis, size)
        self._indices[eqn.outputs[0]] = _Index(known[0].base, axis, table)
        label = self.facts[eqn.inputs[position]].labels[known[0].axis]
        labels: list[Label] = [Axis.PLAIN] * len(eqn.outputs[0].shape)
        labels[axis] = label
        return [tuple(labels)]

    def _index(self, value: Value) -> _Index | None:
        if value in self._choices and len(value.shape) == 1:
            number = self._choices[value]
            return _Index(_Base("choice", number), 0, np.arange(self._experts[number]))
        return self._indices.get(value)

    def _row_index(self, indices: Value) -> _Index | None:
        """The index of [N, 1] start indices, as a table [base size]."""
        index = self._index(indices)
        if index is None or index.axis != 0 or indices.shape[1:] != (1,):
            return None
        return _Index(index.base, 0, index.table[:, 0])

    def _constant(self, value: Value, size: int | None = None) -> np.ndarray | None:
        """What a constant is, axes along which it is constant cut to `size`; None if it depends on weights or rows."""
        facts = self.facts[value]
        if facts.kind is not Kind.CONSTANT or value in self.traced.weights:
            return None
        if value in self.traced.program.constants:
            return np.asarray(self.traced.program.constants[value])
        eqn = self.made_by[value]
        args = [self._constant(each, size) for each in eqn.inputs]
        if any(arg is None for arg in args) or any(label not in (Axis.PLAIN, Axis.UNIFORM) for label in facts.labels):
            return None
        axes = [axis for axis, label in enumerate(facts.labels) if label is Axis.UNIFORM]
        if len(axes) > 1:
            return None
        return _run(eqn, [arg for arg in args if arg is not None], axes[0] if axes else None, size)


def _run(eqn: Equation, args: Sequence[Any], axis: int | None, size: int | None) -> np.ndarray:
    """The equation's first output with `size` entries along `axis`."""
    shape = list(eqn.outputs[0].shape)
    if axis is not None and size is not None:
        shape[axis] = size
    return np.asarray(eqn.evaluate(args, resized_params(eqn, tuple(shape)))[0])


def _is_identity(index: _Index) -> bool:
    return index.table.ndim == 1 and np.array_equal(index.table, np.arange(len(index.table)))


def _entries(label: Label) -> int:
    """Entries of each token along an axis; 0 where they are in no order of tokens."""
    return label.entries if isinstance(label, Grouped) else int(label is Axis.ROW)


def regrouped(eqn: Equation, labels: Sequence[Label], rows: int) -> tuple[Label, ...] | None:
    """Labels after a reshape that merges a token axis with the axes behind it, or splits it again.

    None if it does anything else with a token axis.
    """
    target = eqn.outputs[0].shape
    found: list[Label] = [Axis.PLAIN] * len(target)
    for ins, outs in reshape_groups(eqn.inputs[0].shape, target):
        if all(labels[axis] is Axis.PLAIN for axis in ins):
            continue
        first = labels[ins[0]]
        if len(ins) == len(outs) == 1:
            found[outs[0]] = first
        elif any(labels[axis] is not Axis.PLAIN for axis in ins[1:]) or target[outs[0]] % rows:
            return None
        elif first is Axis.UNIFORM or _entries(first):
            found[outs[0]] = grouped(target[outs[0]] // rows)
        else:
            return None
    return tuple(found)
