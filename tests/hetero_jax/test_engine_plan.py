"""The engine serves the plan of any model that was partitioned, with or without a tokenizer."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hetero_jax as hj
from hetero_jax.errors import ConfigError, RequestError
from small_model import SmallModel, softmax_attention
from zoo_attention import sigmoid

MODEL = SmallModel()
CONFIG = hj.EngineConfig(kv_cache_bytes=1 << 18, page_size=4, max_num_batched_tokens=8)


@pytest.fixture(scope="module")
def plan() -> hj.Plan:
    return hj.partition(MODEL, MODEL.params(), max_rows=64)


def _greedy(prompt: list[int], count: int, model: SmallModel = MODEL) -> list[int]:
    plain, ids = jax.jit(model.__call__), list(prompt)
    for _ in range(count):
        # Causal, so padding behind the sequence changes nothing.
        padded = np.pad(ids, (0, 64 - len(ids)))[None]
        ids.append(int(plain(model.params(), jnp.asarray(padded), jnp.arange(64)[None])[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


def test_an_engine_of_a_plan_generates_what_the_plain_model_does(plan):
    engine = hj.Engine(plan, CONFIG)
    prompts = [[1, 2, 3], list(range(20)), [30]]
    for completion in engine.generate(prompts, hj.SamplingParams(max_tokens=6, temperature=0)):
        assert list(completion.token_ids) == _greedy(prompts[int(completion.id)], 6)


def test_with_a_window_sequences_outgrow_the_pool():
    model = SmallModel(attention=functools.partial(softmax_attention, window=5))
    plan = hj.partition(model, model.params(), max_rows=64)
    engine = hj.Engine(plan, hj.EngineConfig(kv_cache_bytes=32 << 10, page_size=4, max_num_batched_tokens=8))
    assert engine.stats.pages_total * 4 < 30
    prompts = [list(range(25)), [4] * 19]
    for completion in engine.generate(prompts, hj.SamplingParams(max_tokens=30, temperature=0)):
        assert list(completion.token_ids) == _greedy(prompts[int(completion.id)], 30, model)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_that_no_kernel_knows_is_announced_once_and_generates_the_same(dtype):
    model = SmallModel(attention=sigmoid)
    plan = hj.partition(model, model.params(dtype=dtype), max_rows=64)
    with pytest.warns(
        UserWarning, match=r"zoo_attention\.py:\d+.*own traced operations.*output for a single key"
    ) as said:
        engine = hj.Engine(plan, CONFIG)
    assert said[0].filename == __file__  # whose line it was
    assert len(said) == len({site.key for site in plan.sites})  # the first layer of a bfloat16 model has other types
    prompts = [[1, 2, 3], list(range(20)), [30]]
    for completion in engine.generate(prompts, hj.SamplingParams(max_tokens=6, temperature=0)):
        prompt = prompts[int(completion.id)]
        ids = jnp.asarray([*prompt, *completion.token_ids])[None]
        logits = model(model.params(dtype=dtype), ids, jnp.arange(ids.shape[1])[None])[0].astype(jnp.float32)
        rows = logits[len(prompt) - 1 : -1]
        chosen = rows[jnp.arange(6), ids[0, len(prompt) :]]
        assert (rows.max(-1) - chosen).max() <= (1e-5 if dtype == jnp.float32 else 0.1)


def test_int8_pools_are_refused_where_a_kernel_does_not_know_the_attention():
    model = SmallModel(attention=sigmoid)
    with pytest.raises(ConfigError, match="kv_cache_dtype=int8 needs the native kernel: the attention opened at"):
        hj.Engine(hj.partition(model, model.params(), max_rows=64), hj.EngineConfig(kv_cache_dtype="int8"))


def test_text_needs_a_tokenizer(plan):
    with pytest.raises(RequestError, match="'a plan' has no tokenizer"):
        list(hj.Engine(plan, CONFIG).generate("Hello"))


def test_plans_that_no_engine_can_serve_are_refused(plan):
    with pytest.raises(ConfigError, match="max_model_len=65: the plan was made for at most 64 tokens"):
        hj.Engine(plan, hj.EngineConfig(max_model_len=65))
    shapes = jax.eval_shape(MODEL.params)
    with pytest.raises(ConfigError, match="made from shapes alone"):
        hj.Engine(hj.partition(MODEL, shapes, max_rows=64), CONFIG)
