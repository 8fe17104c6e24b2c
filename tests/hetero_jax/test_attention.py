"""paged_attention against the NumPy float64 definition: ragged chunks and decode rows, pages in any order."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_jax.attention import KVPool, make_pool, paged_attention
from hetero_jax.rows import bucket, pack
from hetero_jax.scheduler import Batch, Chunk
from partition import AttentionSpec, reference_attention

NUM_PAGES = 40


def _spec(group: int = 3, dim: int = 8, v_dim: int = 8, window=None, softcap=None) -> AttentionSpec:
    return AttentionSpec(
        num_heads=2 * group, num_kv_heads=2, head_dim=dim, v_head_dim=v_dim, scale=0.3, window=window, softcap=softcap
    )


@functools.cache
def _jitted(spec: AttentionSpec):
    return jax.jit(functools.partial(paged_attention, site=spec), donate_argnums=0)


class _Case:
    """Sequences with an earlier context and new rows, in pages drawn at random."""

    def __init__(self, spec, lengths, page_size, seed):
        self.spec, self.page_size = spec, page_size
        self.random = np.random.default_rng(seed)
        free = list(self.random.permutation(NUM_PAGES))
        chunks = []
        for seq_id, (context, new) in enumerate(lengths):
            pages = tuple(int(free.pop()) for _ in range(-(-(context + new) // page_size)))
            chunks.append(Chunk(seq_id, context, new, True, pages))
        self.batch = Batch(0, tuple(chunks))
        draw = lambda tokens, heads, dim: self.random.normal(size=(tokens, heads, dim)).astype(np.float32)  # noqa: E731
        self.k = [draw(c + n, spec.num_kv_heads, spec.head_dim) for c, n in lengths]
        self.v = [draw(c + n, spec.num_kv_heads, spec.v_head_dim) for c, n in lengths]
        self.q = [draw(n, spec.num_heads, spec.head_dim) for _, n in lengths]

    def pool(self) -> KVPool:
        """A pool of noise with the earlier contexts written to their pages."""
        empty = make_pool(
            self.spec, num_pages=NUM_PAGES, page_size=self.page_size, dtype=np.float32, device=jax.devices("cpu")[0]
        )
        k, v = (self.random.normal(size=array.shape).astype(np.float32) for array in (empty.k, empty.v))
        for chunk, keys, values in zip(self.batch.chunks, self.k, self.v, strict=True):
            for position in range(chunk.start):
                page, offset = chunk.pages[position // self.page_size], position % self.page_size
                k[page, offset], v[page, offset] = keys[position], values[position]
        return KVPool(k=jax.numpy.asarray(k), v=jax.numpy.asarray(v), dtype="float32")

    def run(self):
        packed = pack(self.batch, lambda *_: [0], page_size=self.page_size, num_pages=NUM_PAGES)
        rows = len(packed.tokens)

        def new_rows(arrays):
            joined = np.concatenate([a[c.start :] for a, c in zip(arrays, self.batch.chunks, strict=True)])
            return np.concatenate([joined, self.random.normal(size=(rows - len(joined), *joined.shape[1:]))]).astype(
                "f4"
            )

        q = np.concatenate(self.q)
        q = np.concatenate([q, np.ones((rows - len(q), *q.shape[1:]))]).astype(np.float32)
        return _jitted(self.spec)(self.pool(), q, new_rows(self.k), new_rows(self.v), packed.layout)

    def expected(self) -> np.ndarray:
        found = []
        for chunk, q, k, v in zip(self.batch.chunks, self.q, self.k, self.v, strict=True):
            queries = np.arange(chunk.start, chunk.start + chunk.length)
            wide = (array.astype(np.float64) for array in (q, k, v))
            found.append(reference_attention(self.spec, *wide, queries, np.arange(len(k))))
        return np.concatenate(found)


SPECS = [_spec(), _spec(group=1), _spec(window=5), _spec(softcap=1.5), _spec(dim=4, v_dim=16)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    spec=st.sampled_from(SPECS),
    lengths=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 12)), min_size=1, max_size=5),
    page_size=st.sampled_from([4, 8]),
    seed=st.integers(0, 2**16),
)
def test_prefill_chunks_and_decode_rows_in_one_call_equal_the_definition(spec, lengths, page_size, seed):
    case = _Case(spec, lengths, page_size, seed)
    _, out = case.run()
    rows = sum(new for _, new in lengths)
    np.testing.assert_allclose(np.asarray(out)[:rows], case.expected(), rtol=1e-4, atol=2e-5)
    assert not np.asarray(out)[rows:].any()


def test_a_chunk_longer_than_a_tile():
    case = _Case(_spec(), [(30, 100), (3, 1)], 8, 0)
    _, out = case.run()
    np.testing.assert_allclose(np.asarray(out)[:101], case.expected(), rtol=1e-4, atol=2e-5)


def test_the_pool_holds_the_new_rows_and_no_other_page_changes():
    case = _Case(_spec(), [(5, 3), (0, 9)], 4, 1)
    state = case.random.bit_generator.state
    before = case.pool()
    case.random.bit_generator.state = state
    after, _ = case.run()
    touched = {(c.pages[p // 4], p % 4) for c in case.batch.chunks for p in range(c.start, c.start + c.length)}
    for page in range(NUM_PAGES):
        for offset in range(4):
            same = np.array_equal(after.k[page, offset], before.k[page, offset])
            assert same != ((page, offset) in touched)
    first = case.batch.chunks[0]
    np.testing.assert_array_equal(after.v[first.pages[5 // 4], 5 % 4], case.v[0][5])


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 1), (3, 4), (64, 64), (65, 128)])
def test_buckets_are_powers_of_two(count, expected):
    assert bucket(count) == expected
