"""From a function of `[1, T]` tokens to a traced program whose T axes are recognisable, at any T."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partition.captured import Captured, fold, learn_captured
from partition.chunks import Chunks
from partition.errors import PartitionError, TokenMixingError, TraceError
from partition.evaluate import evaluate_tables, row_shape
from partition.extras import split_extras
from partition.forward import Forward
from partition.jaxpr import Equation, Program, Value, trace
from partition.join import join_chunks
from partition.last_row import every_row
from partition.rules import resized_params
from partition.running_count import count_by_attention
from partition.skew import Skews, learn_skews
from partition.structure import closure, producers

_LARGEST_TRACE_ROWS = 1021
# For models that take no other numbers of tokens than multiples of their chunks.
_WHOLE_CHUNKS = (16, 128, 512)
_LARGEST_WHOLE_ROWS = 16384


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What comparing programs of several numbers of tokens says of captured arrays and of skewed products."""

    captured: Captured
    skews: Skews


@dataclass(frozen=True, kw_only=True)
class Traced:
    """The program at `rows` tokens. Every dimension equal to `rows` is the token axis or counts tokens.

    other_program, other_rows: the same model at another number of tokens.
    chunk: `rows` is a prime number of so many tokens; 1, unless the model takes whole chunks only.
    learned: how the program is made of the model's own, at any number of tokens.
    counts: scalars that are a * (number of tokens) + b, as (a, b): the length of an axis.
    position_tables: values with a token axis that are looked up (say a captured `np.arange(T)`), for positions
      0 .. max_rows - 1.
    """

    program: Program
    rows: int
    other_program: Program
    other_rows: int
    learned: Learned
    chunk: int
    counts: Mapping[Value, tuple[int, int]]
    max_rows: int
    weights: tuple[Value, ...]
    weight_names: tuple[str, ...]
    tokens: Value
    positions: Value
    position_tables: dict[Value, Any]

    def with_tables(self, values: Sequence[Value]) -> Traced:
        """Position-only `values`, which need other positions than their own, as tables too.

        Raises:
          TraceError: one of them is made of weights.
        """
        known = {**self.program.constants, **self.position_tables}
        known[self.positions] = jnp.arange(self.max_rows).reshape(row_shape(self.positions, self.rows, self.max_rows))
        equations = closure(values, producers(self.program.equations), lambda value: value not in known)
        for eqn in equations:
            if any(value in self.weights for value in eqn.inputs):
                raise TraceError(
                    f"'{eqn.primitive}' at {eqn.where} sums weights along the token axis; allowed: constants"
                )
        env = evaluate_tables(values, self.program, known, traced_rows=self.rows, max_rows=self.max_rows)
        return replace(self, position_tables={**self.position_tables, **{value: env[value] for value in values}})


def trace_causal(forward: Forward, *, max_rows: int) -> Traced:
    """Trace a forward pass at a number of rows that no weight has as a dimension.

    Args:
      max_rows: the longest sequence that will ever be asked for (bounds position tables).

    Raises:
      TraceError: not traceable, or no logits per token come out.
    """
    leaves = jax.tree_util.tree_leaves_with_path(forward.params)
    chunk, sizes, learned, (program, other_program) = _trace_twice(forward, max_rows)
    rows, other_rows = sizes
    _check_output(program, rows)
    count = len(leaves)
    return Traced(
        program=program,
        rows=rows,
        other_program=other_program,
        other_rows=other_rows,
        chunk=chunk,
        counts=_counts(program, rows, other_program, other_rows),
        max_rows=max_rows,
        weights=program.inputs[:count],
        weight_names=tuple(jax.tree_util.keystr(path) for path, _ in leaves),
        tokens=program.inputs[count],
        positions=program.inputs[count + 1],
        learned=learned,
        position_tables=learned.captured.position_tables(program),
    )


def _trace_twice(forward: Forward, max_rows: int) -> tuple[int, tuple[int, int], Learned, list[Program]]:
    """The programs at two primes or, if these will not do, at a prime number of chunks of so many tokens."""
    refusal: PartitionError | None = None
    for chunk in (1, *_WHOLE_CHUNKS):
        sizes = _unlike_dimensions(forward.params, max_rows, chunk)
        if sizes is None:
            break
        try:
            written = functools.cache(functools.partial(_as_written, forward))
            learned = _learn(forward, written, sizes, max_rows)
            return chunk, sizes, learned, [_made_plain(written(each), each, learned) for each in sizes]
        except (TraceError, TokenMixingError) as error:
            refusal = refusal or error
    if refusal is None:
        raise TraceError(f"max_model_len {max_rows} is too short to trace the model; at least 16 is needed")
    raise refusal


def trace_at(forward: Forward, rows: int, learned: Learned) -> Program:
    """The program of `rows` tokens, with logits for each.

    Its inputs are the leaves of the parameters, tokens and positions.
    """
    return _made_plain(_as_written(forward, rows), rows, learned)


