"""The native attention kernel against float64 NumPy, for every instruction set that this machine runs."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_jax import native_attention as native
from paged_case import PagedCase, Sequence
from partition import AttentionSpec

DEVICE = jax.devices("cpu")[0]
ISAS = native.usable_isas()


def _spec(group: int, kv_heads: int, dim: int, v_dim: int, window=None, softcap=None) -> AttentionSpec:
    return AttentionSpec(
        num_heads=group * kv_heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        v_head_dim=v_dim,
        scale=dim**-0.5,
        window=window,
        softcap=softcap,
    )


def _int8(rows: np.ndarray) -> np.ndarray:
    """What an int8 pool with one scale per token and head gives back for f32 rows."""
    largest = np.abs(rows).max(axis=-1, keepdims=True)
    steps = rows * (np.float32(127) / largest)
    return np.trunc(steps + np.copysign(np.float32(0.5), steps)) * (largest / np.float32(127))


# How far from the definition over what the pool holds: accumulation in f32 for all; with AVX-512's dot products of
# bfloat16 the queries and weights are rounded to that type too, with those of bytes to 16 bits.
HELD = {
    "float32": (lambda rows: rows, 1e-5),
    "float16": (lambda rows: rows.astype(np.float16), 1e-5),
    "int8": (_int8, 2e-4),
    "bfloat16": (lambda rows: rows.astype(ml_dtypes.bfloat16), 1e-2),
}

sequences = st.lists(
    st.builds(
        Sequence, st.sampled_from([0, 1, 15, 16, 100, 255, 256, 257, 700]), st.sampled_from([0, 1, 2, 5, 16, 70])
    ),
    min_size=0,
    max_size=5,
)
specs = st.builds(
    _spec,
    st.integers(1, 16),
    st.integers(1, 3),
    st.sampled_from([32, 33, 64, 80, 128, 256]),
    st.sampled_from([32, 40, 64, 128]),
    window=st.sampled_from([None, 1, 7, 256, 300]),
    softcap=st.sampled_from([None, 3.0, 50.0]),
)


def _assert_close(found: list[np.ndarray], expected: list[np.ndarray], bound: float) -> None:
    for seen, wanted in zip(found, expected, strict=True):
        if wanted.size:
            np.testing.assert_allclose(seen, wanted, rtol=bound, atol=bound * np.abs(wanted).max())


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(sequences, specs, st.sampled_from([1, 5, 16, 24, 32]), st.sampled_from(list(HELD)), st.integers(0, 2**16))
def test_equals_the_definition(isa, sequences, spec, page_size, dtype, seed) -> None:
    held, bound = HELD[dtype]
    case = PagedCase(sequences, spec, page_size=page_size, seed=seed, page_seed=seed + 1)
    found, padding, _ = case.run(DEVICE, dtype=dtype, isa=isa)
    _assert_close(found, case.expected(round_kv=held), bound)
    assert not padding.any()


MIXED = [Sequence(1200, 1), Sequence(0, 150), Sequence(300, 5), Sequence(0, 1), Sequence(2, 0), Sequence(700, 40)]


@pytest.mark.parametrize("isa", ISAS)
def test_bfloat16_rows(isa) -> None:
    case = PagedCase(MIXED, _spec(3, 2, 64, 48), dtype=ml_dtypes.bfloat16)
    found, _, _ = case.run(DEVICE, dtype="bfloat16", isa=isa)
    _assert_close(found, case.expected(), 1e-2)


@pytest.mark.parametrize("isa", ISAS)
def test_slopes_and_sinks(isa) -> None:
    slopes, sinks = np.linspace(0.01, 0.5, 6), np.linspace(-2, 3, 6)
    case = PagedCase(MIXED, dataclasses.replace(_spec(3, 2, 64, 48), alibi_slopes=tuple(slopes.tolist())))
    found, _, _ = case.run(DEVICE, isa=isa, sinks=sinks)
    _assert_close(found, case.expected(sinks=sinks), 1e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_log_sum_exp(isa) -> None:
    case = PagedCase(MIXED, _spec(3, 2, 64, 48))
    _assert_close(case.run(DEVICE, isa=isa)[2], case.expected_lse(), 1e-5)


def _bits(case: PagedCase, **options) -> list[bytes]:
    return [out.tobytes() for out in case.run(DEVICE, **options)[0]]


@pytest.mark.parametrize("dtype", list(HELD))
@pytest.mark.parametrize("isa", ISAS)
def test_bits_do_not_depend_on_threads_rows_or_pages(isa, dtype) -> None:
    spec = _spec(4, 2, 64, 64, window=900)
    make = functools.partial(PagedCase, MIXED, spec)
    run = functools.partial(_bits, dtype=dtype, isa=isa)
    one = run(make(), threads=1)
    assert run(make(), threads=2) == one
    assert run(make(page_seed=5, order=[3, 1, 5, 0, 2, 4], padding=9)) == one


@pytest.mark.parametrize("dtype", list(HELD))
@pytest.mark.parametrize("isa", ISAS)
def test_a_decoded_row_has_the_bits_of_a_prefilled_one(isa, dtype) -> None:
    spec = _spec(4, 2, 64, 64)
    prefilled = PagedCase([Sequence(0, 601)], spec).run(DEVICE, dtype=dtype, isa=isa)[0][0]
    decoded = PagedCase([Sequence(600, 1)], spec).run(DEVICE, dtype=dtype, isa=isa)[0][0]
    assert prefilled[-1:].tobytes() == decoded.tobytes()


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(sequences, specs, st.sampled_from([1, 5, 16, 24, 128]), st.sampled_from(list(HELD)), st.integers(0, 2**16))
def test_queries_ahead_of_keys_and_values_change_no_bit(isa, sequences, spec, page_size, dtype, seed) -> None:
    case = PagedCase(sequences, spec, page_size=page_size, seed=seed)
    sinks = np.linspace(-1, 2, spec.num_heads, dtype=np.float32)
    runs = [case.run(DEVICE, dtype=dtype, isa=isa, sinks=sinks, ahead=ahead) for ahead in (False, True)]
    whole, split = ([row.tobytes() for row in (*out, padding, *lse)] for out, padding, lse in runs)
    assert split == whole


def test_bits_do_not_depend_on_how_a_sequence_stands_among_others() -> None:
    spec = _spec(2, 2, 32, 32)
    together = _bits(PagedCase(MIXED, spec))
    first = PagedCase(MIXED[:1], spec)  # the same numbers: the first sequence is drawn first, but per array
    case = PagedCase(MIXED, spec)
    first.q, first.k, first.v = ([rows[0]] for rows in (case.q, case.k, case.v))
    assert _bits(first)[0] == together[0]


@st.composite
def trees(draw) -> tuple[list[Sequence], dict[int, tuple[int, int]]]:
    """Sequences that begin as others do, which may begin as others do."""
    sequences = draw(
        st.lists(
            st.builds(Sequence, st.sampled_from([0, 100, 256, 500, 512, 1100]), st.sampled_from([0, 1, 3, 40])),
            min_size=2,
            max_size=7,
        )
    )
    prefixes = {}
    for index in range(1, len(sequences)):
        parent = draw(st.integers(0, index - 1))
        most = min(sequences[parent].old, sequences[index].old)
        prefixes[index] = (parent, draw(st.sampled_from(sorted({0, min(256, most), min(530, most), most}))))
    return sequences, prefixes


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    trees(),
    st.sampled_from([1, 3, 8, 16]),
    st.sampled_from([5, 16, 32]),
    st.sampled_from(list(HELD)),
    st.sampled_from([None, 300]),
)
def test_a_shared_prefix_has_the_bits_of_copies_of_its_own(isa, tree, group, page_size, dtype, window) -> None:
    sequences, prefixes = tree
    make = functools.partial(
        PagedCase, sequences, _spec(group, 2, 32, 48, window=window), prefixes=prefixes, page_size=page_size
    )
    held, bound = HELD[dtype]
    found, _, _ = make().run(DEVICE, dtype=dtype, isa=isa)
    _assert_close(found, make().expected(round_kv=held), bound)
    for other in (
        make(share=False).run(DEVICE, dtype=dtype, isa=isa),
        make().run(DEVICE, dtype=dtype, isa=isa, ahead=True),
    ):
        assert [rows.tobytes() for rows in other[0]] == [rows.tobytes() for rows in found]


def test_noise_in_freed_pages_does_not_reach_the_output() -> None:
    case = PagedCase([Sequence(20, 1)], _spec(2, 2, 32, 32))
    pool = native.make_pool(case.spec, num_pages=case.num_pages, page_size=16, dtype="float32", device=DEVICE)
    pool = dataclasses.replace(pool, kv=pool.kv + np.nan)
    for old in (True, False):
        layout, q, k, v = case.rows(old=old)
        pool, out = native.paged_attention(pool, q, k, v, layout, case.spec)
    _assert_close([np.asarray(out)[:1]], case.expected(), 1e-5)


BAD_LAYOUTS = {
    "page": ({"page_table": np.full((2, 2), 99, np.int32)}, "page"),
    "negative page": ({"page_table": np.full((2, 2), -1, np.int32)}, "page"),
    "rows past the call": ({"first_row": np.array([3, 0], np.int32)}, "rows 3 to 8; allowed: 0 to 7"),
    "negative rows": ({"num_rows": np.array([-1, 0], np.int32)}, "rows"),
    "context past the table": ({"context": np.array([33, 0], np.int32)}, "context of 33; allowed: 5"),
    "context shorter than its rows": ({"context": np.array([4, 0], np.int32)}, "context of 4; allowed: 5"),
    "negative slot": ({"row_slot": np.full(7, -1, np.int32)}, "slot -1"),
}


def _bad_call(change: dict[str, np.ndarray]):
    case = PagedCase([Sequence(0, 5)], _spec(2, 2, 32, 32), padding=2)
    pool = native.make_pool(case.spec, num_pages=case.num_pages, page_size=16, dtype="float32", device=DEVICE)
    layout, q, k, v = case.rows(old=False)
    return case.spec, pool, q, k, v, dataclasses.replace(layout, **change)


@pytest.mark.parametrize("name", BAD_LAYOUTS)
def test_a_layout_that_does_not_fit_is_refused_before_the_call(name) -> None:
    change, message = BAD_LAYOUTS[name]
    spec, *arguments = _bad_call(change)
    with pytest.raises(ValueError, match=message):
        native.paged_attention(*arguments, spec)


@pytest.mark.parametrize("name", BAD_LAYOUTS)
def test_a_layout_that_reaches_the_kernel_is_an_error_and_no_crash(name) -> None:
    change, message = BAD_LAYOUTS[name]
    spec, *arguments = _bad_call(change)
    call = jax.jit(functools.partial(native.paged_attention, site=spec))
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(call(*arguments))


def test_shapes_that_do_not_fit_are_refused() -> None:
    spec, pool, q, k, v, layout = _bad_call({})
    with pytest.raises(ValueError, match=r"q has shape \(7, 4, 31\); allowed: \(7, 4, 32\)"):
        native.paged_attention(pool, q[..., 1:], k, v, layout, spec)
    with pytest.raises(ValueError, match="allowed: float32 or bfloat16"):
        native.paged_attention(pool, q.astype(np.float16), k, v, layout, spec)
    with pytest.raises(ValueError, match=r"sinks has shape \(3,\); allowed: \(4,\)"):
        native.paged_attention(pool, q, k, v, layout, spec, sinks=np.zeros(3))


def test_an_unknown_instruction_set_is_an_error() -> None:
    spec, *arguments = _bad_call({})
    with pytest.raises(jax.errors.JaxRuntimeError, match=r'no kernels "sse9"; allowed: .*plain'):
        jax.block_until_ready(native.paged_attention(*arguments, spec, isa="sse9"))


def test_the_environment_forces_an_instruction_set() -> None:
    code = "import test_native_attention as t; spec, *rest = t._bad_call({}); "
    code += "t.jax.block_until_ready(t.native.paged_attention(*rest, spec))"
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    for isa, succeeds in (("plain", True), ("sse9", False)):
        environment = {**os.environ, "PYTHONPATH": path, "HETERO_JAX_ISA": isa}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode == 0) == succeeds, done.stderr
        assert succeeds or "sse9" in done.stderr
