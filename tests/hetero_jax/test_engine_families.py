"""Every architecture of models/ through the two-tier engine: the greedy tokens of the plain forward pass."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import hetero_jax as hj
from oracle_models import FOLDER, NAMES

CONFIG = hj.EngineConfig(kv_cache_bytes=1 << 20, max_num_batched_tokens=8, page_size=4)
GREEDY = hj.SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=64)


@pytest.mark.parametrize("name", NAMES)
def test_cached_decoding_equals_the_plain_model(name):
    model = hj.load(str(FOLDER / name))
    engine = hj.Engine(model, CONFIG)
    prompts = [np.random.default_rng(n).integers(3, 64, n) for n in (1, 5, 21)]
    for completion in engine.generate(prompts, GREEDY):
        prompt = prompts[int(completion.id)]
        ids = jnp.asarray([[*prompt, *completion.token_ids]])
        steps = np.asarray(model.module(ids, jnp.arange(ids.shape[1])[None])[0], np.float64)[len(prompt) - 1 : -1]
        assert completion.token_ids == tuple(steps.argmax(axis=1))
        expected = steps - np.log(np.exp(steps).sum(axis=1, keepdims=True))
        for step, row in zip(completion.logprobs, expected, strict=True):
            np.testing.assert_allclose(list(step.values()), row[list(step)], atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_in_bfloat16_it_is_as_near_to_the_plain_model_as_rounding_lets_it(name):
    """Logits reach 7, where bfloat16 has steps of 1/32: 8 of them, for what rounds in another order."""
    model = hj.load(str(FOLDER / name), dtype="bfloat16")
    prompts = [np.random.default_rng(n).integers(3, 64, n) for n in (1, 21)]
    for completion in hj.Engine(model, CONFIG).generate(prompts, GREEDY):
        prompt = prompts[int(completion.id)]
        ids = jnp.asarray([[*prompt, *completion.token_ids]])
        steps = np.asarray(model.module(ids, jnp.arange(ids.shape[1])[None])[0], np.float64)[len(prompt) - 1 : -1]
        expected = steps - np.log(np.exp(steps).sum(axis=1, keepdims=True))
        for step, token, row in zip(completion.logprobs, completion.token_ids, expected, strict=True):
            np.testing.assert_allclose(list(step.values()), row[list(step)], atol=8 / 32)
            assert row[token] >= row.max() - 8 / 32