def _learn(forward: Forward, written: Callable[[int], Program], sizes: Sequence[int], max_rows: int) -> Learned:
    shorter = next(rows_unlike_dimensions(forward.params, range(sizes[0] // 2, 6, -1)), sizes[1])
    skews = learn_skews(written, (*sizes, shorter), max_rows)
    asked = {rows: skews.resolved(written(rows), rows) for rows in sizes}
    captured = learn_captured(lambda rows: fold(asked.get(rows) or written(rows), rows), sizes, max_rows)
    return Learned(captured=captured, skews=skews)


def _made_plain(program: Program, rows: int, learned: Learned) -> Program:
    """The model's own program with other operations in place of those that hide what they do to tokens."""
    program = learned.captured.resolved(fold(learned.skews.resolved(program, rows), rows), rows)
    program = join_chunks(count_by_attention(program, rows), rows)
    return split_extras(every_row(program, rows), rows)


def _as_written(forward: Forward, rows: int) -> Program:
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), forward.params)
    tokens = jax.ShapeDtypeStruct((1, rows), jnp.int32)
    return trace(forward.fn, abstract, tokens, tokens, rows=rows, judge=Chunks(rows))


def _counts(program: Program, rows: int, other: Program, other_rows: int) -> dict[Value, tuple[int, int]]:
    """Integer scalars that differ between the two programs by a multiple of the difference in tokens."""
    found: dict[Value, tuple[int, int]] = {}
    known: dict[Value, Value] = {}
    for a, b in zip(program.equations, other.equations, strict=False):
        for x, y in zip(a.inputs, b.inputs, strict=False):
            is_scalar = not x.shape and jnp.issubdtype(x.dtype, jnp.integer)
            if not is_scalar or x not in program.constants or y not in other.constants:
                continue
            factor, rest = divmod(int(other.constants[y]) - int(program.constants[x]), other_rows - rows)
            if known.setdefault(x, y) is not y or rest:
                return {}  # refused later, with the equation
            if factor:
                found[x] = (factor, int(program.constants[x]) - factor * rows)
    return found


def depends_on_count(eqn: Equation) -> TraceError:
    """The error for an equation whose result depends on how many tokens there are."""
    return TraceError(
        f"'{eqn.primitive}' at {eqn.where} depends on the number of tokens in the call; "
        "what a token gets may depend on its position only"
    )


def _unlike_dimensions(params: Any, max_rows: int, chunk: int) -> tuple[int, int] | None:
    """Two numbers of tokens to trace at: the largest primes, or the fewest chunks of so many tokens."""
    if chunk == 1:
        numbers = range(min(max_rows, _LARGEST_TRACE_ROWS), 6, -1)
    else:
        numbers = range(7, min(max_rows, _LARGEST_WHOLE_ROWS) // chunk + 1)
    candidates = rows_unlike_dimensions(params, numbers)
    first, second = next(candidates, None), next(candidates, None)
    return None if first is None or second is None else (first * chunk, second * chunk)


def rows_unlike_dimensions(params: Any, candidates: Iterable[int]) -> Iterator[int]:
    """The primes that divide no dimension of a weight, so that an axis of such a size must count tokens."""
    taken = {dimension for leaf in jax.tree.leaves(params) for dimension in leaf.shape}
    return (p for p in candidates if _is_prime(p) and all(size % p for size in taken))


def _is_prime(number: int) -> bool:
    return all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _check_output(program: Program, rows: int) -> None:
    shapes = [value.shape for value in program.outputs]
    # Of one row that is not the last token's the analysis says what drops the others.
    is_one_row = len(shapes) == 1 and len(shapes[0]) > 0 and math.prod(shapes[0]) == shapes[0][-1]
    if not is_one_row and (len(shapes) != 1 or shapes[0][:-1] not in ((rows,), (1, rows))):
        raise TraceError(
            "the model must return logits [1, T, vocab], or those of the last token alone, [1, vocab]; "
            f"for T={rows} it returned {shapes or 'nothing'}"
        )


def check_any_rows(traced: Traced) -> None:
    """Prove that the program at any number of rows is the traced one resized, by the other number that was traced.

    Raises:
      TraceError: what the model computes depends on the number of tokens itself.
    """
    small, rows, large, other = traced.program, traced.rows, traced.other_program, traced.other_rows
    if len(small.equations) != len(large.equations):
        raise TraceError(
            f"the model computes differently for {rows} tokens ({len(small.equations)} equations) "
            f"and for {other} ({len(large.equations)})"
        )

    for a, b in zip(small.equations, large.equations, strict=True):
        same = a.primitive == b.primitive and all(
            row_shape(x, rows, other) == y.shape and x.dtype == y.dtype
            for x, y in zip((*a.inputs, *a.outputs), (*b.inputs, *b.outputs), strict=True)
        )
        if same and not _carries_code(a):
            same = repr(resized_params(a, b.outputs[0].shape)) == repr(b.params)
        if not same or not _same_constants(traced, a, b):
            raise depends_on_count(a)


def _carries_code(eqn: Any) -> bool:
    """Loops and branches print their bodies with the token count inside; they have no rule and are refused later."""
    return any("jaxpr" in name or name == "branches" for name in eqn.params)


def _same_constants(traced: Traced, small: Equation, large: Equation) -> bool:
    ours, theirs = traced.program.constants, traced.other_program.constants
    for x, y in zip(small.inputs, large.inputs, strict=True):
        # What the length of an axis is used for was judged by the analysis.
        if (x not in ours and y not in theirs) or x in traced.counts:
            continue
        if x not in ours or y not in theirs:
            return False
        a, b = np.asarray(ours[x]), np.asarray(theirs[y])
        window = tuple(slice(0, min(n, m)) for n, m in zip(a.shape, b.shape, strict=True))
        if not np.array_equal(a[window], b[window], equal_nan=a.dtype.kind in "fc"):
            return False
    return True
