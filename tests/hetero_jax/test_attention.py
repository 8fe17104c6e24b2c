"""Paged attention in jax.numpy against the NumPy float64 definition: ragged chunks and decode rows."""

from __future__ import annotations

import dataclasses
import functools

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_jax import attention
from hetero_jax.attention import KVPool
from hetero_jax.rows import bucket, pack
from hetero_jax.scheduler_types import Batch, Chunk
from partition import AttentionSpec, reference_attention

NUM_PAGES = 40


def _spec(group: int = 3, dim: int = 8, v_dim: int = 8, window=None, softcap=None) -> AttentionSpec:
    return AttentionSpec(
        num_heads=2 * group, num_kv_heads=2, head_dim=dim, v_head_dim=v_dim, scale=0.3, window=window, softcap=softcap
    )


@functools.cache
def _jitted(spec: AttentionSpec):
    return jax.jit(functools.partial(attention.paged_attention, site=spec), donate_argnums=0)


class _Case:
    """Sequences with an earlier context and new rows, in pages drawn at random."""

    def __init__(self, spec, lengths, page_size, seed, dtype="float32"):
        self.spec, self.page_size, self.dtype = spec, page_size, np.dtype(dtype)
        self.random = np.random.default_rng(seed)
        free = list(np.random.default_rng(seed).permutation(NUM_PAGES))
        chunks = []
        for seq_id, (context, new) in enumerate(lengths):
            pages = tuple(int(free.pop()) for _ in range(-(-(context + new) // page_size)))
            chunks.append(Chunk(seq_id, context, new, True, (pages,)))
        self.batch = Batch(0, tuple(chunks))
        draw = lambda tokens, heads, dim: self.random.normal(size=(tokens, heads, dim)).astype(self.dtype)  # noqa: E731
        self.k = [draw(c + n, spec.num_kv_heads, spec.head_dim) for c, n in lengths]
        self.v = [draw(c + n, spec.num_kv_heads, spec.v_head_dim) for c, n in lengths]
        self.q = [draw(n, spec.num_heads, spec.head_dim) for _, n in lengths]
        self.sinks = np.linspace(-2, 3, spec.num_heads) if spec.has_sinks else None

    def pool(self) -> KVPool:
        """A pool of noise with the earlier contexts written to their pages."""
        shape = (NUM_PAGES, self.page_size, self.spec.num_kv_heads)
        k = self.random.normal(size=(*shape, self.spec.head_dim)).astype(self.dtype)
        v = self.random.normal(size=(*shape, self.spec.v_head_dim)).astype(self.dtype)
        for chunk, keys, values in zip(self.batch.chunks, self.k, self.v, strict=True):
            for position in range(chunk.start):
                page, offset = chunk.page_tables[0][position // self.page_size], position % self.page_size
                k[page, offset], v[page, offset] = keys[position], values[position]
        if self.dtype.itemsize == 2:
            k, v = k.view(np.uint16), v.view(np.uint16)
        return KVPool(k=jax.numpy.asarray(k), v=jax.numpy.asarray(v), dtype=self.dtype.name)

    def run(self):
        """(pool, out) of the kernel; rows that belong to no sequence are noise."""
        packed = pack(self.batch, lambda _, start, length: [0] * length, page_size=self.page_size)
        noise = len(packed.tokens) - packed.num_rows

        def rows(arrays):
            joined = np.concatenate(arrays)
            return np.concatenate([joined, np.ones((noise, *joined.shape[1:]), self.dtype)])

        k, v = ([a[c.start :] for a, c in zip(arrays, self.batch.chunks, strict=True)] for arrays in (self.k, self.v))
        layout = packed.layout.of_group(0)
        return _jitted(self.spec)(self.pool(), rows(self.q), rows(k), rows(v), layout, sinks=self.sinks)

    def expected(self) -> np.ndarray:
        found = []
        for chunk, q, k, v in zip(self.batch.chunks, self.q, self.k, self.v, strict=True):
            queries = np.arange(chunk.start, chunk.start + chunk.length)
            wide = (array.astype(np.float64) for array in (q, k, v))
            found.append(reference_attention(self.spec, *wide, queries, np.arange(len(k)), self.sinks))
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
    dataclasses.replace(_spec(), alibi_slopes=tuple(2.0**-i for i in range(6))),
    dataclasses.replace(_spec(group=1), has_sinks=True),
]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    spec=st.sampled_from(SPECS),
    lengths=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 40)), min_size=1, max_size=4),
    page_size=st.sampled_from([16, 32]),
    dtype=st.sampled_from([np.float32, ml_dtypes.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_prefill_chunks_and_decode_rows_in_one_call_equal_the_definition(spec, lengths, page_size, dtype, seed):
    case = _Case(spec, lengths, page_size, seed, dtype)
    _, out = case.run()
    rows = sum(new for _, new in lengths)
    tolerance = 1e-5 if dtype is np.float32 else 1e-2
    seen, expected = np.asarray(out, np.float64), case.expected()
    np.testing.assert_allclose(seen[:rows], expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
    assert not seen[rows:].any()


def test_a_chunk_longer_than_a_tile():
    case = _Case(_spec(), [(30, 200), (3, 1)], 16, 0)
    _, out = case.run()
    np.testing.assert_allclose(np.asarray(out)[:201], case.expected(), rtol=1e-4, atol=2e-5)


def test_small_pages():
    case = _Case(_spec(), [(5, 3), (0, 9)], 4, 1)
    _, out = case.run()
    np.testing.assert_allclose(np.asarray(out)[:12], case.expected(), rtol=1e-4, atol=2e-5)


def test_the_pool_holds_the_new_rows_and_no_other_place_changes():
    case = _Case(_spec(), [(20, 3), (0, 37)], 16, 1)
    state = case.random.bit_generator.state
    before = case.pool()
    case.random.bit_generator.state = state
    after, _ = case.run()

    changed = (np.asarray(after.k) != np.asarray(before.k)).any(axis=(2, 3))
    chunks = case.batch.chunks
    touched = {(c.page_tables[0][p // 16], p % 16) for c in chunks for p in range(c.start, c.start + c.length)}
    assert set(zip(*np.nonzero(changed), strict=True)) == touched
    first = case.batch.chunks[0]
    np.testing.assert_array_equal(np.asarray(after.k)[first.page_tables[0][20 // 16], 20 % 16], case.k[0][20])


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 1), (3, 4), (64, 64), (65, 128)])
def test_buckets_are_powers_of_two(count, expected):
    assert bucket(count) == expected
