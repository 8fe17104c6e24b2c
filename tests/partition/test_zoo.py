"""Models of many kinds: accepted ones decode with a cache as the plain forward does, the others are refused by name."""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo_attention as attention
import zoo_experts as experts
from cached_decoding import decode
from partition import PartitionError, TokenMixingError, UnsupportedSiteError, partition
from small_model import SmallModel, softmax_attention


def _model(operator, **options):
    return SmallModel(attention=operator, **options)


# name -> (model, sites, whether kernels know them)
ACCEPTED = {
    "jax.nn": (SmallModel(), 2, True),
    "repeated heads": (_model(attention.repeated), 2, True),
    "tiled heads": (_model(attention.tiled_in_front), 2, True),
    "head major": (_model(attention.head_major), 2, True),
    "heads by vmap": (_model(attention.by_vmap), 2, True),
    "heads by loop": (_model(attention.by_loop, layers=1), 6, True),
    "custom_vjp": (_model(attention.custom_vjp), 2, True),
    "multiplicative mask": (_model(attention.multiplicative_mask), 2, True),
    "two attentions": (_model(attention.two_attentions), 4, True),
    "one token's keys for all layers": (attention.SharedKeysModel(), 2, True),
    "one token's keys for all layers, sigmoid": (attention.SharedSigmoidModel(), 2, False),
    "alibi": (_model(attention.alibi), 2, True),
    "sigmoid": (_model(attention.sigmoid), 2, False),
    "T5 bias": (_model(attention.relative_bias, extra={"table": (12, 6)}), 2, False),
    "additive": (_model(attention.additive, extra={"score": (4,)}), 2, False),
    "relative values": (_model(attention.relative_values, extra={"table": (12, 4)}), 2, False),
    "sink logits": (_model(attention.sink_logits, extra={"sinks": (6,)}), 2, True),
    "sink logits, concatenated": (_model(attention.sink_logits_concatenated, extra={"sinks": (6,)}), 2, True),
    "sink logits, split off": (_model(attention.sink_logits_split_off, extra={"sinks": (6,)}), 2, True),
    "sink keys": (_model(attention.sink_keys, extra={"sink_k": (3, 6, 4), "sink_v": (3, 6, 4)}), 2, False),
    "sink keys, counted": (
        _model(attention.sink_keys_counted, extra={"sink_k": (5, 2, 4), "sink_v": (5, 2, 4)}),
        2,
        False,
    ),
    "softmax off by one": (_model(attention.softmax_off_by_one), 2, True),
    "softmax off by one, added": (_model(attention.softmax_off_by_one_added), 2, True),
    "sinks of constant scores": (_model(attention.unequal_sinks), 2, True),
    "sinks by position": (_model(attention.sinks_by_position), 2, False),
    "queries by lax.map": (_model(attention.by_rows), 2, True),
    "quantised per token": (SmallModel(mix=lambda x: jnp.round(x / jnp.abs(x).max(-1, keepdims=True) * 127)), 2, True),
    "differential": (_model(attention.differential), 2, False),
    "delayed normalisation": (_model(attention.delayed_normalisation), 2, True),
    "latent": (_model(attention.latent), 2, False),
    "masked linear": (_model(attention.masked_linear), 2, False),
    "chunked local": (_model(attention.chunked_local), 2, False),
    "padding mask from ids": (attention.PaddedModel(), 2, False),
    "segments from ids": (attention.SegmentedModel(), 2, False),
    "every expert": (SmallModel(mix=experts.dense), 2, True),
    "experts, sorted and unsorted": (SmallModel(mix=experts.sorted_and_unsorted), 2, True),
    "experts, sorted and added": (SmallModel(mix=experts.sorted_and_added), 2, True),
    "experts, sorted unstably": (SmallModel(mix=experts.sorted_unstably), 2, True),
    "experts, one after the other": (SmallModel(mix=experts.one_after_the_other), 2, True),
    "one expert, by argmax": (SmallModel(mix=experts.top_one), 2, True),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_cached_decoding_equals_the_plain_forward(name):
    model, sites, is_known = ACCEPTED[name]
    params = model.params()
    plan = partition(model, params, max_rows=64)
    assert [site.spec is not None for site in plan.sites] == [is_known] * sites
    random = np.random.default_rng(3)
    sequences = [random.integers(0, model.vocab, length) for length in (23, 1, 9)]
    with warnings.catch_warnings():
        warnings.simplefilter("error" if is_known else "ignore")
        found = decode(plan, params, sequences)
    # The plain model is causal, so padding behind a sequence changes nothing, and one shape serves them all.
    plain, positions = jax.jit(lambda *args: model(*args)), jnp.arange(23, dtype=jnp.int32)[None]
    for tokens, logits in zip(sequences, found, strict=True):
        ids = jnp.asarray(np.pad(tokens, (0, 23 - len(tokens))), jnp.int32)[None]
        expected = np.asarray(plain(params, ids, positions)[0, : len(tokens)])
        assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


REFUSED = {
    "bidirectional": (lambda q, k, v, p: softmax_attention(q, k, v, p, offset=1000), "not exactly causal"),
    "sees one token ahead": (functools.partial(softmax_attention, offset=1), "not exactly causal"),
    "does not see itself": (functools.partial(softmax_attention, offset=-1, mask_value=-1e30), "not exactly causal"),
    "sees nothing at first": (functools.partial(softmax_attention, offset=-1), "no finite output"),
    "leaky mask": (attention.leaky, "not exactly causal"),
    "slightly leaky mask": (attention.slightly_leaky, "not exactly causal"),
    "multiplied scores": (attention.multiplied_scores, "not exactly causal"),
    "softmax over queries": (attention.over_queries, "over their query side|back on the"),
    "keys that all see": (attention.prefix_bidirectional, "not exactly causal"),
    "scores and their transpose": (attention.transposed_scores, "with their transpose"),
    "keys in another order": (lambda q, k, v, p: softmax_attention(q, k[:, ::-1], v, p), "'rev'"),
    "a key cut off with the sink": (attention.sink_that_drops_the_last_key, "'concatenate'"),
    "a token's key as sink": (attention.sink_from_a_token, "'slice'"),
    "sinks among the queries": (attention.sinks_among_queries, "'concatenate'"),
    "sink keys that see ahead": (attention.sink_keys_that_see_ahead, "not exactly causal"),
    "keys of the token before": (
        lambda q, k, v, p: softmax_attention(q, jnp.pad(k, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1], v, p),
        "'pad'",
    ),
    "values with what queries got": (attention.added_to_keys, "on the key side"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_attention_that_is_not_exactly_causal_is_refused(name):
    operator, message = REFUSED[name]
    model = SmallModel(attention=operator)
    with pytest.raises((UnsupportedSiteError, TokenMixingError), match=message):
        partition(model, model.params(), max_rows=64)


MIXED_BY_EXPERTS = {
    "limited capacity": (experts.limited_capacity, "'cumsum'.*experts of limited capacity let tokens compete"),
    "choices flattened before tokens": (experts.choice_major, "'reshape'.*token-wise"),
    "load": (experts.balanced, "uses how many tokens chose each expert"),
    "never unsorted": (experts.never_unsorted, "'reshape'.*token-wise"),
    "other group sizes": (experts.other_counts, "'ragged_dot_general'.*uses how many tokens"),
    "a neighbour's row": (experts.neighbours_rows, "'gather'"),
}


@pytest.mark.parametrize("name", MIXED_BY_EXPERTS)
def test_experts_that_mix_tokens_are_refused(name):
    mix, message = MIXED_BY_EXPERTS[name]
    model = SmallModel(mix=mix)
    with pytest.raises(PartitionError, match=message):
        partition(model, model.params(), max_rows=64)
