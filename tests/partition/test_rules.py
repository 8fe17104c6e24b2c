"""Every rule against numbers: perturb one slice of an operand and see which slices of the output move."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from partition.errors import UnsupportedPrimitiveError
from partition.jaxpr import Equation, trace
from partition.rules import axis_map, resized_params

_DOT = (((1,), (2,)), ((0,), (0,)))

# name -> (function, operand shapes). Sizes are all different, so that no axis passes for another.
CASES = {
    "add": (lambda a, b: a + b, [(3, 5), (3, 5)]),
    "select_n": (lambda p, a, b: lax.select(p > 0, a, b), [(3, 5), (3, 5), (3, 5)]),
    "reduce_sum": (lambda a: a.sum(1), [(3, 5, 7)]),
    "reduce_max": (lambda a: a.max((0, 2)), [(3, 5, 7)]),
    "argmax": (lambda a: jnp.argmax(a, 1), [(3, 5)]),
    "broadcast_in_dim": (lambda a: lax.broadcast_in_dim(a, (3, 4, 5), (0, 2)), [(3, 5)]),
    "broadcast_in_dim_stretch": (lambda a: lax.broadcast_in_dim(a, (3, 5), (0, 1)), [(3, 1)]),
    "transpose": (lambda a: a.transpose(2, 0, 1), [(3, 5, 7)]),
    "squeeze": (lambda a: lax.squeeze(a, (0,)), [(1, 5, 7)]),
    "reshape_ones": (lambda a: a.reshape(5, 1, 7), [(1, 5, 7)]),
    "reshape_split": (lambda a: a.reshape(3, 2, 5, 7), [(3, 10, 7)]),
    "reshape_merge": (lambda a: a.reshape(3, 10, 7), [(3, 2, 5, 7)]),
    "dot_general": (lambda a, b: lax.dot_general(a, b, (((2,), (1,)), ((0,), (0,)))), [(2, 3, 5), (2, 5, 7)]),
    "dot_general_swapped": (lambda a, b: lax.dot_general(a, b, _DOT), [(2, 5, 3), (2, 7, 5)]),
    "gather_rows": (lambda a, i: a[jnp.abs(i).astype(int) % 5], [(5, 7), (1, 3)]),
    "concatenate": (lambda a, b: jnp.concatenate([a, b], 1), [(3, 2), (3, 5)]),
    "slice": (lambda a: a[:, 1:4], [(3, 5)]),
    "dynamic_slice": (lambda a: lax.dynamic_slice(a, (0, 1), (3, 4)), [(3, 5)]),
    "split": (lambda a: jnp.split(a, 2, 1)[0], [(3, 6)]),
    "pad": (lambda a: lax.pad(a, 0.0, ((0, 0, 0), (1, 0, 0))), [(3, 5)]),
    "rev": (lambda a: a[:, ::-1], [(3, 5)]),
    "cumsum": (lambda a: jnp.cumsum(a, 1), [(3, 5)]),
    "sort": (lambda a: jnp.sort(a, 1), [(3, 5)]),
    "top_k": (lambda a: lax.top_k(a, 2)[0], [(3, 5)]),
    "tile": (lambda a: jnp.tile(a, (1, 3)), [(3, 5)]),
    "stack": (lambda a, b: jnp.stack([a, b], 1), [(3, 5), (3, 5)]),
    "cummax": (lambda a: lax.cummax(a, 1), [(3, 5)]),
    "clamp": (lambda a: jnp.clip(a, -0.5, 0.5), [(3, 5)]),
    "reduce_and": (lambda a: (a > 0).all(1), [(3, 5, 7)]),
}


def _moved(fn, operands, operand: int, axis: int, index: int) -> np.ndarray:
    """Which output entries change when slice `index` of one operand's axis changes."""
    changed = [np.array(array) for array in operands]
    window = [slice(None)] * changed[operand].ndim
    window[axis] = index
    changed[operand][tuple(window)] += 10 + np.random.default_rng(7).normal(size=changed[operand][tuple(window)].shape)
    return np.asarray(fn(*operands)) != np.asarray(fn(*changed))


def _composed_axes(fn, operands) -> list[list[set[int]]]:
    """Per operand and axis: the output axes that the rules say it becomes, through all equations of `fn`."""
    program = trace(fn, *operands)
    reach = {value: [{axis} for axis in range(len(value.shape))] for value in program.inputs}
    result = []
    for source in program.inputs:
        axes = {source: [{axis} for axis in range(len(source.shape))]}
        for eqn in program.equations:
            merged = [set() for _ in eqn.outputs[0].shape]
            for value, targets in zip(eqn.inputs, axis_map(eqn).to_output, strict=True):
                for origin, out in zip(axes.get(value, []), targets, strict=False):
                    if out is not None:
                        merged[out] |= origin
            for value in eqn.outputs:
                axes[value] = merged
        found = [set() for _ in source.shape]
        for out, origins in enumerate(axes[program.outputs[0]]):
            for axis in origins:
                found[axis].add(out)
        result.append(found)
    assert reach
    return result


@pytest.mark.parametrize("name", CASES)
def test_axis_that_a_rule_maps_moves_only_its_own_slice(name):
    fn, shapes = CASES[name]
    random = np.random.default_rng(0)
    operands = [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]
    checked = 0
    for operand, axes in enumerate(_composed_axes(fn, operands)):
        for axis, outs in enumerate(axes):
            for index in range(shapes[operand][axis]):
                for out in outs:
                    moved = np.moveaxis(_moved(fn, operands, operand, axis, index), out, 0)
                    assert not np.delete(moved, index, axis=0).any(), (operand, axis, out)
                    checked += 1
    assert checked or name in ("broadcast_in_dim_stretch",)


