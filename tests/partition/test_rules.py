"""Every rule against numbers: perturb one slice of an operand and see which slices of the output move."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from partition.errors import UnsupportedPrimitiveError
from partition.jaxpr import Equation, trace
from partition.rules import ELEMENTWISE, RULES, axis_map, resized_params

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
    "reduce_or": (lambda a: (a > 0).any(1), [(3, 5, 7)]),
    "reduce_min": (lambda a: a.min(1), [(3, 5, 7)]),
    "reduce_prod": (lambda a: a.prod(1), [(3, 5, 7)]),
    "argmin": (lambda a: jnp.argmin(a, 1), [(3, 5)]),
    "cummin": (lambda a: lax.cummin(a, 1), [(3, 5)]),
    "cumprod": (lambda a: lax.cumprod(a, 1), [(3, 5)]),
    "cumlogsumexp": (lambda a: lax.cumlogsumexp(a, 1), [(3, 5)]),
    "iota": (lambda a: a + lax.broadcasted_iota(jnp.float32, (3, 5), 1), [(3, 5)]),
    "take_layer": (lambda a: lax.scan(lambda c, row: (c + row, None), jnp.zeros(5), a)[0], [(3, 5)]),
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


# name -> (function, operand shape, an axis that is not kept)
COUNTER_EXAMPLES = {
    "argmax": (lambda a: jnp.argmax(a, 1), (3, 5), 1),
    "argmin": (lambda a: jnp.argmin(a, 1), (3, 5), 1),
    "concatenate": (lambda a: jnp.concatenate([a, a], 1), (3, 5), 1),
    "cumlogsumexp": (lambda a: lax.cumlogsumexp(a, 1), (3, 5), 1),
    "cummax": (lambda a: lax.cummax(a, 1), (3, 5), 1),
    "cummin": (lambda a: lax.cummin(a, 1), (3, 5), 1),
    "cumprod": (lambda a: lax.cumprod(a, 1), (3, 5), 1),
    "cumsum": (lambda a: jnp.cumsum(a, 1), (3, 5), 1),
    "dot_general": (lambda a: a @ jnp.ones((5, 2)), (3, 5), 1),
    "dynamic_slice": (lambda a: lax.dynamic_slice(a, (0, 1), (3, 4)), (3, 5), 1),
    "gather": (lambda a: a[:, jnp.array([3, 1])], (3, 5), 1),
    "pad": (lambda a: lax.pad(a, 0.0, ((0, 0, 0), (1, -1, 0))), (3, 5), 1),
    "ragged_dot_general": (lambda a: lax.ragged_dot(a, jnp.ones((2, 5, 4)), jnp.array([1, 2])), (3, 5), 0),
    "reduce_and": (lambda a: a.all(1), (3, 5), 1),
    "reduce_max": (lambda a: a.max(1), (3, 5), 1),
    "reduce_min": (lambda a: a.min(1), (3, 5), 1),
    "reduce_or": (lambda a: a.any(1), (3, 5), 1),
    "reduce_prod": (lambda a: a.prod(1), (3, 5), 1),
    "reduce_sum": (lambda a: a.sum(1), (3, 5), 1),
    "reshape": (lambda a: a.reshape(15), (3, 5), 1),
    "rev": (lambda a: a[:, ::-1], (3, 5), 1),
    "scatter": (lambda a: jnp.zeros((3, 9)).at[:, jnp.array([5, 1, 2, 8, 4])].set(a), (3, 5), 1),
    "scatter-add": (lambda a: jnp.zeros((3, 9)).at[:, jnp.array([5, 1, 2, 8, 4])].add(a), (3, 5), 1),
    "slice": (lambda a: a[:, 1:4], (3, 5), 1),
    "sort": (lambda a: jnp.sort(a, 1), (3, 5), 1),
    "take_layer": (lambda a: lax.scan(lambda c, row: (c + row, None), jnp.zeros(5), a)[0], (3, 5), 0),
    "tile": (lambda a: jnp.tile(a, (1, 3)), (3, 5), 1),
    "top_k": (lambda a: lax.top_k(a, 5)[0], (3, 5), 1),
}


@pytest.mark.parametrize("name", COUNTER_EXAMPLES)
def test_axis_along_which_positions_meet_or_move_is_not_mapped(name):
    fn, shape, axis = COUNTER_EXAMPLES[name]
    is_flag = name in ("reduce_and", "reduce_or")
    program = trace(fn, jnp.zeros(shape, bool if is_flag else jnp.float32))
    eqn = next(eqn for eqn in program.equations if eqn.primitive == name)
    operand = len(eqn.inputs) - 1 if name.startswith("scatter") else 0
    axes = axis_map(eqn)
    assert axis in axes.mixed_axes(operand) | axes.reduced_axes(operand)
    assert axes.to_output[operand][axis] is None


_FLAGS = {"and": lax.bitwise_and, "or": lax.bitwise_or, "xor": lax.bitwise_xor, "not": lax.bitwise_not}
_ENTRY_BY_ENTRY = {
    **_FLAGS,
    "clamp": lambda a, b, c: lax.clamp(a, b, c),
    "convert_element_type": lambda a: lax.convert_element_type(a, jnp.float16),
    "copy": lax.copy_p.bind,
    "imag": lambda a: lax.imag(lax.complex(a, 2 * a)),
    "integer_pow": lambda a: lax.integer_pow(a, 3),
    "real": lambda a: lax.real(lax.complex(a, 2 * a)),
    "reduce_precision": lambda a: lax.reduce_precision(a, 8, 7),
    "select_n": lambda a, b, c: lax.select_n(a > 0.5, b, c),
}
_OPERANDS = {
    **dict.fromkeys(("clamp", "select_n"), 3),
    **dict.fromkeys(("add", "and", "atan2", "div", "eq", "ge", "gt", "le", "lt", "max", "min", "mul", "ne"), 2),
    **dict.fromkeys(("nextafter", "or", "pow", "rem", "sub", "xor"), 2),
    **dict.fromkeys(("shift_left", "shift_right_arithmetic", "shift_right_logical"), 2),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_an_entry_of_the_result_is_made_of_the_same_entry_of_each_operand(name):
    fn = _ENTRY_BY_ENTRY.get(name, getattr(lax, name, None))
    random = np.random.default_rng(0)
    is_integer = name in _FLAGS or name.startswith("shift")

    def draw():
        array = random.integers(1, 9, (3, 5)) if is_integer else random.uniform(0.2, 0.9, (3, 5))
        return jnp.asarray(array + (name == "acosh"), jnp.int32 if is_integer else jnp.float32)

    operands = [draw() for _ in range(_OPERANDS.get(name, 1))]
    (eqn,) = (eqn for eqn in trace(fn, *operands).equations if eqn.primitive == name)
    assert axis_map(eqn).to_output == ((0, 1),) * len(operands)
    for changed in range(len(operands)):
        others = [other.at[1, 3].set(draw()[1, 3]) if n == changed else other for n, other in enumerate(operands)]
        moved = np.asarray(fn(*operands)) != np.asarray(fn(*others))
        assert not np.delete(moved.ravel(), 1 * 5 + 3).any()


def test_every_rule_has_a_case_and_every_rule_that_can_mix_a_counter_example():
    cases = {eqn.primitive for fn, shapes in CASES.values() for eqn in trace(fn, *map(jnp.zeros, shapes)).equations}
    cannot_mix = {*ELEMENTWISE, "broadcast_in_dim", "iota", "squeeze", "stack", "transpose"}
    assert set(RULES) - {*cases, *ELEMENTWISE} == {"ragged_dot_general", "scatter", "scatter-add"}  # they keep no axis
    assert set(RULES) - cannot_mix == set(COUNTER_EXAMPLES)


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
