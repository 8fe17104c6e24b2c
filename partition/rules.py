"""What each primitive does to the axes of its operands: the rule table of the analysis.

A rule maps an equation to an `AxisMap`. Everything else - labels, sites, evaluation at another number of rows - follows
from that map alone, so supporting a primitive means adding one rule here (and a test with a counter-example).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from partition.errors import TokenMixingError, UnsupportedPrimitiveError
from partition.jaxpr import Equation

Axes = tuple[int | None, ...]

# Entry by entry, over operands of one shape and scalars.
# fmt: off
ELEMENTWISE = (
    "abs", "acos", "acosh", "add", "and", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "ceil", "clamp",
    "convert_element_type", "copy", "cos", "cosh", "digamma", "div", "eq", "erf", "erf_inv", "erfc",
    "exp", "exp2", "expm1", "floor", "ge", "gt", "imag", "integer_pow", "is_finite", "le", "lgamma", "log", "log1p",
    "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not", "or", "pow", "real", "reduce_precision",
    "rem", "round", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign",
    "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor",
)
# fmt: on


@dataclass(frozen=True, kw_only=True)
class AxisMap:
    """Where operand axes go.

    to_output: per operand, per axis: the output axis that it becomes, element by element, or None.
    reduced: per operand: the axes that are summed (or maximised ...) over.
    paired: for a product: (lhs axis, rhs axis) contracted together; also listed in `reduced`.
    mixed: per operand: axes along which positions are moved, dropped or combined in any other way.
    """

    to_output: tuple[Axes, ...]
    reduced: tuple[frozenset[int], ...] = ()
    paired: tuple[tuple[int, int], ...] = ()
    mixed: tuple[frozenset[int], ...] = ()

    def reduced_axes(self, operand: int) -> frozenset[int]:
        """Axes of one operand that the equation reduces."""
        return self.reduced[operand] if self.reduced else frozenset()

    def mixed_axes(self, operand: int) -> frozenset[int]:
        """Axes of one operand along which the equation mixes positions."""
        return self.mixed[operand] if self.mixed else frozenset()


# These change how a value is laid out, ordered, repeated or typed, and nothing else.
SHAPE_ONLY = frozenset(
    {"broadcast_in_dim", "reshape", "squeeze", "transpose", "convert_element_type", "copy", "tile", "rev"}
)


REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or")


# Entry i is made of the entries 0 .. i.
RUNNING = frozenset({"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"})


def axis_map(eqn: Equation) -> AxisMap:
    """The rule for `eqn`.

    Raises:
      UnsupportedPrimitiveError: the table has no rule for the primitive.
    """
    rule = RULES.get(eqn.primitive)
    if rule is None and eqn.primitive == "pallas_call":
        raise UnsupportedPrimitiveError(
            f"a pallas kernel is called at {eqn.where}, which cannot be looked into; allowed: the XLA implementation "
            "of the same function (libraries choose it by an argument like implementation='xla')"
        )
    if rule is None and eqn.primitive == "scan":
        raise TokenMixingError(
            f"'scan' at {eqn.where} takes {eqn.params['length']} steps along the token axis, each from the last: a "
            "recurrence; allowed: scans over layers"
        )
    if rule is None:
        raise UnsupportedPrimitiveError(
            f"primitive '{eqn.primitive}' at {eqn.where} has no rule, so it cannot be proven token-wise; "
            f"allowed: {', '.join(sorted(RULES))}"
        )
    return rule(eqn)


def axes_by_position(eqn: Equation, rows: int) -> frozenset[int]:
    """Axes of the output with `rows` entries that are made from their positions, if no operand depends on a token.

    They are those of an arange, of the first rows of a longer table, and of a running sum of constants.
    """
    shape = eqn.outputs[0].shape
    if eqn.primitive == "iota":
        touched = {eqn.params["dimension"]}
    elif eqn.primitive == "slice":
        source, strides = eqn.inputs[0].shape, eqn.params["strides"] or (1,) * len(shape)
        touched = {axis for axis in range(len(shape)) if source[axis] != shape[axis] and strides[axis] == 1}
    elif eqn.primitive in RUNNING and not eqn.params["reverse"]:
        touched = {eqn.params["axis"]}
    else:
        touched = set()
    return frozenset(axis for axis in touched if shape[axis] == rows)


def resized_params(eqn: Equation, shape: tuple[int, ...]) -> dict[str, Any]:
    """The parameters of `eqn` when its first output has `shape` instead of the traced one.

    Only sizes of axes that the equation passes through whole, or makes by position, may differ; the analysis has
    refused all others.
    """
    params = dict(eqn.params)
    if eqn.primitive in ("broadcast_in_dim", "iota"):
        params["shape"] = shape
    elif eqn.primitive == "reshape":
        params["new_sizes"] = shape
    elif eqn.primitive == "slice":
        traced = eqn.outputs[0].shape
        bounds = zip(params["start_indices"], params["limit_indices"], shape, traced, strict=True)
        params["limit_indices"] = tuple(limit if now == was else start + now for start, limit, now, was in bounds)
    elif eqn.primitive == "dynamic_slice":
        params["slice_sizes"] = shape
    elif eqn.primitive == "gather":
        window = axis_map(eqn).to_output[0]
        params["slice_sizes"] = tuple(
            size if out is None or size == 1 else shape[out]
            for size, out in zip(params["slice_sizes"], window, strict=True)
        )
    return params


def _identity(ndim: int) -> Axes:
    return tuple(range(ndim))


def _elementwise(eqn: Equation) -> AxisMap:
    # Scalars (select_n's predicate, clamp's bounds) have no axes; all other operands have the output's shape.
    return AxisMap(to_output=tuple(_identity(len(value.shape)) for value in eqn.inputs))


def _without(ndim: int, gone: frozenset[int]) -> Axes:
    kept = iter(range(ndim))
    return tuple(None if axis in gone else next(kept) for axis in range(ndim))


def _reduce(eqn: Equation) -> AxisMap:
    gone = frozenset(int(axis) for axis in eqn.params["axes"])
    return AxisMap(
        to_output=tuple(_without(len(value.shape), gone) for value in eqn.inputs),
        reduced=(gone,) * len(eqn.inputs),
    )


def _broadcast_in_dim(eqn: Equation) -> AxisMap:
    operand, out = eqn.inputs[0], eqn.outputs[0]
    targets = [int(axis) for axis in eqn.params["broadcast_dimensions"]]
    # A size-1 axis that is stretched does not become the output's axis: nothing of it varies there.
    axes = tuple(target if operand.shape[axis] == out.shape[target] else None for axis, target in enumerate(targets))
    return AxisMap(to_output=(axes,))


def _transpose(eqn: Equation) -> AxisMap:
    permutation = [int(axis) for axis in eqn.params["permutation"]]
    return AxisMap(to_output=(tuple(permutation.index(axis) for axis in range(len(permutation))),))


def _squeeze(eqn: Equation) -> AxisMap:
    ndim = len(eqn.inputs[0].shape)
    gone = frozenset(int(axis) % ndim for axis in eqn.params["dimensions"])
    return AxisMap(to_output=(_without(ndim, gone),))


def _reshape(eqn: Equation) -> AxisMap:
    source, target = eqn.inputs[0].shape, eqn.outputs[0].shape
    axes: list[int | None] = [None] * len(source)
    mixed: set[int] = set()
    for group_in, group_out in reshape_groups(source, target):
        if len(group_in) == 1 and len(group_out) == 1:
            axes[group_in[0]] = group_out[0]
        else:
            mixed.update(group_in)
    return AxisMap(to_output=(tuple(axes),), mixed=(frozenset(mixed),))


def reshape_groups(source: tuple[int, ...], target: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Pairs of axis runs with equal products, size-1 axes left out (they carry no positions)."""
    left = [axis for axis, size in enumerate(source) if size != 1]
    right = [axis for axis, size in enumerate(target) if size != 1]
    if 0 in source or math.prod(source) != math.prod(target):
        return [(left, right)]
    groups: list[tuple[list[int], list[int]]] = []
    while left:
        ins, outs = [left.pop(0)], [right.pop(0)]
        while math.prod(source[a] for a in ins) != math.prod(target[a] for a in outs):
            if math.prod(source[a] for a in ins) < math.prod(target[a] for a in outs):
                ins.append(left.pop(0))
            else:
                outs.append(right.pop(0))
        groups.append((ins, outs))
    return groups


