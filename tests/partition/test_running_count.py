"""Positions counted over what the ids say is no padding: cached decoding counts as the plain forward does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cached_decoding import decode
from partition import TokenMixingError, partition
from small_model import SmallModel, softmax_attention

PAD = 0


@dataclass(frozen=True)
class CountingModel(SmallModel):
    """count: token ids [1, T] -> positions [1, T]; seen: token ids -> which tokens see which, [1, 1, T, T]."""

    count: Callable[[Any], Any] = lambda tokens: jnp.cumsum(tokens != PAD, axis=-1) - 1
    seen: Callable[[Any], Any] | None = None

    def __call__(self, params, tokens, positions):
        model, seen = self, self.seen(tokens) if self.seen else None
        if seen is not None:
            attention = lambda q, k, v, _: jax.nn.dot_product_attention(q, k, v, mask=seen)  # noqa: E731
            model = dataclasses.replace(self, attention=attention)
        return SmallModel.__call__(model, params, tokens, self.count(tokens))


def _kept_for_padding(tokens):
    """Hugging Face: positions count tokens that are no padding, whose own position is 1."""
    mask = (tokens != PAD).astype(jnp.int32)
    return jnp.where(mask == 0, 1, jnp.cumsum(mask, axis=-1) - 1)


def _offset(tokens):
    """RoBERTa and OPT: from the padding id on."""
    mask = (tokens != PAD).astype(jnp.int32)
    return jnp.cumsum(mask, axis=1) * mask + PAD


def _no_padding_seen(tokens):
    rows = tokens.shape[1]
    return jnp.tril(jnp.ones((rows, rows), bool)) & (tokens != PAD)[:, None, None, :] | jnp.eye(rows, dtype=bool)


def _same_document(tokens):
    """Packed documents: how many ends came before a token says to which it belongs."""
    ends = jnp.cumsum(tokens == PAD, axis=1)
    return jnp.tril(ends[:, None, :, None] == ends[:, None, None, :])


# name -> (model, sites that kernels know)
ACCEPTED = {
    "positions": (CountingModel(), [False, True, True]),
    "positions of Hugging Face": (CountingModel(count=_kept_for_padding), [False, True, True]),
    "positions and mask": (CountingModel(count=_offset, seen=_no_padding_seen), [False, False, False]),
    "documents": (CountingModel(count=lambda tokens: jnp.cumsum(tokens == PAD, 1), seen=_same_document), [False] * 3),
}


@pytest.mark.filterwarnings("ignore:the attention opened at")
@pytest.mark.parametrize("name", ACCEPTED)
def test_cached_decoding_counts_what_came_before(name):
    model, are_known = ACCEPTED[name]
    params = model.params()
    plan = partition(model, params, max_rows=64)
    assert [site.spec is not None for site in plan.sites] == are_known
    random = np.random.default_rng(3)
    sequences = [random.integers(0, model.vocab, length) for length in (23, 3, 9)]
    for tokens in sequences:
        tokens[:: random.integers(2, 5)] = PAD
    plain = jax.jit(lambda ids: model(params, ids, None))
    for tokens, logits in zip(sequences, decode(plan, params, sequences), strict=True):
        expected = np.asarray(plain(jnp.asarray(np.pad(tokens, (0, 23 - len(tokens))), jnp.int32)[None])[0])
        assert np.abs(logits - expected[: len(tokens)]).max() <= 1e-5 * np.abs(expected).max()


def test_verification_counts_too():
    model = ACCEPTED["positions"][0]
    params = model.params()
    found = partition(model, params, max_rows=64).verify(params, [3, 0, 0, 7, 1, 0, 2, 9])
    assert max(*found.stages, *found.sites, found.logits) <= 1e-5


REFUSED = {
    "from the end": (
        CountingModel(count=lambda tokens: jax.lax.cumsum((tokens != PAD).astype(int), 1, reverse=True)),
        "'cumsum'",
    ),
    "rounded": (CountingModel(count=lambda tokens: jnp.cumsum((tokens != PAD) * 0.1, 1)), "'cumsum'"),
    "all of them": (CountingModel(count=lambda tokens: tokens - (tokens != PAD).sum(1)), "'reduce_sum'"),
    "of what layers make": (
        SmallModel(attention=lambda q, k, v, p: softmax_attention(q * jnp.cumsum(q > 0, axis=1), k, v, p)),
        "'cumsum'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_running_sums_are_refused(name):
    model, message = REFUSED[name]
    with pytest.raises(TokenMixingError, match=message):
        partition(model, model.params(), max_rows=64)
