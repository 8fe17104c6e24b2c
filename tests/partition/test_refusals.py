"""What mixes tokens outside attention is refused with the line of the model."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from partition import PartitionError, TokenMixingError, UnsupportedPrimitiveError, UnsupportedSiteError
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


def _batch_norm(x):
    return (x - x.mean(axis=(0, 1))) / jnp.sqrt(x.var(axis=(0, 1)) + 1e-5)


def _pallas(x):
    def double(source, target):
        target[...] = 2 * source[...]

    return pl.pallas_call(double, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)


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
    "batch norm": (_batch_norm, TokenMixingError, "'reduce_sum'.*over the token axis"),
    "quantised per tensor": (
        lambda x: jnp.round(x / jnp.abs(x).max() * 127),
        TokenMixingError,
        "'reduce_max'.*over the token axis",
    ),
    "associative scan": (lambda x: jax.lax.associative_scan(jnp.add, x, axis=1), TokenMixingError, "'slice'"),
    "pallas": (_pallas, UnsupportedPrimitiveError, "pallas kernel.*allowed: the XLA implementation"),
    "merged axes": (lambda x: jnp.tanh(x.mT.reshape(1, -1)).reshape(x.shape), TokenMixingError, "'reshape'"),
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


def test_learned_rows_before_the_tokens_are_refused():
    """Soft prompts; as learned keys and values of each layer they are accepted."""
    model = SmallModel()
    params = {**model.params(), "prompt": jnp.ones((1, 5, model.hidden))}

    def prompted(params, tokens):
        x = jnp.concatenate([params["prompt"], params["embed"][tokens]], axis=1)
        for layer in params["layers"]:
            x = model.block(x, layer, jnp.arange(x.shape[1])[None])
        return x[:, 5:] @ params["embed"].T

    with pytest.raises(TokenMixingError, match=r"'concatenate' of \(1, 5, 24\).*test_refusals.py:\d+"):
        make_plan(prompted, params, max_rows=64)


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
        lambda x: jnp.tanh(x.reshape(1, -1)).reshape(x.shape),
        lambda x: x + jnp.roll(x, 1, axis=-1),
        lambda x: jax.lax.top_k(x, 24)[0],
    ],
)
def test_the_same_operations_along_features_are_token_wise(mix):
    model = SmallModel(mix=mix)
    assert len(make_plan(model, model.params(), max_rows=64).sites) == 2