def _dot_general(eqn: Equation) -> AxisMap:
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    lhs, rhs = (len(value.shape) for value in eqn.inputs)
    lhs_axes: list[int | None] = [None] * lhs
    rhs_axes: list[int | None] = [None] * rhs
    for out, (a, b) in enumerate(zip(lhs_batch, rhs_batch, strict=True)):
        lhs_axes[a] = rhs_axes[b] = out
    out = len(lhs_batch)
    for axes, contract, batch in ((lhs_axes, lhs_contract, lhs_batch), (rhs_axes, rhs_contract, rhs_batch)):
        for axis in range(len(axes)):
            if axis not in contract and axis not in batch:
                axes[axis] = out
                out += 1
    return AxisMap(
        to_output=(tuple(lhs_axes), tuple(rhs_axes)),
        reduced=(frozenset(map(int, lhs_contract)), frozenset(map(int, rhs_contract))),
        paired=tuple((int(a), int(b)) for a, b in zip(lhs_contract, rhs_contract, strict=True)),
    )


def _gather(eqn: Equation) -> AxisMap:
    operand, indices = eqn.inputs
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    ndim = len(eqn.outputs[0].shape)
    batch_axes = [axis for axis in range(ndim) if axis not in numbers.offset_dims]
    index_axes: list[int | None] = [*batch_axes, None]
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    window = [axis for axis in range(len(operand.shape)) if axis not in dropped]
    operand_axes: list[int | None] = [None] * len(operand.shape)
    for axis, out in zip(window, numbers.offset_dims, strict=True):
        operand_axes[axis] = out if sizes[axis] == operand.shape[axis] else None
    for axis, index_axis in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        operand_axes[axis] = index_axes[index_axis]
    mixed = frozenset(axis for axis, out in enumerate(operand_axes) if out is None)
    return AxisMap(
        to_output=(tuple(operand_axes), tuple(index_axes)),
        mixed=(mixed, frozenset({len(indices.shape) - 1})),
    )


