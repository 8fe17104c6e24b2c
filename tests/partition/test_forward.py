"""Every kind of model that may be handed over is one function; what may not be is refused in one sentence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from cached_decoding import decode
from partition import TraceError, partition
from small_model import SmallModel

MODEL = SmallModel()


def _no_positions(params, tokens):
    return MODEL(params, tokens, jnp.arange(tokens.shape[1])[None])


def _counted_by_mask(params, tokens, positions, mask):
    """What generation loops do: positions count the tokens that are no padding, and padding is never seen."""

    def attention(q, k, v, _):
        seen = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool)) & (mask[:, None, None, :] > 0)
        return jax.nn.dot_product_attention(q, k, v, mask=seen)

    return SmallModel(attention=attention)(params, tokens, jnp.cumsum(mask, axis=-1) - 1)


class NnxModel(nnx.Module):
    """With a random stream, which tracing must not leave changed."""

    def __init__(self):
        self.weights = nnx.data(jax.tree.map(nnx.Param, MODEL.params()))
        self.dropout = nnx.Dropout(0.5, deterministic=False, rngs=nnx.Rngs(0))

    def __call__(self, tokens, positions, scale=1.0):
        params = jax.tree.map(lambda leaf: leaf[...], self.weights, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
        self.dropout(jnp.ones(3))
        return MODEL(params, tokens, positions) * scale


class LinenModel(linen.Module):
    """Whose parameters are made elsewhere."""

    @linen.compact
    def __call__(self, tokens):
        return _no_positions(self.param("weights", lambda key: MODEL.params()), tokens)


MODELS = {
    "fn(params, tokens, positions)": (MODEL, MODEL.params()),
    "fn(params, tokens)": (_no_positions, MODEL.params()),
    "fn(params, tokens, positions, mask)": (_counted_by_mask, MODEL.params()),
    "nnx module": (NnxModel(), None),
    "bound linen module": (LinenModel().bind({"params": {"weights": MODEL.params()}}), None),
    "unused weight": (
        lambda params, tokens: _no_positions(params["model"], tokens),
        {"model": MODEL.params(), "x": 1.0},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_cached_decoding_of_every_kind_of_model_equals_the_plain_forward(name):
    model, params = MODELS[name]
    params = jax.tree.map(jnp.asarray, params)
    plan = partition(model, params, max_rows=64)
    assert [site.spec is not None for site in plan.sites] == [True, True]
    tokens = np.random.default_rng(3).integers(0, MODEL.vocab, 9)
    (found,) = decode(plan, plan.forward.params, [tokens])
    expected = np.asarray(_no_positions(MODEL.params(), jnp.asarray(tokens)[None])[0])
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


class KeywordModel(nnx.Module):
    def __call__(self, tokens, *, cache):
        return tokens


REFUSED = {
    "no parameters": (MODEL, None, "params are missing for the function SmallModel"),
    "parameters twice": (NnxModel(), MODEL.params(), "NnxModel has its own parameters"),
    "no function": ("model.gguf", {}, "the model is a str; allowed: fn"),
    "unbound module": (LinenModel(), None, "LinenModel is not bound"),
    "too many arguments": (lambda p, a, b, c, d: a, {}, "takes p, a, b, c, d; allowed: fn"),
    "too few arguments": (lambda p: p, {}, "takes p; allowed: fn"),
    "keyword argument": (KeywordModel(), None, "KeywordModel takes tokens, cache; allowed: fn"),
    "arguments that cannot be read": (max, {}, "arguments of max cannot be read"),
    "parameters that are no arrays": (_no_positions, {"path": "weights"}, r"parameter \['path'\] is a str"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_model_is_refused_in_one_sentence(name):
    model, params, message = REFUSED[name]
    with pytest.raises(TraceError, match=message):
        partition(model, params)
