"""Unmodified models of other people's libraries decode with a cache as their plain forward does."""

from __future__ import annotations

import importlib.util
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cached_decoding import decode
from experiments.third_party import MAX_ROWS, MODELS, VOCAB_SIZE, build
from partition import partition

MISSING = [library for library in ("transformers", "tunix") if importlib.util.find_spec(library) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"{' and '.join(MISSING)} not installed; pip install -e '.[zoo]' brings these models"
)

# What the configurations of `experiments.third_party` say; the sliding window of the Flax Mistral takes in one key more
# than `sliding_window`, and its own forward pass with it.
EXPECTED = {
    "GPT-2": {"num_kv_heads": 6, "head_dim": 4, "window": None},
    "Llama": {"num_kv_heads": 2, "head_dim": 4, "window": None},
    "Mistral": {"num_kv_heads": 2, "head_dim": 4, "window": 8},
    "Gemma": {"num_kv_heads": 2, "head_dim": 8, "window": None},
    "Llama 3": {"num_kv_heads": 2, "head_dim": 8, "window": None},
    "Qwen2": {"num_kv_heads": 2, "head_dim": 8, "window": None},
    "Qwen3": {"num_kv_heads": 2, "head_dim": 8, "window": None},
}


@pytest.mark.parametrize("name", MODELS)
def test_every_site_is_recognised_and_cached_decoding_equals_the_plain_forward(name):
    model = build(name)
    plan = partition(model.fn, model.params, max_rows=MAX_ROWS)
    assert len(plan.sites) == 2
    for site in plan.sites:
        assert site.spec is not None, site.unrecognised
        assert site.spec.num_heads == 6
        assert {key: getattr(site.spec, key) for key in EXPECTED[name]} == EXPECTED[name]
    random = np.random.default_rng(3)
    sequences = [random.integers(0, VOCAB_SIZE, length) for length in (15, 1, 6)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "attention runs in plain jax.numpy")
        found = decode(plan, model.params, sequences)
    # The plain model is causal, so padding behind a sequence changes nothing, and one shape serves them all.
    plain = jax.jit(model.fn)
    positions = jnp.arange(15, dtype=jnp.int32)[None]
    for tokens, logits in zip(sequences, found, strict=True):
        ids = jnp.asarray(np.pad(tokens, (0, 15 - len(tokens))), jnp.int32)[None]
        expected = np.asarray(plain(model.params, ids, positions)[0, : len(tokens)])
        assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
