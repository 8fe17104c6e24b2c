"""Models that give logits of the last token alone decode every token; what is made of other rows is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cached_decoding import decode
from partition import PartitionError, TokenMixingError, TraceError, partition
from small_model import SmallModel, rms_norm


@dataclass(frozen=True)
class HeadedModel(SmallModel):
    """head: (hidden [1, T, hidden], positions [1, T], params) -> logits of some shape."""

    head: Callable[..., Any] = lambda x, positions, params: x @ params["embed"].T

    def __call__(self, params, tokens, positions):
        x = params["embed"][tokens]
        for layer in params["layers"]:
            x = self.block(x, layer, positions)
        return self.head(x, positions, params)


def _of_length(x, positions, params):
    """By the number of tokens that are no padding, as models do that take a mask."""
    length = jnp.ones_like(positions).sum(axis=-1)
    return x[jnp.arange(1), length - 1] @ params["embed"].T


def _of_each_length(x, positions, params):
    lengths = jnp.ones_like(positions).sum(axis=-1)
    return jax.vmap(lambda row, length: row[length - 1])(x, lengths) @ params["embed"].T


def _normalised(x, positions, params):
    return jax.nn.log_softmax(rms_norm(x[:, -1:], params["layers"][0]["norm"]) @ params["embed"].T)


# name -> (head of the last token, the same head for every token)
LAST = {
    "of all logits": (lambda x, positions, params: (x @ params["embed"].T)[:, -1], None),
    "before the head": (lambda x, positions, params: x[:, -1:] @ params["embed"].T, None),
    "without a batch": (lambda x, positions, params: x[0, -1] @ params["embed"].T, None),
    "taken": (lambda x, positions, params: jnp.take(x, -1, axis=1) @ params["embed"].T, None),
    "split off": (
        lambda x, positions, params: jnp.split(x, [x.shape[1] - 1], axis=1)[1] @ params["embed"].T,
        None,
    ),
    "at a length": (_of_length, None),
    "at a length of each sequence": (_of_each_length, None),
    "normalised before and behind": (
        _normalised,
        lambda x, positions, params: jax.nn.log_softmax(
            rms_norm(x, params["layers"][0]["norm"]) @ params["embed"].T, axis=-1
        ),
    ),
    "two of its values": (
        lambda x, positions, params: (x[:, -1] * positions[:, -1:]) @ params["embed"].T,
        lambda x, positions, params: (x * positions[..., None]) @ params["embed"].T,
    ),
}


@pytest.mark.parametrize("name", LAST)
def test_cached_decoding_gives_logits_of_every_token(name):
    last, every = LAST[name]
    model, whole = HeadedModel(head=last), HeadedModel(head=every) if every else SmallModel()
    params = model.params()
    plan = partition(model, params, max_rows=64)
    assert [site.spec is not None for site in plan.sites] == [True, True]
    random = np.random.default_rng(3)
    sequences = [random.integers(0, model.vocab, length) for length in (15, 1, 9)]
    ids, positions = (jnp.asarray(each, jnp.int32)[None] for each in (sequences[0], np.arange(15)))
    expected = np.asarray(whole(params, ids, positions)[0])
    bound = 1e-5 * np.abs(expected).max()
    assert np.abs(np.ravel(model(params, ids, positions)) - expected[-1]).max() <= bound  # the two heads are one
    assert np.abs(decode(plan, params, sequences)[0] - expected).max() <= bound


def test_verification_compares_the_last_token_with_the_plain_model():
    model = HeadedModel(head=_of_length)
    params = model.params()
    found = partition(model, params, max_rows=64).verify(params, [3, 0, 0, 7, 1, 0, 2, 9])
    assert max(*found.stages, *found.sites, found.logits) <= 1e-5
    assert found.logits > 0  # the last token's were compared


REFUSED = {
    "first token": (lambda x, positions, params: x[:, 0], TokenMixingError, "'slice'.*made of the last row alone"),
    "token before the last": (lambda x, positions, params: x[:, -2], TokenMixingError, "'slice'"),
    "last two": (lambda x, positions, params: x[:, -2:], TraceError, r"of the last token alone.*\(1, 2, 24\)"),
    "by a number": (lambda x, positions, params: x[:, 40], PartitionError, "'slice'|number of tokens"),
    "beside the mean": (lambda x, positions, params: x[:, -1] + x.mean(1), TokenMixingError, "'slice'"),
    "by learned attention": (
        lambda x, positions, params: jax.nn.softmax(x[0, :, 0]) @ x[0],
        TokenMixingError,
        "'reduce_max'.*over the token axis",
    ),
    "times the length": (lambda x, positions, params: x[:, -1] * x.shape[1], TraceError, "number of tokens"),
    "no token": (lambda x, positions, params: params["embed"].sum(1), TokenMixingError, "not one row per token"),
    "a number": (lambda x, positions, params: x.sum(), TraceError, r"it returned \[\(\)\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_one_row_that_is_not_the_last_tokens_is_refused(name):
    head, error, message = REFUSED[name]
    model = HeadedModel(head=head)
    with pytest.raises(error, match=message):
        partition(model, model.params(), max_rows=64)
