"""What mixes tokens outside attention, or is attention of another kind, is refused with the line of the model."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partition import PartitionError, TokenMixingError, TraceError, UnsupportedPrimitiveError, UnsupportedSiteError
from partition import partition as make_plan
from small_model import SmallModel, softmax_attention


def _shift(x):
    return jnp.concatenate([jnp.zeros_like(x[:, :1]), x[:, :-1]], axis=1)


def _linear_attention(x):
    state = jnp.einsum("btd,bte->bde", x, x)
    return jnp.einsum("btd,bde->bte", x, state)


def _conv(x):
    return jax.lax.conv_general_dilated(
        x, jnp.ones((3, 1, 24)), (1,), [(2, 0)], dimension_numbers=("NTC", "TIO", "NTC"), feature_group_count=24
    )


def _scan(x):
    return jnp.moveaxis(jax.lax.scan(lambda c, row: (c + row, c), x[:, 0], jnp.moveaxis(x, 1, 0))[1], 0, 1)


MIXING = {
    "token shift": (_shift, TokenMixingError, r"'slice'.*moves, drops or combines rows"),
    "cumulative sum": (lambda x: jnp.cumsum(x, axis=1), TokenMixingError, "'cumsum'"),
    "mean over tokens": (
        lambda x: x - x.sum(axis=1, keepdims=True),
        TokenMixingError,
        "'reduce_sum'.*over the token axis",
    ),
    "softmax over tokens": (lambda x: jax.nn.softmax(x, axis=1), TokenMixingError, "'reduce_max'.*over the token axis"),
    "maximum over the tensor": (lambda x: x / jnp.abs(x).max(), TokenMixingError, "'reduce_max'"),
    "reversal": (lambda x: x[:, ::-1], TokenMixingError, "'rev'"),
    "sort by token": (lambda x: jnp.sort(x, axis=1), TokenMixingError, "'sort'"),
    "linear attention": (_linear_attention, TokenMixingError, "contracts the token axis outside an attention site"),
    "merged axes": (lambda x: jnp.tanh(x.reshape(1, -1)).reshape(x.shape), TokenMixingError, "'reshape'"),
    "convolution": (_conv, UnsupportedPrimitiveError, "'conv_general_dilated'.*has no rule"),
    "recurrence": (_scan, PartitionError, "'(slice|scan|transpose)'"),
}


@pytest.mark.parametrize("name", MIXING)
def test_mixing_outside_attention_is_refused_with_primitive_and_line(name):
    mix, error, message = MIXING[name]
    model = SmallModel(mix=mix)
    with pytest.raises(error, match=message) as caught:
        make_plan(model, model.params(), max_rows=64)
    assert "test_refusals.py:" in str(caught.value)


def _sigmoid(q, k, v, positions):
    scores = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, 3, axis=2))
    index = jnp.arange(q.shape[1])
    weights = jnp.where(index[:, None] >= index, jax.nn.sigmoid(scores), 0)
    return jnp.einsum("bhts,bshd->bthd", weights, jnp.repeat(v, 3, axis=2))


def _alibi(q, k, v, positions):
    index = jnp.arange(q.shape[1])
    bias = -0.1 * (index[:, None] - index)
    scores = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, 3, axis=2)) + bias
    weights = jax.nn.softmax(jnp.where(index[:, None] >= index, scores, -jnp.inf))
    return jnp.einsum("bhts,bshd->bthd", weights, jnp.repeat(v, 3, axis=2))


def _multiplied_mask(q, k, v, positions):
    index = jnp.arange(q.shape[1])
    scores = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, 3, axis=2)) * (index[:, None] >= index)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), jnp.repeat(v, 3, axis=2))


def _over_queries(q, k, v, positions):
    scores = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, 3, axis=2))
    index = jnp.arange(q.shape[1])
    weights = jax.nn.softmax(jnp.where(index[:, None] >= index, scores, -1e9), axis=-2)
    return jnp.einsum("bhts,bshd->bthd", weights, jnp.repeat(v, 3, axis=2))


def _captured_mask(q, k, v, positions):
    mask = np.tril(np.ones((q.shape[1], q.shape[1]), bool))
    return jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(mask)[None, None])


ATTENTION = {
    "bidirectional": (
        lambda q, k, v, p: jax.nn.dot_product_attention(q, k, v),
        UnsupportedSiteError,
        "not exactly causal",
    ),
    "sees one token ahead": (
        functools.partial(softmax_attention, offset=1),
        UnsupportedSiteError,
        "not exactly causal",
    ),
    "does not see itself": (
        functools.partial(softmax_attention, offset=-1, mask_value=-1e30),
        UnsupportedSiteError,
        "attention opened at",
    ),
    "leaky mask": (functools.partial(softmax_attention, mask_value=-10.0), UnsupportedSiteError, "not exactly causal"),
    "multiplied mask": (_multiplied_mask, UnsupportedSiteError, "not exactly causal"),
    "sigmoid": (_sigmoid, UnsupportedSiteError, "bias by position or a sink to the scores, or is no softmax"),
    "alibi": (_alibi, UnsupportedSiteError, "adds a bias by position"),
    "softmax over queries": (_over_queries, UnsupportedSiteError, "over their query side|back on the"),
    "captured mask": (_captured_mask, TraceError, "captures an array with two token axes"),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_that_is_not_understood_exactly_is_refused(name):
    attention, error, message = ATTENTION[name]
    model = SmallModel(attention=attention)
    with pytest.raises(error, match=message):
        make_plan(model, model.params(), max_rows=64)


def test_refusal_of_a_site_names_the_line_that_opens_it():
    model = SmallModel(attention=functools.partial(softmax_attention, mask_value=-10.0))
    with pytest.raises(UnsupportedSiteError, match=r"small_model\.py:\d+"):
        make_plan(model, model.params(), max_rows=64)


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x / jnp.abs(x).max(axis=-1, keepdims=True),
        lambda x: jnp.cumsum(x, axis=-1),
        lambda x: jnp.sort(x, axis=-1),
        lambda x: x.reshape(x.shape[0] * x.shape[1], -1).reshape(x.shape),
        lambda x: x + jnp.roll(x, 1, axis=-1),
        lambda x: jax.lax.top_k(x, 24)[0],
    ],
)
def test_the_same_operations_along_features_are_token_wise(mix):
    model = SmallModel(mix=mix)
    assert len(make_plan(model, model.params(), max_rows=64).sites) == 2
