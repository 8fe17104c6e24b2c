"""Loops over chunks of the tokens: which axes count chunks, and which count the entries of a chunk.

Flash attention written in JAX pads the keys to whole chunks, and scans over these with a running maximum, sum and
accumulator. If chunks may have any size, so may the first be all there is. Here axes get the label of what they become
then; `join` builds the program in which they are that.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import replace

import jax.numpy as jnp

from partition.errors import PartitionError
from partition.jaxpr import Equation, Loop, Value
from partition.rules import AxisMap, axis_map, reshape_groups


class Size(enum.Enum):
    """What the entries of an axis become when one chunk holds all tokens."""

    ONE = "it counts chunks"
    ALL = "it counts the tokens of a chunk, or all of them and padding"


Sizes = tuple[Size | None, ...]

# These make an axis of tokens longer or shorter.
CUTTING = frozenset({"pad", "concatenate", "slice", "dynamic_slice", "dynamic_update_slice"})


class LostError(Exception):
    """An equation does not keep chunks apart, or does more with them than is known here; never leaves the package."""


class Chunks:
    """Labels of values, made while the program is (a `jaxpr.LoopJudge`).

    labels: of values with an axis that changes when chunks are joined.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.labels: dict[Value, Sizes] = {}
        self._counters: dict[Value, frozenset[int]] = {}
        self._depth: list[int] = []
        self._loops = 0
        self._over_chunks: set[int] = set()

    def of(self, value: Value) -> Sizes:
        """One label per axis."""
        return self.labels.get(value, (None,) * len(value.shape))

    def enter(self, operands: Sequence[Value], inputs: Sequence[Value], num_constants: int, num_carry: int) -> None:
        """A scan begins: its step's inputs have the labels of the operands; what numbers its steps is a counter."""
        self._loops += 1
        self._depth.append(self._loops)
        for index, (operand, value) in enumerate(zip(operands, inputs, strict=True)):
            is_entry, counters = index >= num_constants + num_carry, self._counters.get(operand, frozenset())
            self._set(value, self.of(operand)[1:] if is_entry else self.of(operand))
            if index >= num_constants and not value.shape and jnp.issubdtype(value.dtype, jnp.integer):
                counters |= {self._loops}
            if counters:
                self._counters[value] = counters

    def leave(self, operands: Sequence[Value], loop: Loop) -> bool:
        """Did the scan run over chunks?"""
        entries = operands[loop.num_constants + loop.num_carry :]
        return self._depth.pop() in self._over_chunks or any(self.of(value)[0] is Size.ONE for value in entries)

    def follow(self, eqn: Equation) -> None:
        """Label what an equation makes."""
        counters = frozenset().union(*(self._counters.get(value, frozenset()) for value in eqn.inputs))
        if counters and not eqn.outputs[0].shape:
            self._counters.update(dict.fromkeys(eqn.outputs, counters))
        if eqn.loop is not None:
            self._follow_loop(eqn, eqn.loop)
            return
        try:
            labels = self._labels(eqn)
        except (LostError, PartitionError):  # the analysis says why, if it is of no use
            return
        for value in eqn.outputs:
            self._set(value, labels)

    def _follow_loop(self, eqn: Equation, loop: Loop) -> None:
        for index, (value, made) in enumerate(zip(eqn.outputs, loop.body.outputs, strict=True)):
            self._set(value, self.of(made) if index < loop.num_carry else (Size.ONE, *self.of(made)))

    def _set(self, value: Value, labels: Sizes) -> None:
        if any(labels):
            self.labels[value] = labels

    def _labels(self, eqn: Equation) -> Sizes:
        if eqn.primitive == "reshape":
            return self._reshaped(eqn)
        axes = self.axes(eqn)
        found: list[Size | None] = [None] * len(eqn.outputs[0].shape)
        for index, targets in enumerate(axes.to_output):
            for axis, out in enumerate(targets):
                label = self.label_in(eqn, index, axis, out)
                if label is not None and axis in axes.mixed_axes(index):
                    raise LostError
                if label is not None and out is not None:
                    if found[out] not in (None, label):
                        raise LostError
                    found[out] = label
        sizes = self.settled(found, eqn.outputs[0])
        if any(sizes) and eqn.primitive in ("dynamic_slice", "dynamic_update_slice"):
            starts = frozenset().union(*(self._counters.get(value, frozenset()) for value in eqn.inputs))
            self._over_chunks.update(starts)
        return sizes

    def label_in(self, eqn: Equation, index: int, axis: int, out: int | None) -> Size | None:
        """What an operand's axis brings: padding begins with tokens, and a chunk may be cut out of them."""
        value = eqn.inputs[index]
        is_resized = out is not None and value.shape[axis] != eqn.outputs[0].shape[out]
        if is_resized and eqn.primitive in CUTTING and value.shape[axis] == self.rows:
            return Size.ALL
        return self.of(value)[axis]

    def settled(self, labels: Sequence[Size | None], value: Value) -> Sizes:
        """An axis of exactly the tokens stays as it is."""
        return tuple(
            None if label is Size.ALL and size == self.rows else label
            for label, size in zip(labels, value.shape, strict=True)
        )

    def axes(self, eqn: Equation) -> AxisMap:
        """`axis_map`, in which axes of tokens pass through padding, and through cutting chunks out and putting them in.

        Raises:
          LostError: it does other things too.
        """
        if eqn.primitive == "dynamic_update_slice":
            axes = tuple(range(len(eqn.inputs[0].shape)))
            return AxisMap(to_output=((None,) * len(axes), axes, *((),) * len(axes)))
        axes = axis_map(eqn)
        if eqn.primitive not in CUTTING:
            return axes
        changed = axes.mixed_axes(0)
        tokens = {axis for axis in changed if self._is_cut(eqn, axis)}
        first = tuple(axis if axis in tokens else out for axis, out in enumerate(axes.to_output[0]))
        return replace(axes, to_output=(first, *axes.to_output[1:]), mixed=(changed - tokens, *axes.mixed[1:]))

    def _is_cut(self, eqn: Equation, axis: int) -> bool:
        """Does the first operand's axis of tokens begin with, or give, the result's?"""
        if self.of(eqn.inputs[0])[axis] is not Size.ALL and eqn.inputs[0].shape[axis] != self.rows:
            return False
        if eqn.primitive == "pad":
            low, high, between = eqn.params["padding_config"][axis]
            return low == 0 and high > 0 and between == 0
        if eqn.primitive == "concatenate":
            return all(value.shape[axis] % self.rows for value in eqn.inputs[1:])
        if eqn.primitive == "slice":
            is_whole = eqn.outputs[0].shape[axis] == self.rows
            return is_whole and eqn.params["start_indices"][axis] == 0 and not eqn.params["strides"]
        return eqn.inputs[1 + axis] in self._counters

    def groups(self, eqn: Equation) -> list[tuple[list[int], list[int]]]:
        """Runs of axes of a reshape that become each other."""
        return reshape_groups(eqn.inputs[0].shape, eqn.outputs[0].shape)

    def _reshaped(self, eqn: Equation) -> Sizes:
        (source, *_), made = eqn.inputs, eqn.outputs[0]
        labels = self.of(source)
        found: list[Size | None] = [None] * len(made.shape)
        for ins, outs in self.groups(eqn):
            is_tokens = len(ins) == 1 and (labels[ins[0]] is Size.ALL or source.shape[ins[0]] == self.rows)
            if len(ins) == len(outs) == 1:
                found[outs[0]] = labels[ins[0]]
            elif is_tokens and len(outs) == 2:
                found[outs[0]], found[outs[1]] = Size.ONE, Size.ALL
            elif len(ins) == 2 and len(outs) == 1 and [labels[axis] for axis in ins] == [Size.ONE, Size.ALL]:
                found[outs[0]] = Size.ALL
            elif any(labels[axis] for axis in ins):
                raise LostError
        return self.settled(found, made)
