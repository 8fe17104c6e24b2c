"""Arrays of constants with the number of tokens in their shape, as functions of position.

A model captures them while it is traced (a NumPy mask, say), or makes them of constants by operations that mix
positions (a scatter at `tril_indices`), which are run. Either way the array is had at two numbers of tokens and at the
largest; where the smaller ones are the first entries of the largest, its entries are looked up by position. One with
two token axes becomes equations: of a table by distance, if its entries depend on that alone, or a corner of the
largest.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from partition.errors import PartitionError, TraceError
from partition.evaluate import constant_value
from partition.jaxpr import Equation, Program, Value, live, trace_onto
from partition.rules import RUNNING, axis_map

# 2 GiB of float32; NumPy makes masks of ones of 8 bytes each.
_LARGEST_ENTRIES = 1 << 29


@dataclass(frozen=True, kw_only=True)
class Captured:
    """What was learned of captured arrays, each by its number among those of the program.

    tables: arrays with one token axis, at the largest number of rows.
    squares: of those with two, what makes them at any number of rows.
    """

    tables: Mapping[int, np.ndarray] = field(default_factory=dict)
    squares: Mapping[int, Callable[[int], jax.Array]] = field(default_factory=dict)

    def position_tables(self, program: Program) -> dict[Value, np.ndarray]:
        """The tables by value."""
        values = _arrays(program)
        return {values[number]: table for number, table in self.tables.items()}

    def resolved(self, program: Program, rows: int) -> Program:
        """The program with equations in place of the arrays with two token axes."""
        values, constants = _arrays(program), dict(program.constants)
        made: list[Equation] = []
        for number, make in self.squares.items():
            square = values[number]
            traced = trace_onto([], functools.partial(make, rows), _where(program, square))
            *others, last = traced.equations
            made += [*others, dataclasses.replace(last, outputs=(square,))]
            del constants[square]
            constants.update(traced.constants)
        return dataclasses.replace(program, equations=(*made, *program.equations), constants=constants)


def fold(program: Program, rows: int) -> Program:
    """The program with arrays in place of what mixes positions and is made of constants alone."""
    independent, constants = set(program.constants), dict(program.constants)
    for eqn in program.equations:
        if not independent.issuperset(eqn.inputs):
            continue
        independent.update(eqn.outputs)
        if _mixes(eqn, rows) and not _extends(eqn, rows):
            for value in (each for each in eqn.outputs if rows in each.shape):
                array = constant_value(value, program)
                assert array is not None
                constants[value] = array
    equations = [eqn for eqn in program.equations if constants.keys().isdisjoint(eqn.outputs)]
    return dataclasses.replace(program, equations=tuple(live(equations, program.outputs)), constants=constants)


def _mixes(eqn: Equation, rows: int) -> bool:
    if eqn.primitive in RUNNING:  # these are looked up by position anyway
        return False
    try:
        axes = axis_map(eqn)
    except PartitionError:
        return True
    return any(value.shape[axis] % rows == 0 for n, value in enumerate(eqn.inputs) for axis in axes.mixed_axes(n))


def _extends(eqn: Equation, rows: int) -> bool:
    """Whether a token axis gets further entries: what is made of it then is for `partition.extras` to split."""
    (made, *_) = (output.shape for output in eqn.outputs)
    return eqn.primitive in ("pad", "concatenate") and any(
        before == rows != after
        for value in eqn.inputs
        if value.shape
        for before, after in zip(value.shape, made, strict=True)
    )


def learn_captured(program_at: Callable[[int], Program], sizes: Sequence[int], max_rows: int) -> Captured:
    """What the arrays are that the model captures.

    Args:
      program_at: the folded program at a number of tokens.
      sizes: numbers of tokens to compare with the largest.

    Raises:
      TraceError: an entry differs between numbers of tokens, or the arrays at `max_rows` tokens are too large.
    """
    rows, program = sizes[0], program_at(sizes[0])
    used = {value for eqn in program.equations for value in eqn.inputs}
    asked = {n: value for n, value in enumerate(_arrays(program)) if rows in value.shape and value in used}
    if not asked:
        return Captured()
    _check_size(program, asked.values(), rows, max_rows)
    captured = {size: _captured(program_at(size)) for size in dict.fromkeys((*sizes, max_rows))}
    tables, squares = {}, {}
    for number, value in asked.items():
        axes = [axis for axis, size in enumerate(value.shape) if size == rows]
        array = _longest({size: each[number : number + 1] for size, each in captured.items()}, axes)
        if array is None or len(axes) > 2:
            raise TraceError(
                f"the array {value.shape} of constants that is used at {_where(program, value)} "
                f"is no function of one or two positions (at {', '.join(map(str, captured))} tokens); "
                "allowed: such a function, or what is made with jax.numpy inside the call"
            )
        if len(axes) == 1:
            tables[number] = array
        else:
            squares[number] = _by_distance(array, *axes) or _corner(array, *axes)
    return Captured(tables=tables, squares=squares)


def _arrays(program: Program) -> list[Value]:
    return [value for value in program.constants if value.shape]


def _captured(program: Program) -> list[np.ndarray]:
    return [np.asarray(program.constants[value]) for value in _arrays(program)]


def _where(program: Program, value: Value) -> str:
    return next(eqn.where for eqn in program.equations if value in eqn.inputs)


def _check_size(program: Program, values: Iterable[Value], rows: int, max_rows: int) -> None:
    """At max_rows tokens, where [max_rows, max_rows] may be more than there is memory."""
    needed = {value: math.prod(max_rows if n == rows else n for n in value.shape) for value in values}
    if sum(needed.values()) > _LARGEST_ENTRIES:
        largest = max(needed, key=lambda value: needed[value])
        raise TraceError(
            f"the model has arrays of constants, like {largest.shape} used at {_where(program, largest)}, "
            f"with {sum(needed.values())} entries for {max_rows} tokens; allowed: {_LARGEST_ENTRIES} entries, or masks "
            "made with jax.numpy inside the call"
        )


def _longest(found: Mapping[int, list[np.ndarray]], axes: Sequence[int]) -> np.ndarray | None:
    """The array of the largest number of rows, if those of the others are its first entries."""
    longest = found[max(found)]
    for size, arrays in found.items():
        if not arrays or not longest or arrays[0].ndim != longest[0].ndim:
            return None
        window = tuple(slice(size) if axis in axes else slice(None) for axis in range(arrays[0].ndim))
        first, array = longest[0][window], arrays[0]
        if first.dtype != array.dtype or not np.array_equal(first, array, equal_nan=array.dtype.kind in "fc"):
            return None
    return longest[0]


def _by_distance(array: np.ndarray, query: int, key: int) -> Callable[[int], jax.Array] | None:
    """An array whose entries depend on how far their two positions are apart, from a table of these."""
    square = np.moveaxis(array, (query, key), (0, 1))
    if not np.array_equal(square[1:, 1:], square[:-1, :-1], equal_nan=array.dtype.kind in "fc"):
        return None
    table = np.concatenate([square[0, :0:-1], square[:, 0]])  # of distances 1 - rows .. rows - 1
    nearest = len(square) - 1

    def make(rows: int) -> jax.Array:
        distance = jax.lax.iota(jnp.int32, rows)[:, None] - jax.lax.iota(jnp.int32, rows)
        return jnp.moveaxis(jnp.take(table, distance + nearest, axis=0, mode="clip"), (0, 1), (query, key))

    return make


def _corner(array: np.ndarray, query: int, key: int) -> Callable[[int], jax.Array]:
    """The first entries along two axes."""
    return lambda rows: jax.lax.slice_in_dim(jax.lax.slice_in_dim(array, 0, rows, axis=query), 0, rows, axis=key)
