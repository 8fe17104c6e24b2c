"""Relative positions by Transformer-XL's skew are attention by distance; other moves of scores are refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cached_decoding import decode
from partition import PartitionError, UnsupportedSiteError, partition
from small_model import SmallModel


def _padded(x):
    """[B, heads, T, T] by padding, reshaping and slicing, as Transformer-XL does."""
    *outer, rows, keys = x.shape
    x = jnp.pad(x, (*[(0, 0)] * len(outer), (0, 0), (1, 0))).reshape(*outer, keys + 1, rows)
    return x[..., 1:, :].reshape(*outer, rows, keys)


def _joined(x):
    """The same of [T, T, heads], behind a column of zeros."""
    x = jnp.moveaxis(x, 0, -1)
    x = jnp.concatenate([jnp.zeros_like(x[:, :1]), x], axis=1)
    x = x.reshape(x.shape[1], x.shape[0], -1)[1:]
    return jnp.moveaxis(x, -1, 0)


def _sinusoids(distance):
    angle = distance[:, None] * 10000.0 ** (-jnp.arange(4) / 4)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def _transformer_xl(rows, rel):
    return _sinusoids(jnp.arange(rows - 1, -1, -1.0)) @ rel[:8]


def _numpy_distances(rows, rel):
    return _sinusoids(np.arange(rows - 1, -1, -1.0, dtype=np.float32)) @ rel[:8]


def _music_transformer(rows, rel):
    return rel[rel.shape[0] - rows :]


def _masked(scores):
    return jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)


def _model(table, skew=_padded, mask=lambda content, skewed: _masked(content + skewed)):
    """table: (rows, rel [70, dim]) -> [rows, dim], the farthest distance first."""

    def attention(q, k, v, positions, *, rel, bias):
        rows = q.shape[1]
        products = jnp.einsum("bthd,rd->bhtr", q + bias, table(rows, rel)) / 2
        content = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, 3, axis=2)) / 2
        weights = jax.nn.softmax(mask(content, skew(products)))
        return jnp.einsum("bhts,bshd->bthd", weights, jnp.repeat(v, 3, axis=2))

    return SmallModel(attention=attention, extra={"rel": (70, 4), "bias": (6, 4)}, encode=lambda x, positions: x)


ACCEPTED = {
    "sinusoids": _model(_transformer_xl),
    "sinusoids of NumPy, joined": _model(_numpy_distances, lambda x: _joined(x[0])[None]),
    "learned": _model(_music_transformer),
    "learned, turned around": _model(lambda rows, rel: rel[:rows][::-1]),
    "masked before they meet": _model(_transformer_xl, mask=lambda content, skewed: _masked(content) + skewed),
}


@pytest.mark.filterwarnings("ignore:the attention opened at")
@pytest.mark.parametrize("name", ACCEPTED)
def test_cached_decoding_of_skewed_scores_equals_the_plain_forward(name):
    model = ACCEPTED[name]
    params = model.params()
    plan = partition(model, params, max_rows=64)
    assert [[port.layout.inner for port in site.cached] for site in plan.sites] == [
        [(1, 2, 4)] * 2
    ] * 2  # k and v alone
    random = np.random.default_rng(3)
    sequences = [random.integers(0, model.vocab, length) for length in (23, 1, 9)]
    plain = jax.jit(lambda ids: model(params, ids, None))
    for tokens, logits in zip(sequences, decode(plan, params, sequences), strict=True):
        expected = np.asarray(plain(jnp.asarray(np.pad(tokens, (0, 23 - len(tokens))), jnp.int32)[None])[0])
        assert np.abs(logits - expected[: len(tokens)]).max() <= 1e-5 * np.abs(expected).max()


def test_verification_skews_too():
    model = ACCEPTED["learned"]
    found = partition(model, model.params(), max_rows=64).verify(model.params(), [3, 0, 0, 7, 1, 0, 2, 9])
    assert max(*found.stages, *found.sites, found.logits) <= 1e-5


NOT_CAUSAL = {
    "no mask": lambda content, skewed: content + skewed,
    "leaky mask": lambda content, skewed: content + skewed + jnp.where(_masked(content) > -jnp.inf, 0, -10),
    "masked content alone": lambda content, skewed: jnp.maximum(_masked(content), skewed),
}


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_skewed_scores_that_are_not_masked_are_refused(name):
    model = _model(_transformer_xl, mask=NOT_CAUSAL[name])
    with pytest.raises(UnsupportedSiteError, match="not exactly causal"):
        partition(model, model.params(), max_rows=64)


REFUSED = {
    "nearest first": _model(lambda rows, rel: rel[:rows]),
    "by the length": _model(lambda rows, rel: _transformer_xl(rows, rel) / rows),
    "shifted by two": _model(_transformer_xl, lambda x: _padded(_padded(x))),
    "not skewed": _model(_transformer_xl, lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 0), (1, 0)))[..., :-1]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_by_distance_is_refused(name):
    model = REFUSED[name]
    with pytest.raises(PartitionError, match=r"'(pad|add|concatenate)' .*test_skew.py:\d+"):
        partition(model, model.params(), max_rows=64)
