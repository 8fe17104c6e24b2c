"""Attention by loops over chunks of keys is the attention that it computes; any other loop over chunks is refused."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo_chunks as chunks
from cached_decoding import decode
from partition import PartitionError, TokenMixingError, UnsupportedSiteError, partition
from small_model import SmallModel

# name -> (attention, whether kernels know it, its window)
ACCEPTED = {
    "scan": (chunks.by_scan, True, None),
    "scan, with a window": (functools.partial(chunks.by_scan, lowest=-1e30, window=9), True, 9),
    "one chunk": (functools.partial(chunks.by_scan, chunk=512), True, None),
    "fori_loop": (chunks.by_fori_loop, True, None),
    "chunks of queries and keys": (chunks.by_query_and_key_chunks, True, None),
    "summaries of chunks": (chunks.by_summaries, True, None),
    "heads by vmap": (chunks.heads_by_vmap, True, None),
    "whole chunks only": (chunks.of_whole_chunks, True, None),
    "sigmoid": (chunks.sigmoid_by_scan, False, None),
}


@pytest.mark.filterwarnings("ignore:the attention opened at")
@pytest.mark.parametrize("name", ACCEPTED)
def test_cached_decoding_equals_the_plain_forward(name):
    attention, is_known, window = ACCEPTED[name]
    model = SmallModel(attention=attention, layers=1)
    params = model.params()
    plan = partition(model, params, max_rows=192)
    (site,) = plan.sites
    assert (site.spec is not None) == is_known, site.unrecognised
    if site.spec is not None:
        assert (site.spec.num_kv_heads, site.spec.window) == (2, window)
    random = np.random.default_rng(3)
    sequences = [random.integers(0, model.vocab, length) for length in (23, 1, 40)]
    found = decode(plan, params, sequences)
    # The plain model is causal, so padding behind a sequence changes nothing, and one shape serves them all.
    plain, positions = jax.jit(lambda *args: model(*args)), jnp.arange(48, dtype=jnp.int32)[None]
    for tokens, logits in zip(sequences, found, strict=True):
        ids = jnp.asarray(np.pad(tokens, (0, 48 - len(tokens))), jnp.int32)[None]
        expected = np.asarray(plain(params, ids, positions)[0, : len(tokens)])
        assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


_LOOP = r"'scan' at .*zoo_chunks\.py:\d+.*steps over chunks of the tokens.*allowed: loops that only sum up over keys"
REFUSED = {
    "never rescaled": (chunks.never_rescaled, TokenMixingError, _LOOP),
    "a fading sum": (chunks.fades_by_chunk, TokenMixingError, _LOOP),
    "sees its whole chunk": (chunks.sees_its_whole_chunk, TokenMixingError, _LOOP),
    "in its chunk": (chunks.in_its_chunk, TokenMixingError, "'pad'"),
    "not causal": (functools.partial(chunks.by_scan, ahead=1), UnsupportedSiteError, "not exactly causal"),
    "a leaky mask": (functools.partial(chunks.by_scan, lowest=-20.0), PartitionError, "scan|not exactly causal"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_loop_that_is_no_sum_over_keys_or_not_causal_is_refused(name):
    attention, error, message = REFUSED[name]
    model = SmallModel(attention=attention, layers=1)
    with pytest.raises(error, match=message):
        partition(model, model.params(), max_rows=64)


def test_a_16_bit_model_is_compared_as_if_it_computed_in_f32():
    model = SmallModel(attention=chunks.by_scan_in_bf16, layers=1)
    (site,) = partition(model, model.params(), max_rows=64).sites
    assert site.spec is not None


def test_padding_for_token_wise_operations_is_nothing():
    def mix(x):
        padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % 16), (0, 0)))
        return (jnp.tanh(padded) @ jnp.eye(24))[:, : x.shape[1]]

    model = SmallModel(mix=mix, layers=1)
    assert len(partition(model, model.params(), max_rows=64).sites) == 1
