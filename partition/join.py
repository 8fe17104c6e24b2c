"""Joins the chunks of a loop over the tokens: the program in which one chunk holds them all, where that is the same.

An online softmax over chunks of keys is, in exact arithmetic, the softmax over all keys, however long the chunks are.
So the first step of such a loop, resized to all tokens, stands for the loop. That is not so for every loop; whether it
is, is established by running both: what leaves the chunks must come out the same. Where it does not, or where that
cannot be built, the loop stays, and the analysis refuses it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from partition.chunks import CUTTING, Chunks, LostError, Size, Sizes
from partition.comparison import are_close, draw, evaluated
from partition.errors import PartitionError, TokenMixingError
from partition.jaxpr import Equation, Loop, Program, Value, live
from partition.rules import resized_params
from partition.structure import closure, producers, structure_key

_COMPARISONS = frozenset({"lt", "le", "gt", "ge"})


def join_chunks(program: Program, rows: int) -> Program:
    """The same program with chunks of its `rows` tokens joined, where that changes nothing.

    Args:
      program: its last input is 0, 1, 2 ... for positions; the others are weights and token ids.

    Raises:
      TokenMixingError: a loop over chunks is not the same as that.
    """
    chunks = _labelled(program, rows)
    if not chunks.labels:
        return program
    joiner = _Joiner(program, chunks)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        for eqn in program.equations:
            joiner.step(eqn)
    outputs = tuple(joiner.now.get(value, value) for value in program.outputs)
    equations = tuple(live(joiner.equations, outputs))
    for eqn in equations:
        if eqn.loop is not None:
            raise TokenMixingError(
                f"'scan' at {eqn.where} takes {eqn.loop.length} steps over chunks of the tokens, and gives something "
                "else than one chunk of all of them would; allowed: loops that only sum up over keys, as an online "
                "softmax does"
            )
    return dataclasses.replace(program, outputs=outputs, equations=equations, constants=joiner.constants)


def _labelled(program: Program, rows: int) -> Chunks:
    chunks = Chunks(rows)

    def follow(equations: Sequence[Equation]) -> None:
        for eqn in equations:
            if eqn.loop is not None:
                chunks.enter(eqn.inputs, eqn.loop.body.inputs, eqn.loop.num_constants, eqn.loop.num_carry)
                follow(eqn.loop.body.equations)
                chunks.leave(eqn.inputs, eqn.loop)
            chunks.follow(eqn)

    follow(program.equations)
    return chunks


class _Joiner:
    """equations: of the new program. now: what stands there for a value of the old one."""

    def __init__(self, program: Program, chunks: Chunks) -> None:
        self.program, self.chunks, self.positions = program, chunks, program.inputs[-1]
        self.constants = dict(program.constants)
        self.equations: list[Equation] = []
        self.now: dict[Value, Value] = {}
        self._changed: set[Value] = set()
        self._made_by: dict[Value, Equation] = {}
        self._entering: dict[Value, tuple[Value, Equation | None]] = {}
        self._twins: dict[tuple[Value, Sizes], Value] = {}
        self._is_same: dict[str, bool] = {}
        self._from_input = set(program.inputs[:-1])
        self._used = {value for eqn in program.equations for value in eqn.inputs} | set(program.outputs)

    def step(self, eqn: Equation) -> None:
        """The equation as it is and, where what it makes has no axis of chunks any more, as it is of joined ones."""
        self._made_by.update(dict.fromkeys(eqn.outputs, eqn))
        if not self._from_input.isdisjoint(eqn.inputs):
            self._from_input.update(eqn.outputs)
        if eqn.loop is not None:
            self._look_into(eqn, eqn.loop)
        self.equations.append(
            dataclasses.replace(eqn, inputs=tuple(self.now.get(value, value) for value in eqn.inputs))
        )
        labelled = [value for value in eqn.outputs if value in self.chunks.labels]
        if labelled or not self._changed.isdisjoint(eqn.inputs):
            self._changed.update(eqn.outputs)
            for value in eqn.outputs:
                if value not in labelled and value in self._used:
                    self._join(value)

    def _look_into(self, eqn: Equation, loop: Loop) -> None:
        """Notes where the values of a step come from."""
        for index, (operand, value) in enumerate(zip(eqn.inputs, loop.body.inputs, strict=True)):
            is_entry = index >= loop.num_constants + loop.num_carry
            self._entering[value] = operand, eqn if is_entry else None
        for each in loop.body.equations:
            self._made_by.update(dict.fromkeys(each.outputs, each))
            self._changed.update(each.outputs)  # a step is nowhere but in its loop
            if each.loop is not None:
                self._look_into(each, each.loop)

    def _join(self, value: Value) -> None:
        try:
            twin = self._made_again(value, (None,) * len(value.shape))
            is_same = self._check(value, twin)
        except (LostError, PartitionError):
            is_same = False
        if is_same:
            self.now[value] = twin
        self._changed.discard(value)

    def _twin(self, value: Value, sizes: Sizes) -> Value:
        """The value as it is when one chunk holds all tokens, axes resized by their labels."""
        if value in self.constants or (value not in self._changed and value not in self._entering and not any(sizes)):
            if any(sizes):
                raise LostError
            return self.now.get(value, value)
        if (value, sizes) not in self._twins:
            self._twins[(value, sizes)] = self._made_again(value, sizes)
        return self._twins[(value, sizes)]

    def _made_again(self, value: Value, sizes: Sizes) -> Value:
        if value in self._entering:
            operand, scan = self._entering[value]
            if scan is None:
                return self._twin(operand, sizes)
            return self._reshape(scan, self._twin(operand, (Size.ONE, *sizes)), lambda shape: shape[1:])
        eqn = self._made_by.get(value)
        if eqn is None:
            raise LostError
        index = eqn.outputs.index(value)
        if eqn.loop is not None:
            made = eqn.loop.body.outputs[index]
            if index < eqn.loop.num_carry:
                return self._twin(made, sizes)
            if sizes[0] is not Size.ONE:
                raise LostError
            return self._reshape(eqn, self._twin(made, sizes[1:]), lambda shape: (1, *shape))
        if eqn.primitive == "take_layer" and self.chunks.of(eqn.inputs[0])[0] is None and eqn.inputs[0].shape[0] == 1:
            return self._reshape(eqn, self._twin(eqn.inputs[0], (None, *sizes)), lambda shape: shape[1:])
        if eqn.primitive == "reshape":
            source = self._twin(eqn.inputs[0], self._unshaped(eqn, sizes))
            return self._reshape(eqn, source, lambda _: self._resized(value, sizes))
        return self._resize(eqn, index, sizes)

    def _resize(self, eqn: Equation, index: int, sizes: Sizes) -> Value:
        axes = self.chunks.axes(eqn)
        wanted = [self._wanted(eqn, position, sizes) for position in range(len(eqn.inputs))]
        for position, each in enumerate(wanted):
            if any(each[axis] for axis in axes.mixed_axes(position)):
                raise LostError
        made = eqn.outputs[index]
        for position, value in enumerate(eqn.inputs):
            # Without chunks there is nothing to pad, and nothing to cut out.
            is_kept = axes.to_output[position] == tuple(range(len(made.shape)))
            if eqn.primitive in CUTTING and is_kept and value.shape != made.shape:
                if self._resized(value, wanted[position]) != self._resized(made, sizes):
                    raise LostError
                return self._twin(value, wanted[position])
        args = tuple(self._twin(value, each) for value, each in zip(eqn.inputs, wanted, strict=True))
        shape = self._resized(made, sizes)
        twin = self._emit(eqn, args, [self._resized(value, sizes) for value in eqn.outputs], resized_params(eqn, shape))
        return self._without_padding(twin.outputs[index], twin)

    def _wanted(self, eqn: Equation, position: int, sizes: Sizes) -> Sizes:
        """The labels of an operand when the result has `sizes`."""
        value, axes = eqn.inputs[position], self.chunks.axes(eqn)
        known = self.chunks.of(value)
        partner = dict(axes.paired) if position == 0 else {rhs: lhs for lhs, rhs in axes.paired}
        found = []
        for axis, out in enumerate(axes.to_output[position]):
            label = known[axis]
            if out is not None and value.shape[axis] == eqn.outputs[0].shape[out]:
                label = label or sizes[out]
            elif eqn.primitive in CUTTING and out is not None and self._is_all(eqn.outputs[0], sizes, out):
                label = None if value.shape[axis] == self.chunks.rows else Size.ALL
            elif axis in partner:
                label = label or self.chunks.of(eqn.inputs[1 - position])[partner[axis]]
            found.append(label)
        return tuple(found)

    def _is_all(self, value: Value, sizes: Sizes, axis: int) -> bool:
        return sizes[axis] is Size.ALL or value.shape[axis] == self.chunks.rows

    def _unshaped(self, eqn: Equation, sizes: Sizes) -> Sizes:
        """The labels of what is reshaped; an axis of chunks and one of their entries come from, or give, one axis."""
        found = list(self.chunks.of(eqn.inputs[0]))
        for ins, outs in self.chunks.groups(eqn):
            labels = [sizes[axis] for axis in outs]
            is_all = len(outs) == 1 and self._is_all(eqn.outputs[0], sizes, outs[0])
            if len(ins) == len(outs) == 1:
                found[ins[0]] = found[ins[0]] or labels[0]
            elif labels == [Size.ONE, Size.ALL] and len(ins) == 1:
                found[ins[0]] = Size.ALL
            elif is_all and len(ins) == 2:
                found[ins[0]], found[ins[1]] = Size.ONE, Size.ALL
            elif any(labels) or any(found[axis] for axis in ins):
                raise LostError
        return self.chunks.settled(found, eqn.inputs[0])

    def _resized(self, value: Value, sizes: Sizes) -> tuple[int, ...]:
        by_label = {Size.ONE: 1, Size.ALL: self.chunks.rows}
        return tuple(size if label is None else by_label[label] for size, label in zip(value.shape, sizes, strict=True))

    def _reshape(self, source: Equation, value: Value, shape: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Value:
        new = shape(value.shape)
        params = {"new_sizes": new, "dimensions": None, "sharding": None}
        eqn = dataclasses.replace(source, primitive="reshape", bind=jax.lax.reshape_p.bind, loop=None)
        return self._emit(eqn, (value,), [new], params, dtype=value.dtype).outputs[0]

    def _emit(
        self,
        source: Equation,
        inputs: tuple[Value, ...],
        shapes: Sequence[tuple[int, ...]],
        params: Mapping[str, Any],
        dtype: Any = None,
    ) -> Equation:
        made = [
            Value(shape, value.dtype if dtype is None else dtype)
            for shape, value in zip(shapes, source.outputs, strict=False)
        ]
        eqn = dataclasses.replace(source, inputs=inputs, outputs=tuple(made), params=params)
        self.equations.append(eqn)
        return eqn

    def _without_padding(self, value: Value, eqn: Equation) -> Value:
        """'Is this a token, or padding?' is true of every token, however many there are."""
        ends = (self.chunks.rows, self.chunks.rows - 1)
        numbers = [self.constants[each] for each in eqn.inputs if each in self.constants and not each.shape]
        if eqn.primitive not in _COMPARISONS or not any(number in ends for number in numbers):
            return value
        needed = closure([value], producers(self.equations), lambda _: True)
        if any(each in self._from_input for one in needed for each in one.inputs):
            return value
        if not evaluated(value, self.equations, {**self.constants, self.positions: self._numbered()}).all():
            return value
        true = Value((), value.dtype)
        self.constants[true] = np.True_
        params = {"shape": value.shape, "broadcast_dimensions": ()}
        again = dataclasses.replace(eqn, primitive="broadcast_in_dim", bind=jax.lax.broadcast_in_dim)
        return self._emit(again, (true,), [value.shape], params).outputs[0]

    def _numbered(self) -> np.ndarray:
        return np.arange(self.chunks.rows, dtype=np.int32).reshape(self.positions.shape)

    def _check(self, value: Value, twin: Value) -> bool:
        """Are they the same for random rows?"""
        region = closure([value], self._made_by, lambda each: each in self._changed)
        old = [eqn for eqn in self.program.equations if eqn in region]
        sources = dict.fromkeys(each for eqn in old for each in eqn.inputs if each not in self._changed)
        drawn = [each for each in sources if each in self._from_input]
        key = structure_key(old, list(sources), [value], self.constants, str([each in drawn for each in sources]))
        if key not in self._is_same:
            self._is_same[key] = self._compare(value, old, twin, drawn)
        return self._is_same[key]

    def _compare(self, value: Value, old: Sequence[Equation], twin: Value, drawn: Sequence[Value]) -> bool:
        stand_ins = {self.now[each]: each for each in drawn if each in self.now}

        def both(arrays: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
            env = {**self.constants, self.positions: self._numbered(), **dict(zip(drawn, arrays, strict=True))}
            env |= {new: env[each] for new, each in stand_ins.items()}
            return evaluated(value, self.program.equations, env), evaluated(twin, self.equations, env)

        random = np.random.default_rng(0)
        return are_close(*jax.jit(both)([draw(random, each) for each in drawn]))
