"""Models that give the logits of the last token alone: the same program for every token.

A model that takes the last row of what it has, before its head or behind it, computes from there on with that row and
nothing else. All before it is causal (or refused by the analysis), so what the model gives for a shorter prompt is the
same computation of an earlier row. The equations behind the slice are therefore mapped over the rows, one by one, and
the analysis judges a program that gives logits for each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partition.evaluate import constant_value
from partition.jaxpr import Equation, Program, Value, live, trace_onto
from partition.structure import producers


def every_row(program: Program, rows: int) -> Program:
    """The program with one row of logits per token, [rows, vocab], if it gives that of the last token only.

    A program that gives anything else is returned as it is, and refused later for what it does with the tokens.
    """
    if len(program.outputs) != 1 or any(size % rows == 0 for size in program.outputs[0].shape):
        return program
    tail = _find_tail(program, rows)
    return program if tail is None else _Mapper(program, rows, tail).program()


@dataclass(frozen=True, kw_only=True)
class _Tail:
    """taken: each value that is the last row of another, with that and its token axis. equations: what follows."""

    taken: dict[Value, tuple[Value, int]]
    equations: frozenset[Equation]


def _find_tail(program: Program, rows: int) -> _Tail | None:
    """What stands between the last rows and the output; None if anything else of the tokens gets there."""
    made_by = producers(program.equations)
    taken: dict[Value, tuple[Value, int]] = {}
    equations: set[Equation] = set()
    stack = list(program.outputs)
    while stack:
        value = stack.pop()
        eqn = made_by.get(value)
        source = _last_row_of(eqn, program, rows) if eqn is not None else None
        if source is not None:
            taken[value] = source
        elif any(size % rows == 0 for size in value.shape):
            return None
        elif eqn is not None and eqn not in equations:
            equations.add(eqn)
            stack.extend(eqn.inputs)
    return _Tail(taken=taken, equations=frozenset(equations)) if taken else None


def _last_row_of(eqn: Equation, program: Program, rows: int) -> tuple[Value, int] | None:
    """(operand, token axis), if the equation takes the last entry of that axis and all of the others."""
    if eqn.primitive not in _STARTS:
        return None
    (operand, *indices), shape = eqn.inputs, eqn.inputs[0].shape
    sizes = _taken_sizes(eqn)
    cut = [axis for axis, size in enumerate(shape) if size != sizes[axis]]
    if len(cut) != 1 or shape[cut[0]] != rows or sizes[cut[0]] != 1:
        return None
    constants = [constant_value(value, program) for value in indices]
    if any(each is None for each in constants):
        return None
    starts = _STARTS[eqn.primitive](eqn, constants)
    last = [rows - 1 if axis == cut[0] else 0 for axis in range(len(shape))]
    return (operand, cut[0]) if starts is not None and np.array_equal(starts, last) else None


def _taken_sizes(eqn: Equation) -> Sequence[int]:
    if eqn.primitive == "slice":
        return np.subtract(eqn.params["limit_indices"], eqn.params["start_indices"]).tolist()
    return eqn.params["slice_sizes"]


def _gather_starts(eqn: Equation, indices: Sequence[Any]) -> np.ndarray | None:
    """Where the one window of a gather begins; None if there are several."""
    numbers, (index,) = eqn.params["dimension_numbers"], indices
    if index.size != index.shape[-1]:
        return None
    starts = np.zeros(len(eqn.inputs[0].shape), int)
    starts[list(numbers.start_index_map)] = index.reshape(-1)
    return starts


# Where what an equation takes begins, of its constant indices.
_STARTS: dict[str, Callable[[Equation, Sequence[Any]], Any]] = {
    "slice": lambda eqn, _: eqn.params["start_indices"],
    "dynamic_slice": lambda _, indices: indices,
    "gather": _gather_starts,
}


class _Mapper:
    """Replaces the tail by the same equations with the rows as a first axis."""

    def __init__(self, program: Program, rows: int, tail: _Tail) -> None:
        self.source, self.rows, self.tail = program, rows, tail
        self.constants = dict(program.constants)
        self.equations: list[Equation] = []
        self.mapped: dict[Value, Value] = {}

    def program(self) -> Program:
        for eqn in self.source.equations:
            self.equations.append(eqn)
            taken = [value for value in eqn.outputs if value in self.tail.taken]
            if taken:
                operand, axis = self.tail.taken[taken[0]]
                shape = (self.rows, *taken[0].shape)
                self._add(eqn, lambda array, axis=axis, to=shape: [jnp.moveaxis(array, axis, 0).reshape(to)], [operand])
            elif eqn in self.tail.equations and any(value in self.mapped for value in eqn.inputs):
                axes = tuple(0 if value in self.mapped else None for value in eqn.inputs)
                operands = [self.mapped.get(value, value) for value in eqn.inputs]
                self._add(eqn, jax.vmap(lambda *row, eqn=eqn: eqn.evaluate(row), axes), operands)
        (output,) = self.source.outputs
        shape = (self.rows, output.shape[-1])
        last = producers(self.source.equations)[output]
        self._add(last, lambda array: [array.reshape(shape)], [self.mapped[output]])
        outputs = (self.mapped[output],)
        equations = tuple(live(self.equations, outputs))
        return dataclasses.replace(self.source, outputs=outputs, equations=equations, constants=self.constants)

    def _add(self, source: Equation, fn: Callable[..., Sequence[Any]], operands: Sequence[Value]) -> None:
        """The equations of `fn`, which gives the outputs of `source` for every row."""
        traced = trace_onto(operands, fn, source.where)
        self.constants.update(traced.constants)
        self.equations += traced.equations
        self.mapped.update(zip(source.outputs, traced.outputs, strict=True))