def _keep_except(eqn: Equation, touched: frozenset[int]) -> AxisMap:
    """All operands (of the output's rank) keep their axes but for `touched`, along which positions move or vanish."""
    ndim = len(eqn.outputs[0].shape)
    axes: Axes = tuple(None if axis in touched else axis for axis in range(ndim))
    full = [len(value.shape) == ndim for value in eqn.inputs]
    return AxisMap(
        to_output=tuple(
            axes if is_full else (None,) * len(v.shape) for v, is_full in zip(eqn.inputs, full, strict=True)
        ),
        mixed=tuple(
            touched if is_full else frozenset(range(len(v.shape))) for v, is_full in zip(eqn.inputs, full, strict=True)
        ),
    )


def _along(*names: str) -> Callable[[Equation], AxisMap]:
    """Primitives that work along the axes that a parameter names."""

    def rule(eqn: Equation) -> AxisMap:
        value = next(eqn.params[name] for name in names if name in eqn.params)
        axes = value if isinstance(value, (tuple, list)) else (value,)
        return _keep_except(eqn, frozenset(int(axis) for axis in axes))

    return rule


def _resizing(eqn: Equation) -> AxisMap:
    """slice, dynamic_slice: an axis that keeps its size is taken whole (offset 0, step 1)."""
    source, target = eqn.inputs[0].shape, eqn.outputs[0].shape
    return _keep_except(eqn, frozenset(axis for axis in range(len(target)) if source[axis] != target[axis]))


def _pad(eqn: Equation) -> AxisMap:
    touched = frozenset(
        axis for axis, amounts in enumerate(eqn.params["padding_config"]) if any(int(amount) for amount in amounts)
    )
    return _keep_except(eqn, touched)


def _mixing(eqn: Equation) -> AxisMap:
    """Whatever it does along any axis."""
    axes = tuple(range(len(value.shape)) for value in eqn.inputs)
    return AxisMap(to_output=tuple((None,) * len(each) for each in axes), mixed=tuple(frozenset(each) for each in axes))


def _tile(eqn: Equation) -> AxisMap:
    return _keep_except(eqn, frozenset(axis for axis, count in enumerate(eqn.params["reps"]) if count != 1))


def _stack(eqn: Equation) -> AxisMap:
    ndim, new = len(eqn.inputs[0].shape), int(eqn.params["axis"])
    axes = tuple(axis if axis < new else axis + 1 for axis in range(ndim))
    return AxisMap(to_output=(axes,) * len(eqn.inputs))


def _top_k(eqn: Equation) -> AxisMap:
    return _keep_except(eqn, frozenset({len(eqn.inputs[0].shape) - 1}))


def _arg_reduce(eqn: Equation) -> AxisMap:
    gone = frozenset(int(axis) for axis in eqn.params["axes"])
    return AxisMap(to_output=(_without(len(eqn.inputs[0].shape), gone),), mixed=(gone,))


def _take_layer(eqn: Equation) -> AxisMap:
    return AxisMap(to_output=(_without(len(eqn.inputs[0].shape), frozenset({0})),), mixed=(frozenset({0}),))


def _iota(eqn: Equation) -> AxisMap:
    return AxisMap(to_output=tuple(() for _ in eqn.inputs))


RULES: dict[str, Callable[[Equation], AxisMap]] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(("argmax", "argmin"), _arg_reduce),
    **dict.fromkeys(RUNNING, _along("axis")),
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _along("dimension"),
    "dot_general": _dot_general,
    "dynamic_slice": _resizing,
    "gather": _gather,
    "iota": _iota,
    "pad": _pad,
    "ragged_dot_general": _mixing,
    "reshape": _reshape,
    "rev": _along("dimensions"),
    "scatter": _mixing,
    "scatter-add": _mixing,
    "slice": _resizing,
    "sort": _along("dimension"),
    "squeeze": _squeeze,
    "stack": _stack,
    "take_layer": _take_layer,
    "tile": _tile,
    "top_k": _top_k,
    "transpose": _transpose,
}
