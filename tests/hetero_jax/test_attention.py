"""Paged attention, in jax.numpy and native, against the NumPy float64 definition: ragged chunks and decode rows."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_jax import attention, native_attention
from hetero_jax.attention import KVPool
from hetero_jax.rows import bucket, pack
from hetero_jax.scheduler import Batch, Chunk
from partition import AttentionSpec, reference_attention

NUM_PAGES = 40
KERNELS = {"jax.numpy": attention, "native": native_attention}


def _spec(group: int = 3, dim: int = 8, v_dim: int = 8, window=None, softcap=None) -> AttentionSpec:
    return AttentionSpec(
        num_heads=2 * group, num_kv_heads=2, head_dim=dim, v_head_dim=v_dim, scale=0.3, window=window, softcap=softcap
    )


@functools.cache
def _jitted(kernel: str, spec: AttentionSpec):
    return jax.jit(functools.partial(KERNELS[kernel].paged_attention, site=spec), donate_argnums=0)


class _Case:
    """Sequences with an earlier context and new rows, in pages drawn at random."""

    def __init__(self, kernel, spec, lengths, page_size, seed, dtype="float32", pages_seed=None):
        self.kernel, self.spec, self.page_size, self.dtype = kernel, spec, page_size, np.dtype(dtype)
        self.random = np.random.default_rng(seed)
        free = list(np.random.default_rng(seed if pages_seed is None else pages_seed).permutation(NUM_PAGES))
        chunks = []
        for seq_id, (context, new) in enumerate(lengths):
            pages = tuple(int(free.pop()) for _ in range(-(-(context + new) // page_size)))
            chunks.append(Chunk(seq_id, context, new, True, pages))
        self.batch = Batch(0, tuple(chunks))
        draw = lambda tokens, heads, dim: self.random.normal(size=(tokens, heads, dim)).astype(self.dtype)  # noqa: E731
        self.k = [draw(c + n, spec.num_kv_heads, spec.head_dim) for c, n in lengths]
        self.v = [draw(c + n, spec.num_kv_heads, spec.v_head_dim) for c, n in lengths]
        self.q = [draw(n, spec.num_heads, spec.head_dim) for _, n in lengths]

    def pool(self) -> KVPool:
        """A pool of noise with the earlier contexts written to their pages."""
        shape = (NUM_PAGES, self.page_size, self.spec.num_kv_heads)
        k = self.random.normal(size=(*shape, self.spec.head_dim)).astype(self.dtype)
        v = self.random.normal(size=(*shape, self.spec.v_head_dim)).astype(self.dtype)
        for chunk, keys, values in zip(self.batch.chunks, self.k, self.v, strict=True):
            for position in range(chunk.start):
                page, offset = chunk.pages[position // self.page_size], position % self.page_size
                k[page, offset], v[page, offset] = keys[position], values[position]
        if self.kernel == "native":
            k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
        elif self.dtype.itemsize == 2:
            k, v = k.view(np.uint16), v.view(np.uint16)
        return KVPool(k=jax.numpy.asarray(k), v=jax.numpy.asarray(v), dtype=self.dtype.name)

    def run(self):
        """(pool, out) of the kernel; rows that belong to no sequence are noise."""
        packed = pack(self.batch, lambda *_: [0], page_size=self.page_size, num_pages=NUM_PAGES)
        noise = len(packed.tokens) - packed.num_rows

        def rows(arrays):
            joined = np.concatenate(arrays)
            return np.concatenate([joined, np.ones((noise, *joined.shape[1:]), self.dtype)])

        k, v = ([a[c.start :] for a, c in zip(arrays, self.batch.chunks, strict=True)] for arrays in (self.k, self.v))
        return _jitted(self.kernel, self.spec)(self.pool(), rows(self.q), rows(k), rows(v), packed.layout)

    def expected(self) -> np.ndarray:
        found = []
        for chunk, q, k, v in zip(self.batch.chunks, self.q, self.k, self.v, strict=True):
            queries = np.arange(chunk.start, chunk.start + chunk.length)
            wide = (array.astype(np.float64) for array in (q, k, v))
            found.append(reference_attention(self.spec, *wide, queries, np.arange(len(k))))
        return np.concatenate(found)


SPECS = [
    _spec(),
    _spec(group=1, dim=64, v_dim=64),
    _spec(group=16, dim=32, v_dim=48),
    _spec(group=4, dim=128, v_dim=128),
    _spec(window=5),
    _spec(group=2, window=70),
    _spec(softcap=1.5),
    _spec(dim=4, v_dim=20),
]


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    spec=st.sampled_from(SPECS),
    lengths=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 40)), min_size=1, max_size=4),
    page_size=st.sampled_from([16, 32]),
    dtype=st.sampled_from([np.float32, ml_dtypes.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_prefill_chunks_and_decode_rows_in_one_call_equal_the_definition(kernel, spec, lengths, page_size, dtype, seed):
    case = _Case(kernel, spec, lengths, page_size, seed, dtype)
    _, out = case.run()
    rows = sum(new for _, new in lengths)
    tolerance = 1e-5 if dtype is np.float32 else 1e-2
    seen, expected = np.asarray(out, np.float64), case.expected()
    np.testing.assert_allclose(seen[:rows], expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
    assert not seen[rows:].any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_chunk_longer_than_a_tile(kernel):
    case = _Case(kernel, _spec(), [(30, 200), (3, 1)], 16, 0)
    _, out = case.run()
    np.testing.assert_allclose(np.asarray(out)[:201], case.expected(), rtol=1e-4, atol=2e-5)


def test_pages_smaller_than_the_native_kernel_takes():
    case = _Case("jax.numpy", _spec(), [(5, 3), (0, 9)], 4, 1)
    _, out = case.run()
    np.testing.assert_allclose(np.asarray(out)[:12], case.expected(), rtol=1e-4, atol=2e-5)
    reason = native_attention.refusal(page_size=4, dtype="float32", device=jax.devices("cpu")[0])
    assert reason is not None and "page_size=4" in reason


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_pool_holds_the_new_rows_and_no_other_place_changes(kernel):
    case = _Case(kernel, _spec(), [(20, 3), (0, 37)], 16, 1)
    state = case.random.bit_generator.state
    before = case.pool()
    case.random.bit_generator.state = state
    after, _ = case.run()

    def token_major(pool):
        return np.asarray(pool.k).transpose(0, 3, 1, 2) if kernel == "native" else np.asarray(pool.k)

    changed = (token_major(after) != token_major(before)).any(axis=(2, 3))
    touched = {(c.pages[p // 16], p % 16) for c in case.batch.chunks for p in range(c.start, c.start + c.length)}
    assert set(zip(*np.nonzero(changed), strict=True)) == touched
    first = case.batch.chunks[0]
    np.testing.assert_array_equal(token_major(after)[first.pages[20 // 16], 20 % 16], case.k[0][20])


LENGTHS = [(0, 50), (300, 1), (17, 1), (63, 20), (130, 1)]


def _bits(spec=SPECS[3], order=None, pages_seed=None) -> list[bytes]:
    """Output bytes of each sequence of one call; `order` permutes the sequences, `pages_seed` their pages."""
    case = _Case("native", spec, LENGTHS, 16, 3, pages_seed=pages_seed)
    order = list(order or range(len(LENGTHS)))
    case.batch = Batch(0, tuple(dataclasses.replace(case.batch.chunks[i]) for i in order))
    case.q, case.k, case.v = ([arrays[i] for i in order] for arrays in (case.q, case.k, case.v))
    out = np.asarray(case.run()[1])
    starts = np.cumsum([0, *(LENGTHS[i][1] for i in order)])
    found = {i: out[starts[n] : starts[n + 1]].tobytes() for n, i in enumerate(order)}
    return [found[i] for i in sorted(found)]


def test_bits_do_not_depend_on_the_order_of_rows_or_on_page_numbers():
    assert _bits() == _bits(order=[3, 1, 4, 0, 2]) == _bits(pages_seed=99)


def test_bits_do_not_depend_on_what_shares_the_call():
    alone = [_bits(order=[i])[0] for i in range(len(LENGTHS))]
    assert alone == _bits()


def _digest_in_own_process(cores: int, **env: str) -> str:
    code = (
        f"import os; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:{cores}]); import test_attention as t; "
    )
    code += "print(t.hashlib.sha256(b''.join(t._bits())).hexdigest())"
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def test_bits_do_not_depend_on_the_number_of_threads():
    assert _digest_in_own_process(1) == hashlib.sha256(b"".join(_bits())).hexdigest()


def _flags() -> set[str]:
    with open("/proc/cpuinfo") as file:
        return set(next((line for line in file if line.startswith("flags")), "").split())


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
def test_every_instruction_set_of_this_machine_equals_the_definition(isa):
    if isa != "plain" and not _flags() >= {"avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512bw"}}[isa]:
        with pytest.raises(AssertionError, match="no instruction set of this machine"):
            _digest_in_own_process(2, HETERO_JAX_ISA=isa)
        return
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "native and definition"]
    done = subprocess.run(
        command, env={**os.environ, "HETERO_JAX_ISA": isa}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_table": np.full((8, 4), NUM_PAGES, np.int32)}, "names a page outside the pool"),
        ({"page_table": np.full((8, 4), -1, np.int32)}, "names a page outside the pool"),
        ({"context": np.full(8, 65, np.int32)}, "do not fit the call"),
        ({"context": np.full(8, 0, np.int32)}, "do not fit the call"),
        ({"num_rows": np.full(8, 9, np.int32)}, "do not fit the call"),
        ({"first_row": np.full(8, -1, np.int32)}, "do not fit the call"),
        ({"row_slot": np.full(8, -1, np.int32)}, "row_slot is negative"),
    ],
)
def test_tables_that_do_not_fit_the_pool_are_an_error_and_no_crash(change, message):
    case = _Case("native", _spec(), [(5, 2)], 16, 0)
    layout = pack(case.batch, lambda *_: [0], page_size=16, num_pages=NUM_PAGES).layout
    rows = np.ones((8, 6, 8), np.float32), np.ones((8, 2, 8), np.float32), np.ones((8, 2, 8), np.float32)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(_jitted("native", _spec())(case.pool(), *rows, dataclasses.replace(layout, **change)))


def test_shapes_that_do_not_fit_are_refused_before_the_call():
    case = _Case("native", _spec(), [(5, 2)], 16, 0)
    layout = pack(case.batch, lambda *_: [0], page_size=16, num_pages=NUM_PAGES).layout
    q, kv = np.ones((8, 6, 8), np.float32), np.ones((8, 2, 8), np.float32)
    with pytest.raises(ValueError, match=r"q has shape \(8, 6, 4\); allowed: \(8, 6, 8\)"):
        native_attention.paged_attention(case.pool(), q[..., :4], kv, kv, layout, _spec())
    with pytest.raises(ValueError, match="all float32 or all bfloat16"):
        native_attention.paged_attention(case.pool(), q.astype(np.float64), kv, kv, layout, _spec())


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 1), (3, 4), (64, 64), (65, 128)])
def test_buckets_are_powers_of_two(count, expected):
    assert bucket(count) == expected
