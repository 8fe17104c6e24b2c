from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model_files import FAMILIES, random_tensors, tiny_config
from models import Decoder, RopeScaling
from models.layers import matmul
from models.weights import read_decoder
from numpy_decoder import reference_logits

TOKENS = np.random.default_rng(7).integers(0, 260, 24)


def decoder_from(config, tensors, dtype="float32"):
    return read_decoder(config, lambda name, shape: tensors[name].reshape(shape), dtype=dtype)


def logits_of(module, tokens):
    tokens = jnp.asarray(tokens, jnp.int32)[None]
    return np.asarray(module(tokens, jnp.arange(tokens.shape[1])[None]))[0]


def plain_frequencies(config):
    return [config.rope_theta ** (-2 * i / config.head_dim) for i in range(config.head_dim // 2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_the_float64_reference(family):
    config = FAMILIES[family]
    tensors = random_tensors(config)
    expected = reference_logits(config, tensors, TOKENS, plain_frequencies(config))
    np.testing.assert_allclose(logits_of(decoder_from(config, tensors), TOKENS), expected, atol=2e-5)


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(rope_type="linear", factor=4.0),
        RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=16),
        RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
        RopeScaling(rope_type="factors", freq_factors=tuple(1.0 + i / 4 for i in range(16))),
    ],
    ids=lambda scaling: scaling.rope_type,
)
def test_scaled_frequencies_reach_the_attention(scaling):
    config = tiny_config(rope_scaling=scaling)
    plain = np.asarray(plain_frequencies(config))
    turns = 16 * plain / (2 * np.pi)
    keep = np.clip((turns - 1) / 3, 0, 1)
    # for yarn here: 32 and 1 turns in 32 positions lie at dimensions -5.4 -> 0 and 2.8 -> 3
    ramp = np.clip(np.arange(16) / 3, 0, 1)
    frequencies, factor = {
        "linear": (plain / 4, 1.0),
        "llama3": (plain * keep + plain / 8 * (1 - keep), 1.0),
        "yarn": (plain * (1 - ramp) + plain / 4 * ramp, 0.1 * np.log(4) + 1),
        "factors": (plain / (1 + np.arange(16) / 4), 1.0),
    }[scaling.rope_type]
    tensors = random_tensors(config)
    expected = reference_logits(config, tensors, TOKENS, frequencies, factor)
    np.testing.assert_allclose(logits_of(decoder_from(config, tensors), TOKENS), expected, atol=3e-5)


def test_a_token_never_sees_what_follows_it():
    module = decoder_from(FAMILIES["qwen3"], random_tensors(FAMILIES["qwen3"]))
    changed = TOKENS.copy()
    changed[15:] = (changed[15:] + 1) % 260
    before, after = logits_of(module, TOKENS), logits_of(module, changed)
    np.testing.assert_array_equal(before[:15], after[:15])
    assert np.abs(before[15:] - after[15:]).max(-1).min() > 0.1


def test_a_window_hides_what_lies_further_back():
    # one layer of window 5: the token at 10 sees 6..10
    config = dataclasses.replace(FAMILIES["mistral"], num_hidden_layers=1)
    module = decoder_from(config, random_tensors(config))
    far, near = TOKENS.copy(), TOKENS.copy()
    far[5], near[6] = (far[5] + 1) % 260, (near[6] + 1) % 260
    plain = logits_of(module, TOKENS)[10]
    np.testing.assert_array_equal(logits_of(module, far)[10], plain)
    assert np.abs(logits_of(module, near)[10] - plain).max() > 1e-3


def test_attention_depends_on_distances_only():
    module = decoder_from(FAMILIES["llama3"], random_tensors(FAMILIES["llama3"]))
    tokens = jnp.asarray(TOKENS)[None]
    here = module(tokens, jnp.arange(24)[None])
    there = module(tokens, jnp.arange(24)[None] + 64)
    np.testing.assert_allclose(here, there, atol=1e-3)


def test_bf16_weights_give_f32_logits_near_those_of_f32():
    config = FAMILIES["llama3"]
    tensors = {name: value.astype(jnp.bfloat16).astype(np.float32) for name, value in random_tensors(config).items()}
    narrow, wide = decoder_from(config, tensors, "bfloat16"), decoder_from(config, tensors)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(narrow))} == {jnp.dtype("bfloat16")}
    logits = narrow(jnp.asarray(TOKENS)[None], jnp.arange(24)[None])
    assert logits.dtype == jnp.float32
    assert np.abs(np.asarray(logits)[0] - logits_of(wide, TOKENS)).max() < 0.1


def test_products_accumulate_in_f32():
    # 256 + 1 is not a bf16 number: a bf16 accumulator would stay at 256
    x, kernel = jnp.ones((1, 1024), jnp.bfloat16), jnp.ones((1024, 1), jnp.bfloat16)
    assert matmul(x, kernel).item() == 1024


def test_ids_outside_the_vocabulary_are_clipped():
    module = decoder_from(FAMILIES["llama3"], random_tensors(FAMILIES["llama3"]))
    np.testing.assert_array_equal(logits_of(module, [3, 999, -5]), logits_of(module, [3, 259, 0]))


def test_gradient_steps_lower_the_loss():
    module = Decoder(FAMILIES["smollm2"], rngs=nnx.Rngs(0))
    tokens = jnp.asarray(TOKENS)[None]
    positions = jnp.arange(24)[None]

    def loss_of(module):
        scores = jax.nn.log_softmax(module(tokens, positions)[0, :-1])
        return -jnp.take_along_axis(scores, tokens[0, 1:, None], axis=-1).mean()

    step = nnx.jit(nnx.value_and_grad(loss_of))
    losses = []
    for _ in range(8):
        loss, gradients = step(module)
        losses.append(float(loss))
        nnx.update(module, jax.tree.map(lambda w, g: w - 0.1 * g, nnx.state(module), gradients))
    assert losses[-1] < 0.5 * losses[0]
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradients))
