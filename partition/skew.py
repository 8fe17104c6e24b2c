"""Scores of relative positions as Transformer-XL makes them: products with a table by distance, skewed into place.

A query's products with the rows of a table, the farthest distance first, are [T, T]; padding, reshaping and slicing
moves row t by T - 1 - t places, so that entry s is the product for distance t - s. What lands above the diagonal is of
other queries, and masked. Both are read by running: how the entries move, and that the row of a distance is the same
for any number of tokens. The products are then made with the table's row of each distance instead. Above the diagonal
stands a number that outweighs all scores, so that a model that does not mask it is found not to be causal.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from partition.jaxpr import Equation, Program, Value, live, trace_onto
from partition.rules import ELEMENTWISE, axis_map
from partition.structure import closure, producers

_MOVES = frozenset({"pad", "concatenate", "reshape", "slice", "squeeze", "broadcast_in_dim", "transpose"})
_STARTS = frozenset({"pad", "concatenate"})
_BETWEEN = frozenset({*ELEMENTWISE, "reshape", "squeeze", "transpose"})
_ABOVE_DIAGONAL = 100.0


@dataclass(frozen=True, kw_only=True)
class _Product:
    """value [.., T, .., T, ..] = `between` of a product of queries and a table; axes: those of queries and table rows.

    asks: which operand of the product holds the queries.
    """

    value: Value
    axes: tuple[int, int]
    eqn: Equation
    asks: int
    between: tuple[Equation, ...]

    @property
    def table(self) -> Value:
        return self.eqn.inputs[1 - self.asks]


@dataclass(frozen=True, kw_only=True)
class _Skew:
    """result[.., t, .., s, ..] = product[.., t, .., T - 1 - t + s, ..] where s <= t; axes: of t and s in the result."""

    product: _Product
    result: Equation
    axes: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Skews:
    """tables: the program that makes the table of each skew, of the largest number of rows; None without skews."""

    tables: Program | None = None

    def resolved(self, program: Program, rows: int) -> Program:
        """The program with the products of its skews made by distance."""
        skews = _find(program, rows) if self.tables is not None else []
        if self.tables is None or len(skews) != len(self.tables.outputs):
            return program
        tables = {skew.result: (skew, table) for skew, table in zip(skews, self.tables.outputs, strict=True)}
        constants = {**program.constants, **self.tables.constants}
        same = dict(zip(self.tables.inputs, program.inputs, strict=True))
        equations = [
            dataclasses.replace(eqn, inputs=tuple(same.get(value, value) for value in eqn.inputs))
            for eqn in self.tables.equations
        ]
        for eqn in program.equations:
            if eqn in tables:
                made = _by_distance(*tables[eqn], rows)
                constants.update(made.constants)
                *others, last = made.equations
                equations += [*others, dataclasses.replace(last, outputs=eqn.outputs)]
            else:
                equations.append(eqn)
        return dataclasses.replace(program, equations=tuple(live(equations, program.outputs)), constants=constants)


def learn_skews(program_at: Callable[[int], Program], sizes: Sequence[int], max_rows: int) -> Skews:
    """The skews of a model whose tables are by distance; the padding of any other stays, and is refused.

    Args:
      program_at: the model's own program at a number of tokens.
      sizes: numbers of tokens to compare with the largest.
    """
    count = len(_find(program_at(sizes[0]), sizes[0]))
    if not count or any(len(_find(program_at(rows), rows)) != count for rows in sizes[1:]):
        return Skews()
    tables = {rows: _tables(program_at(rows), rows) for rows in (*sizes, max_rows)}
    arrays = {rows: _by_first_axis(program_at(rows), each) for rows, each in tables.items()}
    most = arrays[max_rows]
    if any(len(each) != len(most) or not all(map(_is_first_of, each, most)) for each in arrays.values()):
        return Skews()
    longest = program_at(max_rows)
    outputs = tuple(value for value, _ in tables[max_rows])
    equations = tuple(live(longest.equations, outputs))
    used = {value for eqn in equations for value in eqn.inputs}
    constants = {value: array for value, array in longest.constants.items() if value in used}
    return Skews(tables=dataclasses.replace(longest, outputs=outputs, equations=equations, constants=constants))


def _tables(program: Program, rows: int) -> list[tuple[Value, int]]:
    """The table of each skew and its axis by distance."""
    # Whether these are skews is asked at fewer tokens; other tables would be found to differ.
    found = (skew.product.table for skew in _find(program, rows, is_asked=False))
    return [(table, table.shape.index(rows)) for table in found]


def _by_first_axis(program: Program, tables: Sequence[tuple[Value, int]]) -> list[np.ndarray]:
    """The tables of random weights, by distance along their first axis."""
    equations = live(program.equations, [value for value, _ in tables])
    used = {value for eqn in equations for value in eqn.inputs} | {value for value, _ in tables}
    env = dict(program.constants)
    for number, value in enumerate(program.inputs):
        if value in used:
            env[value] = jnp.asarray(np.random.default_rng(number).normal(size=value.shape), value.dtype)
    for eqn in equations:
        env.update(zip(eqn.outputs, eqn.evaluate([env[value] for value in eqn.inputs]), strict=True))
    return [np.flip(np.moveaxis(np.asarray(env[value]), axis, 0), 0) for value, axis in tables]


def _is_first_of(table: np.ndarray, longest: np.ndarray) -> bool:
    """But for rounding, as sums over features are taken in another order."""
    if table.shape[1:] != longest.shape[1:]:
        return False
    apart = np.abs(table.astype(np.float64) - longest[: len(table)].astype(np.float64)).max()
    return bool(apart <= 8 * jnp.finfo(table.dtype).eps * max(1.0, np.abs(longest).max()))


def _find(program: Program, rows: int, *, is_asked: bool = True) -> list[_Skew]:
    """The skews of a program, in order; or, without asking, whatever is moved as one might be."""
    known: dict[str, bool] = {}

    def asked(chain: Sequence[Equation], product: _Product, axes: Sequence[int]) -> bool:
        key = repr([(eqn.primitive, eqn.params, [each.shape for each in eqn.inputs]) for eqn in chain])
        key += repr((product.axes, axes))
        if is_asked and key not in known:
            known[key] = _is_skew(chain, product, axes)
        return known.get(key, True)

    made_by = producers(program.equations)
    users: dict[Value, list[Equation]] = {}
    for eqn in program.equations:
        for value in eqn.inputs:
            users.setdefault(value, []).append(eqn)
    found = []
    for eqn in program.equations:
        skewed = [value for value in eqn.inputs if value.shape.count(rows) == 2]
        product = _product_of(skewed[0], program, made_by, rows) if eqn.primitive in _STARTS and skewed else None
        if product is not None and (skew := _moved(product, eqn, users, rows, asked)) is not None:
            found.append(skew)
    return found


def _product_of(value: Value, program: Program, made_by: Mapping[Value, Equation], rows: int) -> _Product | None:
    """A product of queries and a table, entry by entry multiplied or laid out in another way."""
    between: list[Equation] = []
    eqn = made_by.get(value)
    while eqn is not None and eqn.primitive in _BETWEEN:
        operands = [each for each in eqn.inputs if rows in each.shape]
        if len(operands) != 1:
            return None
        between.append(eqn)
        eqn = made_by.get(operands[0])
    if eqn is None or eqn.primitive != "dot_general":
        return None
    sides = [index for index, each in enumerate(eqn.inputs) if _is_table(each, program, made_by)]
    token_axes = [[axis for axis, size in enumerate(each.shape) if size == rows] for each in eqn.inputs]
    if len(sides) != 1 or any(len(axes) != 1 for axes in token_axes):
        return None
    asks, mapped = 1 - sides[0], axis_map(eqn).to_output
    axes = tuple(mapped[side][token_axes[side][0]] for side in (asks, sides[0]))
    for link in reversed(between):
        (position,) = (index for index, each in enumerate(link.inputs) if rows in each.shape)
        axes = tuple(axis if axis is None else axis_map(link).to_output[position][axis] for axis in axes)
    if axes[0] is None or axes[1] is None:
        return None
    return _Product(value=value, axes=(axes[0], axes[1]), eqn=eqn, asks=asks, between=tuple(reversed(between)))


def _is_table(value: Value, program: Program, made_by: Mapping[Value, Equation]) -> bool:
    """Made of neither tokens nor the positions that the model is given."""
    made_of = {each for eqn in closure([value], made_by, lambda _: True) for each in eqn.inputs} | {value}
    return made_of.isdisjoint(program.inputs[-2:])


def _moved(
    product: _Product,
    first: Equation,
    users: Mapping[Value, list[Equation]],
    rows: int,
    is_skew: Callable[[Sequence[Equation], _Product, Sequence[int]], bool],
) -> _Skew | None:
    """What `first` and the moves behind it make of the product, if that is its skew."""
    chain, followers = [], [first]
    while len(followers) == 1 and followers[0].primitive in _MOVES:
        chain += followers
        result = chain[-1].outputs[0]
        token_axes = [axis for axis, size in enumerate(result.shape) if size == rows]
        if len(chain) > 1 and len(token_axes) == 2:
            for axes in itertools.permutations(token_axes):
                if is_skew(chain, product, axes):
                    return _Skew(product=product, result=chain[-1], axes=(axes[0], axes[1]))
        followers = users.get(result, [])
    return None


def _is_skew(chain: Sequence[Equation], product: _Product, axes: Sequence[int]) -> bool:
    """The moves, run on numbers."""
    shape = product.value.shape
    numbers = np.arange(1, 1 + np.prod(shape), dtype=np.int32).reshape(shape)
    env = {product.value: numbers}
    for eqn in chain:
        operands = [env[each] if each in env else np.zeros(each.shape, np.int32) for each in eqn.inputs]
        env.update(zip(eqn.outputs, eqn.evaluate(operands), strict=True))
    source, result = (
        np.moveaxis(np.asarray(array), places, (-2, -1))
        for array, places in ((numbers, product.axes), (env[chain[-1].outputs[0]], axes))
    )
    rows = source.shape[-1]
    if result.size != source.size:
        return False
    result = result.reshape(source.shape)
    return all(np.array_equal(result[..., t, : t + 1], source[..., t, rows - 1 - t :]) for t in range(rows))


def _by_distance(skew: _Skew, table: Value, rows: int) -> Program:
    """The equations of the skew's result, with the rows of the table taken by distance."""
    product, axis = skew.product, skew.product.table.shape.index(rows)
    asks = product.eqn.inputs[product.asks]
    asks_axis, others = (
        asks.shape.index(rows),
        [each for link in product.between for each in link.inputs if not each.shape],
    )
    out_axis = axis_map(product.eqn).to_output[product.asks][asks_axis]

    def one(queries: jax.Array, by_key: jax.Array) -> jax.Array:
        pair = [jnp.expand_dims(queries, asks_axis), by_key]
        (made,) = product.eqn.evaluate(pair if product.asks == 0 else pair[::-1])
        return jnp.squeeze(made, out_axis)

    def make(queries: jax.Array, longest: jax.Array, *scalars: jax.Array) -> jax.Array:
        distance = jax.lax.iota(jnp.int32, rows)[:, None] - jax.lax.iota(jnp.int32, rows)
        farthest_first = longest.shape[axis] - 1 - jnp.maximum(distance, 0)
        taken = jnp.take(longest, farthest_first, axis=axis, mode="clip")
        made = jax.vmap(one, (asks_axis, axis), out_axis)(queries, taken)
        known = iter(scalars)
        for link in product.between:
            (made,) = link.evaluate([made if each.shape else next(known) for each in link.inputs])
        made = jnp.where(distance >= 0, jnp.moveaxis(made, product.axes, (-2, -1)), _ABOVE_DIAGONAL)
        result = skew.result.outputs[0]
        kept = [size for place, size in enumerate(result.shape) if place not in skew.axes]
        return jnp.moveaxis(made.reshape(*kept, rows, rows), (-2, -1), skew.axes).astype(result.dtype)

    return trace_onto([asks, table, *others], make, skew.result.where)
