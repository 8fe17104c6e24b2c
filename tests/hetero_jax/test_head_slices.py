"""Slices of heads: what workers compute from their descriptions, side by side, is what the whole site computes."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from hetero_jax import native_attention
from hetero_jax.described_site import read_descriptions
from hetero_jax.head_slices import describe_slice, most_slices, slice_heads
from paged_case import PagedCase, Sequence
from partition import AttentionSpec
from partition.attention_spec import reference_attention

SPECS = {
    "multi-head": AttentionSpec(num_heads=4, num_kv_heads=4, head_dim=8, v_head_dim=8, scale=0.3),
    "grouped, uneven": AttentionSpec(num_heads=24, num_kv_heads=8, head_dim=4, v_head_dim=6, scale=0.5, window=3),
    "biases": AttentionSpec(
        num_heads=6,
        num_kv_heads=3,
        head_dim=4,
        v_head_dim=2,
        scale=1.0,
        softcap=5.0,
        alibi_slopes=tuple(float(np.float32(2.0**-n / 3)) for n in range(6)),
    ),
    "sinks": AttentionSpec(num_heads=10, num_kv_heads=5, head_dim=3, v_head_dim=4, scale=0.7, has_sinks=True),
}
SINKS = [float(np.float32(n / 7 - 1)) for n in range(10)]


def _described(spec: AttentionSpec, pool: int = 0) -> dict:
    slopes = spec.alibi_slopes
    return {
        **dataclasses.asdict(spec),
        "alibi_slopes": None if slopes is None else " ".join(map(str, slopes)),
        "sink_scores": " ".join(map(str, SINKS)) if spec.has_sinks else "",
        "group": 0,
        "pool": pool,
        "page_size": 16,
        "kv_cache_dtype": "float32",
    }


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_slices_side_by_side_are_the_whole(spec, count):
    draw = np.random.default_rng(0)
    q, k, v = (
        draw.normal(size=(9, heads, dim))
        for heads, dim in (
            (spec.num_heads, spec.head_dim),
            (spec.num_kv_heads, spec.head_dim),
            (spec.num_kv_heads, spec.v_head_dim),
        )
    )
    at = np.arange(9)
    sinks = np.asarray(SINKS) if spec.has_sinks else None
    whole, parts = _described(spec, pool=1), []
    for index in range(count):
        heads = slice_heads(whole, index, count)
        (site,) = read_descriptions([describe_slice(whole, heads)], (), allow_exported_sites=False)
        scores = np.asarray(site.sink_scores) if spec.has_sinks else None
        parts.append(reference_attention(site.spec, q[:, heads.q], k[:, heads.kv], v[:, heads.kv], at, at, scores))
    expected = reference_attention(spec, q, k, v, at, at, sinks)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, rtol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_kernel_gives_slices_the_bits_of_the_whole(dtype):
    device = jax.local_devices(backend="cpu")[0]
    if (why := native_attention.refusal(dtype=dtype, device=device)) is not None:
        pytest.skip(why)
    lengths = [Sequence(700, 1), Sequence(0, 150), Sequence(90, 70), Sequence(40, 1)]
    spec, parts = dataclasses.replace(SPECS["grouped, uneven"], window=None), []
    whole = PagedCase(lengths, spec)
    for index in range(3):
        heads = slice_heads(_described(spec), index, 3)
        (site,) = read_descriptions([describe_slice(_described(spec), heads)], (), allow_exported_sites=False)
        part = PagedCase(lengths, site.spec)
        for name, cut in (("q", heads.q), ("k", heads.kv), ("v", heads.kv)):
            setattr(part, name, [array[:, cut] for array in getattr(whole, name)])
        parts.append(part.run(device, dtype=dtype)[0])
    for out, *found in zip(whole.run(device, dtype=dtype)[0], *parts, strict=True):
        np.testing.assert_array_equal(np.concatenate(found, axis=1), out)


def _sizes(num_kv_heads: int, count: int, pool: int) -> list[int]:
    site = _described(dataclasses.replace(SPECS["multi-head"], num_heads=num_kv_heads, num_kv_heads=num_kv_heads), pool)
    parts = [slice_heads(site, index, count).kv for index in range(count)]
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    return [part.stop - part.start for part in parts]


def test_slices_are_as_even_as_heads_and_pools_allow():
    assert _sizes(8, 3, 0) == [3, 3, 2]
    assert _sizes(8, 4, 5) == [2, 2, 2, 2]
    assert [_sizes(3, 2, pool) for pool in range(2)] == [[2, 1], [1, 2]]
    for num_kv_heads, count in ((8, 3), (7, 5), (3, 2), (5, 5)):
        over_pools = np.sum([_sizes(num_kv_heads, count, pool) for pool in range(count)], axis=0)
        assert over_pools.tolist() == [num_kv_heads] * count


def test_no_more_slices_than_the_site_with_fewest_heads_has():
    assert most_slices([_described(spec) for spec in SPECS.values()]) == 3
