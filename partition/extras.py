"""Attention sinks as models write them: an axis of the tokens and some extra entries is split into its parts.

A column of learned logits beside the scores, or learned keys and values beside those of the tokens, give axes of T + n
entries. What is made of such an axis is made of its parts instead: entry by entry of each by itself; a sum (maximum,
product ...) over it is the sum of those over the parts; a slice that cuts at a part's ends is that part. These are
identities, whatever the operands are, so the analysis judges the parts as it judges anything else. A value that is
needed whole stays whole, and the analysis refuses the concatenation or padding that it begins with.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partition.errors import PartitionError
from partition.jaxpr import Equation, Program, Value, live
from partition.rules import axis_map, resized_params

# Reductions over an axis: how the results of its parts make that of the whole.
_COMBINED_BY: dict[str, tuple[str, Callable[..., Any]]] = {
    "dot_general": ("add", jnp.add),
    "reduce_and": ("and", jnp.bitwise_and),
    "reduce_max": ("max", jnp.maximum),
    "reduce_min": ("min", jnp.minimum),
    "reduce_or": ("or", jnp.bitwise_or),
    "reduce_prod": ("mul", jnp.multiply),
    "reduce_sum": ("add", jnp.add),
}


def split_extras(program: Program, rows: int) -> Program:
    """The same program with axes of `rows` tokens and extra entries split, where nothing needs them whole."""
    splitter = _Splitter(program, rows)
    for eqn in program.equations:
        splitter.step(eqn)
    equations = tuple(live(splitter.equations, program.outputs))
    return dataclasses.replace(program, equations=equations, constants=splitter.constants)


@dataclass(frozen=True)
class _Split:
    """A value is its `parts`, one behind the other along `axis`."""

    axis: int
    parts: tuple[Value, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(part.shape[self.axis] for part in self.parts)


class _NeededWhole(Exception):
    """An equation is not made of the parts of its operands; never leaves this file."""


class _Splitter:
    def __init__(self, program: Program, rows: int) -> None:
        self.rows = rows
        self.constants = dict(program.constants)
        self.made_by: dict[Value, Equation] = {}
        self.splits: dict[Value, _Split] = {}
        self.equations: list[Equation] = []

    def step(self, eqn: Equation) -> None:
        """The equation, or what replaces it; beside it its parts, of which `live` keeps what is used."""
        self.made_by.update(dict.fromkeys(eqn.outputs, eqn))
        try:
            self._begin(eqn)
            replaced = self._follow(eqn)
        except (_NeededWhole, PartitionError):  # the analysis says why, if it is of no use
            replaced = False
        if not replaced:
            self.equations.append(eqn)

    def _begin(self, eqn: Equation) -> None:
        """Notes the parts of a concatenation or padding that puts extra entries beside those of the tokens."""
        if eqn.primitive == "concatenate":
            split = _Split(int(eqn.params["dimension"]), eqn.inputs)
        elif eqn.primitive == "pad" and (axis := _padded_axis(eqn)) is not None:
            split = _Split(axis, self._padding(eqn, axis))
        else:
            return
        if len(split.parts) > 1 and [size for size in split.sizes if size % self.rows == 0] == [self.rows]:
            self.splits[eqn.outputs[0]] = split

    def _padding(self, eqn: Equation, axis: int) -> tuple[Value, ...]:
        operand, filler = eqn.inputs
        low, high, _ = map(int, eqn.params["padding_config"][axis])

        def fill(size: int) -> list[Value]:
            if not size:
                return []
            shape = _with_size(operand.shape, axis, size)
            params = {"shape": shape, "broadcast_dimensions": ()}
            return [self._emit(eqn, "broadcast_in_dim", jax.lax.broadcast_in_dim, [filler], shape, params)]

        return (*fill(low), operand, *fill(high))

    def _follow(self, eqn: Equation) -> bool:
        """Is the equation replaced by one of the parts? If its result has such an axis too, its parts are noted."""
        index = next((index for index, value in enumerate(eqn.inputs) if value in self.splits), None)
        if index is None or eqn.outputs[0] in self.splits:
            return False
        split, axes = self.splits[eqn.inputs[index]], axis_map(eqn)
        out = axes.to_output[index][split.axis]
        if out is not None:
            self.splits[eqn.outputs[0]] = _Split(out, self._by_parts(eqn, out, split.sizes))
            return False
        if eqn.primitive == "slice":
            self._cut(eqn, split)
        elif split.axis in axes.reduced_axes(index) and eqn.primitive in _COMBINED_BY:
            self._reduce(eqn, index, split)
        else:
            raise _NeededWhole
        return True

    def _by_parts(self, eqn: Equation, axis: int, sizes: Sequence[int]) -> tuple[Value, ...]:
        """The parts of the result along an axis that it has of its operands, or that is made by repeating."""
        if len(eqn.outputs) != 1:
            raise _NeededWhole
        if eqn.primitive == "iota" and eqn.params["dimension"] == axis:
            return self._count(eqn, axis, sizes)
        sources = [
            # Entry by entry, an axis of size 1 goes with every entry of the others.
            targets.index(axis) if axis in targets and value.shape[targets.index(axis)] != 1 else None
            for value, targets in zip(eqn.inputs, axis_map(eqn).to_output, strict=True)
        ]
        if all(source is None for source in sources) and eqn.primitive not in ("broadcast_in_dim", "iota"):
            raise _NeededWhole
        operands = [
            (value,) * len(sizes) if source is None else self._parts_of(value, source, sizes)
            for value, source in zip(eqn.inputs, sources, strict=True)
        ]
        shapes = [_with_size(eqn.outputs[0].shape, axis, size) for size in sizes]
        return tuple(
            self._emit(eqn, eqn.primitive, eqn.bind, [each[n] for each in operands], shape, resized_params(eqn, shape))
            for n, shape in enumerate(shapes)
        )

    def _parts_of(self, value: Value, axis: int, sizes: Sequence[int]) -> tuple[Value, ...]:
        """Of a value that meets one with such an axis: the mask, say, or a number repeated for every score."""
        if value not in self.splits:
            if value not in self.made_by:
                raise _NeededWhole
            self.splits[value] = _Split(axis, self._by_parts(self.made_by[value], axis, sizes))
        split = self.splits[value]
        if split.axis != axis or split.sizes != tuple(sizes):
            raise _NeededWhole
        return split.parts

    def _count(self, eqn: Equation, axis: int, sizes: Sequence[int]) -> tuple[Value, ...]:
        """0, 1, 2 ... along the axis. Behind the tokens the numbers depend on how many there are."""
        if sizes[-1] != self.rows or not jnp.issubdtype(eqn.outputs[0].dtype, jnp.integer):
            raise _NeededWhole
        found = []
        for size, before in zip(sizes, itertools.accumulate(sizes, initial=0), strict=False):
            shape = _with_size(eqn.outputs[0].shape, axis, size)
            part = self._emit(eqn, "iota", eqn.bind, [], shape, resized_params(eqn, shape))
            if before:
                offset = Value((), part.dtype)
                self.constants[offset] = np.asarray(before, part.dtype)
                part = self._emit(eqn, "add", jnp.add, [part, offset], shape, {})
            found.append(part)
        return tuple(found)

    def _cut(self, eqn: Equation, split: _Split) -> None:
        """A slice of exactly one part."""
        start, limit = (eqn.params[name][split.axis] for name in ("start_indices", "limit_indices"))
        starts = list(itertools.accumulate(split.sizes, initial=0))
        strides = eqn.params["strides"]
        part = next((n for n, size in enumerate(split.sizes) if (starts[n], starts[n] + size) == (start, limit)), None)
        if part is None or (strides and strides[split.axis] != 1):
            raise _NeededWhole
        params = {
            **eqn.params,
            "start_indices": _with_size(eqn.params["start_indices"], split.axis, 0),
            "limit_indices": _with_size(eqn.params["limit_indices"], split.axis, limit - start),
        }
        self.equations.append(dataclasses.replace(eqn, inputs=(split.parts[part],), params=params))

    def _reduce(self, eqn: Equation, index: int, split: _Split) -> None:
        operands = [split.parts]
        if eqn.primitive == "dot_general":
            partner = next(pair[1 - index] for pair in axis_map(eqn).paired if pair[index] == split.axis)
            operands.insert(1 - index, self._parts_of(eqn.inputs[1 - index], partner, split.sizes))
        shape = eqn.outputs[0].shape
        first, *others = (
            self._emit(eqn, eqn.primitive, eqn.bind, parts, shape, eqn.params) for parts in zip(*operands, strict=True)
        )
        name, combine = _COMBINED_BY[eqn.primitive]
        for other in others:
            first = self._emit(eqn, name, combine, [first, other], shape, {})
        last = self.equations.pop()
        self.equations.append(dataclasses.replace(last, outputs=eqn.outputs))

    def _emit(
        self,
        source: Equation,
        primitive: str,
        bind: Callable[..., Any],
        inputs: Sequence[Value],
        shape: tuple[int, ...],
        params: Mapping[str, Any],
    ) -> Value:
        """The result of a new equation at the model's line of `source`."""
        made = Value(shape, source.outputs[0].dtype)
        self.equations.append(
            dataclasses.replace(
                source, primitive=primitive, bind=bind, inputs=tuple(inputs), outputs=(made,), params=params
            )
        )
        return made


def _with_size(sizes: Sequence[int], axis: int, size: int) -> tuple[int, ...]:
    return (*sizes[:axis], size, *sizes[axis + 1 :])


def _padded_axis(eqn: Equation) -> int | None:
    """The one axis that gets entries in front or behind, and none in between."""
    padded = [axis for axis, amounts in enumerate(eqn.params["padding_config"]) if any(amounts)]
    if len(padded) != 1:
        return None
    low, high, between = eqn.params["padding_config"][padded[0]]
    return padded[0] if low >= 0 and high >= 0 and not between else None