@pytest.mark.parametrize(
    ("fn", "shape", "axis"),
    [
        (lambda a: a[:, 1:4], (3, 5), 1),
        (lambda a: jnp.cumsum(a, 1), (3, 5), 1),
        (lambda a: jnp.sort(a, 1), (3, 5), 1),
        (lambda a: a[:, ::-1], (3, 5), 1),
        (lambda a: lax.pad(a, 0.0, ((0, 0, 0), (1, -1, 0))), (3, 5), 1),
        (lambda a: jnp.concatenate([a, a], 1), (3, 5), 1),
        (lambda a: lax.top_k(a, 5)[0], (3, 5), 1),
        (lambda a: jnp.argmax(a, 1), (3, 5), 1),
        (lambda a: a.reshape(15), (3, 5), 1),
        (lambda a: lax.dynamic_slice(a, (0, 1), (3, 4)), (3, 5), 1),
        (lambda a: jnp.tile(a, (1, 3)), (3, 5), 1),
        (lambda a: jnp.split(a, 5, 1)[0], (3, 5), 1),
        (lambda a: lax.cummax(a, 1), (3, 5), 1),
        (lambda a: a[:, jnp.array([3, 1])], (3, 5), 1),
        (lambda a: jnp.zeros((3, 9)).at[:, jnp.array([5, 1, 2, 8, 4])].add(a), (3, 5), 1),
        (lambda a: lax.ragged_dot(a, jnp.ones((2, 5, 4)), jnp.array([1, 2])), (3, 5), 0),
    ],
)
def test_axis_along_which_positions_move_is_called_mixed(fn, shape, axis):
    program = trace(fn, jnp.zeros(shape))
    eqn = next(eqn for eqn in program.equations if program.inputs[0] in eqn.inputs)
    assert axis in axis_map(eqn).mixed_axes(eqn.inputs.index(program.inputs[0]))


def test_reduced_axes_are_named_and_pairs_of_a_product_too():
    eqn = _only(lambda a, b: lax.dot_general(a, b, _DOT), jnp.zeros((2, 5, 3)), jnp.zeros((2, 7, 5)))
    axes = axis_map(eqn)
    assert axes.reduced_axes(0) == {1}
    assert axes.reduced_axes(1) == {2}
    assert axes.paired == ((1, 2),)


def test_primitive_without_a_rule_is_refused_by_name_and_line():
    eqn = _only(lambda a: lax.cumlogsumexp(a, 0), jnp.zeros(3))
    unknown = Equation(
        primitive="fft", inputs=eqn.inputs, outputs=eqn.outputs, params={}, where=eqn.where, bind=eqn.bind
    )
    with pytest.raises(UnsupportedPrimitiveError, match=r"'fft' at .*test_rules\.py:\d+"):
        axis_map(unknown)


@pytest.mark.parametrize(
    "name", ["broadcast_in_dim", "slice", "dynamic_slice", "transpose", "reshape_ones", "gather_rows"]
)
def test_equation_evaluated_at_another_size_equals_the_function_traced_there(name):
    """Grow the axis that a whole-axis rule passes through; the resized equations give what JAX gives at that size."""
    fn, shapes = CASES[name]
    axis = {"broadcast_in_dim": 0, "slice": 0, "dynamic_slice": 0, "transpose": 1, "reshape_ones": 1, "gather_rows": 1}[
        name
    ]
    operand = len(shapes) - 1
    grown_shapes = [list(shape) for shape in shapes]
    grown_shapes[operand][axis] = 11
    functions = {
        "broadcast_in_dim": lambda a: lax.broadcast_in_dim(a, (11, 4, 5), (0, 2)),
        "dynamic_slice": lambda a: lax.dynamic_slice(a, (0, 1), (11, 4)),
        "reshape_ones": lambda a: a.reshape(11, 1, 7),
    }
    random = np.random.default_rng(1)
    grown = [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in grown_shapes]
    program = trace(fn, *(jnp.zeros(shape) for shape in shapes))
    at_size = trace(functions.get(name, fn), *grown)
    env = dict(zip(program.inputs, grown, strict=True)) | {k: jnp.asarray(v) for k, v in program.constants.items()}
    for eqn, twin in zip(program.equations, at_size.equations, strict=True):
        params = resized_params(eqn, twin.outputs[0].shape)
        env.update(zip(eqn.outputs, eqn.evaluate([env[v] for v in eqn.inputs], params), strict=True))
    np.testing.assert_array_equal(env[program.outputs[0]], functions.get(name, fn)(*grown))


def _only(fn, *args) -> Equation:
    (eqn,) = trace(fn, *args).equations
    return eqn


def test_inline_calls_are_expanded_and_constants_kept():
    @jax.custom_jvp
    def double(x):
        return x * 2

    double.defjvp(lambda primals, tangents: (double(*primals), tangents[0] * 2))
    program = trace(lambda x: jax.checkpoint(jax.jit(lambda y: double(y) + 1))(x), jnp.zeros(3))
    assert [eqn.primitive for eqn in program.equations] == ["mul", "add"]
    assert sorted(float(value) for value in program.constants.values()) == [1.0, 2.0]
