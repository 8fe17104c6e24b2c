"""Pages as bytes, beside NumPy's indexing of the whole pool."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetero_jax import attention, native_attention
from hetero_jax.errors import ConfigError
from hetero_jax.pool_pages import page_format, read_pages, write_pages
from partition import AttentionSpec

NUM_PAGES = 7
SPEC = AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=24, v_head_dim=16, scale=24**-0.5)


def _pool(module, dtype: str, *, seed: int = 0, page_size: int = 16):
    """Of random bits, whatever numbers they are."""
    cpu = jax.local_devices(backend="cpu")[0]
    pool = module.make_pool(SPEC, num_pages=NUM_PAGES, page_size=page_size, dtype=jnp.dtype(dtype), device=cpu)
    chance = np.random.default_rng(seed)

    def fill(array: jax.Array) -> jax.Array:
        return jnp.asarray(np.frombuffer(chance.bytes(array.nbytes), array.dtype).reshape(array.shape))

    return jax.tree.map(fill, pool)


def _bytes(pools) -> list[np.ndarray]:
    """[pages, bytes] of each array."""
    return [np.array(array).reshape(NUM_PAGES, -1).view(np.uint8) for array in jax.tree.leaves(pools)]


@pytest.mark.parametrize(
    ("module", "dtype"),
    [
        *((native_attention, dtype) for dtype in ("float32", "bfloat16", "float16", "int8")),
        *((attention, dtype) for dtype in ("float32", "bfloat16")),
    ],
)
def test_pages_arrive_with_every_bit_and_touch_no_other(module, dtype):
    ours = [_pool(module, dtype, seed=seed) for seed in (0, 1)]
    theirs = [_pool(module, dtype, seed=seed) for seed in (2, 3)]
    expected = _bytes(theirs)
    for array, source in zip(expected, _bytes(ours), strict=True):
        array[[5, 1, 6]] = source[[3, 0, 4]]
    contents = read_pages(ours, np.array([3, 0, 4]))
    written = write_pages(theirs, np.array([5, 1, 6]), contents)
    assert jax.tree.structure(written) == jax.tree.structure(ours)
    for found, array in zip(_bytes(written), expected, strict=True):
        np.testing.assert_array_equal(found, array)


def test_pools_of_attention_without_a_kernel_may_hold_flags():
    flags = np.random.default_rng(0).integers(0, 2, (2, NUM_PAGES, 16)).astype(bool)
    (pool,) = write_pages(
        [(jnp.asarray(flags[1]),)], np.array([5]), read_pages([(jnp.asarray(flags[0]),)], np.array([3]))
    )
    flags[1, 5] = flags[0, 3]
    np.testing.assert_array_equal(pool[0], flags[1])


def test_a_page_is_written_where_the_pool_is():
    pool = jax.block_until_ready(_pool(native_attention, "bfloat16"))
    before = pool.kv.unsafe_buffer_pointer()
    (written,) = write_pages([pool], np.array([2]), read_pages([pool], np.array([1])))
    assert jax.block_until_ready(written).kv.unsafe_buffer_pointer() == before


def test_formats_differ_where_bytes_mean_something_else():
    native = [_pool(native_attention, "float32")]
    assert page_format(native) == page_format([_pool(native_attention, "float32", seed=1)])
    others = [
        [_pool(native_attention, "bfloat16")],
        [_pool(native_attention, "float32", page_size=32)],
        [_pool(attention, "float32")],
        native * 2,
    ]
    assert page_format(native) not in map(page_format, others)


@pytest.mark.parametrize(
    ("pages", "rows", "message"),
    [
        (np.array([1, 7]), (2, 5120), "page 7; allowed: 0 to 6"),
        (np.array([-1]), (1, 5120), "page -1; allowed: 0 to 6"),
        (np.array([1], np.int32), (1, 5120), r"page numbers int32\(1,\); allowed: int64 with one axis"),
        (np.array([[1]]), (1, 5120), r"page numbers int64\(1, 1\)"),
        (np.array([1]), (2, 5120), r"contents of pages \[\(\(2, 5120\), 'uint8'\)\]; allowed for these pools"),
        (np.array([1]), (1, 5119), "contents of pages"),
    ],
)
def test_what_is_no_page_of_the_pools_is_refused(pages, rows, message):
    pools = [_pool(native_attention, "float32")]
    with pytest.raises(ConfigError, match=message):
        write_pages(pools, pages, [np.zeros(rows, np.uint8)])
    if "page" in message[:5]:
        with pytest.raises(ConfigError, match=message):
            read_pages(pools, pages)
