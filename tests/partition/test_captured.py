"""Masks and tables that a model makes with NumPy while it is traced are looked up by position, or refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cached_decoding import decode
from partition import TraceError, UnsupportedSiteError, partition
from small_model import SmallModel


def _causal(rows):
    return np.tril(np.ones((rows, rows), bool))


def _distance(rows):
    return np.subtract.outer(np.arange(rows), np.arange(rows))


def _biased(bias):
    return np.where(_causal(bias.shape[-1]), bias, -np.inf).astype(np.float32)


def _masked(make):
    """make: rows -> a boolean mask or a bias, [rows, rows] or [heads, rows, rows]."""

    def attention(q, k, v, positions):
        mask = make(q.shape[1])
        scores = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, 3, axis=2)) / 2
        scores = jnp.where(mask, scores, -jnp.inf) if mask.dtype == bool else scores + mask
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), jnp.repeat(v, 3, axis=2))

    return SmallModel(attention=attention)


def _encoded(make):
    """make: rows -> [rows], what the embeddings of queries and keys are multiplied with."""
    return SmallModel(encode=lambda x, _: x * make(x.shape[1])[:, None, None])


def _scattered(rows):
    """Made in the call, by operations that mix positions."""
    mask = jnp.zeros((rows, rows), bool).at[np.tril_indices(rows)].set(True)
    return jnp.concatenate([jnp.zeros((rows, 0), bool), mask[:, ::-1][:, ::-1]], axis=1)


def _constant_under_jit(rows):
    with jax.ensure_compile_time_eval():
        return jnp.tril(jnp.ones((rows, rows), bool))


_TABLE = np.random.default_rng(0).normal(size=70).astype(np.float32)

# name -> (model, what the plan says of its sites)
ACCEPTED = {
    "mask": (_masked(_causal), "full causal"),
    "made by jax, but not in the call": (_masked(_constant_under_jit), "full causal"),
    "scattered": (_masked(_scattered), "full causal"),
    "additive": (_masked(lambda rows: np.triu(np.full((rows, rows), -1e9, np.float32), 1)), "full causal"),
    "window": (_masked(lambda rows: _causal(rows) & (_distance(rows) < 7)), "sliding window 7"),
    "alibi": (_masked(lambda rows: _biased(-np.exp2(-np.arange(1.0, 7))[:, None, None] * _distance(rows))), "ALiBi"),
    "bias by distance": (_masked(lambda rows: _biased(np.sin(_distance(rows)))), "not even"),
    "chunks": (
        _masked(lambda rows: _causal(rows) & (np.arange(rows)[:, None] // 16 == np.arange(rows) // 16)),
        "not even",
    ),
    "table of positions": (_encoded(lambda rows: _TABLE[:rows]), "full causal"),
}


@pytest.mark.filterwarnings("ignore:the attention opened at")
@pytest.mark.parametrize("name", ACCEPTED)
def test_cached_decoding_looks_captured_arrays_up(name):
    model, description = ACCEPTED[name]
    params = model.params()
    plan = partition(model, params, max_rows=64)
    assert all(description in text for part, text in plan.parts() if part.startswith("site"))
    random = np.random.default_rng(3)
    sequences = [random.integers(0, model.vocab, length) for length in (40, 1, 9)]
    plain = jax.jit(lambda ids: model(params, ids, jnp.arange(40)[None]))
    for tokens, logits in zip(sequences, decode(plan, params, sequences), strict=True):
        expected = np.asarray(plain(jnp.asarray(np.pad(tokens, (0, 40 - len(tokens))), jnp.int32)[None])[0])
        assert np.abs(logits - expected[: len(tokens)]).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["bias by distance", "table of positions"])
def test_verification_looks_captured_arrays_up(name):
    model, _ = ACCEPTED[name]
    params = model.params()
    found = partition(model, params, max_rows=64).verify(params, [3, 0, 0, 7, 1, 0, 2, 9])
    assert max(*found.stages, *found.sites, found.logits) <= 1e-5


def _of_length(rows):
    return _causal(rows) & (_distance(rows) < rows // 2)


REFUSED = {
    "random": (
        _masked(lambda rows: _biased(np.random.default_rng(0).normal(size=(rows, rows)))),
        r"the array \(61, 61\) of constants.*test_captured.py:\d+.*no function of .*at 61, 59, 64 tokens",
    ),
    "turned around": (_encoded(lambda rows: jnp.arange(1.0, rows + 1)[::-1]), "no function of one or two positions"),
    "by the length": (_masked(_of_length), "no function of one or two positions"),
    "another mask for short prompts": (
        _masked(lambda rows: _causal(rows) & ((_distance(rows) < 5) | (rows < 64))),
        "no function of one or two positions",
    ),
    "from the end": (
        _masked(lambda rows: _biased(-np.maximum(0, np.arange(rows) - rows + 3.0) * _causal(rows))),
        "no function",
    ),
    "three token axes": (
        SmallModel(mix=lambda x: x + jnp.asarray(np.ones((x.shape[1],) * 3)).sum((1, 2))[:, None]),
        r"the array \(61, 61, 61\) of constants",
    ),
    "numbers of tokens in a table": (
        _encoded(lambda rows: np.arange(1, rows + 1) / np.float32(rows)),
        "no function of one or two positions",
    ),
    "another table for long prompts": (
        _encoded(lambda rows: _TABLE[:rows] * (1 + (rows > 63))),
        "no function of one or two positions",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_captured_arrays_that_depend_on_the_number_of_tokens_are_refused(name):
    model, message = REFUSED[name]
    with pytest.raises(TraceError, match=message):
        partition(model, model.params(), max_rows=64)


@pytest.mark.parametrize("make", [lambda rows: np.ones((rows, rows), bool), lambda rows: np.tri(rows, k=1, dtype=bool)])
def test_captured_masks_that_are_not_causal_are_refused(make):
    model = _masked(make)
    with pytest.raises(UnsupportedSiteError, match="not exactly causal"):
        partition(model, model.params(), max_rows=64)


def test_captured_masks_that_are_too_large_for_the_longest_sequence_are_refused():
    model = _masked(_causal)
    with pytest.raises(TraceError, match=r"8589934592 entries for 65536 tokens; allowed: \d+ entries, or masks"):
        partition(model, model.params(), max_rows=65536)
