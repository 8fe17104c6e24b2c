"""The engine on a tiny random model: families against the plain forward pass, limits, bad input, stopping early."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hetero_jax as hj
import models
from hetero_jax import native_attention
from hetero_jax.errors import ConfigError, RequestError
from model_files import FAMILIES, tiny_config

TINY = models.SHAPES["tiny"]
SCALINGS = {
    "linear": models.RopeScaling(rope_type="linear", factor=2.0),
    "llama3": models.RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=64),
    "yarn": models.RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
}
CASES = {**FAMILIES, **{f"{name} rope": tiny_config(rope_scaling=scaling) for name, scaling in SCALINGS.items()}}


def _loaded(config: models.DecoderConfig, seed: int = 0) -> models.LoadedModel:
    """A random model; noise on every weight, so that biases and norms are not what they are at the start."""
    module = models.Decoder(config, rngs=nnx.Rngs(seed), dtype=jnp.float32)
    noise = np.random.default_rng(seed)
    state = jax.tree.map(lambda leaf: leaf + 0.05 * noise.normal(size=leaf.shape).astype("f4"), nnx.state(module))
    nnx.update(module, state)
    return models.LoadedModel(
        name="tiny", module=module, config=config, tokenizer=None, eos_token_ids=(), fingerprint="tiny"
    )


def _engine(config=TINY, **options) -> hj.Engine:
    return hj.Engine(_loaded(config), hj.EngineConfig(**{"kv_cache_bytes": 1 << 20, "max_model_len": 128, **options}))


@pytest.fixture(scope="module")
def engine() -> hj.Engine:
    return _engine()


def _assert_near_the_plain_model(engine: hj.Engine, bound: float) -> None:
    """Every log-probability of ragged prompts' cached decoding, against the plain model over the same tokens."""
    size = engine.model.config.vocab_size
    prompts = [np.random.default_rng(n).integers(0, size, n) for n in (1, 3, 21)]
    params = hj.SamplingParams(max_tokens=10, temperature=0, logprobs=min(size, 128))
    for completion in engine.generate(prompts, params):
        prompt = prompts[int(completion.id)]
        ids = jnp.asarray([[*prompt, *completion.token_ids]])
        logits = np.asarray(engine.model.module(ids, jnp.arange(ids.shape[1])[None])[0], np.float64)
        steps = logits[len(prompt) - 1 : -1]
        expected = steps - np.log(np.exp(steps).sum(axis=1, keepdims=True))
        for token, best, step, row in zip(
            completion.token_ids, steps.argmax(axis=1), completion.logprobs, expected, strict=True
        ):
            assert token == best or row[best] - row[token] < bound
            np.testing.assert_allclose(list(step.values()), row[list(step)], atol=bound)


@pytest.mark.parametrize("name", CASES)
def test_every_logit_of_cached_decoding_equals_the_plain_model(name):
    _assert_near_the_plain_model(_engine(CASES[name], max_num_batched_tokens=8, page_size=4), 1e-4)


# Ten times what rounding to the type may change of a number near the largest.
@pytest.mark.parametrize(("dtype", "bound"), [("float16", 5e-3), ("bfloat16", 4e-2), ("int8", 4e-2)])
def test_pools_of_fewer_bits_stay_near_the_plain_model(dtype, bound):
    _assert_near_the_plain_model(_engine(kv_cache_dtype=dtype, max_num_batched_tokens=8), bound)


def test_int8_pools_hold_nearly_four_times_the_tokens():
    pages = {dtype: _engine(kv_cache_dtype=dtype).stats.pages_total for dtype in ("float32", "int8")}
    per_token = {"float32": TINY.head_dim * 4, "int8": TINY.head_dim + 4}  # and a scale
    assert pages["int8"] == pytest.approx(pages["float32"] * per_token["float32"] / per_token["int8"], rel=0.05)


def test_without_the_native_kernel_it_says_so_and_gives_the_same(monkeypatch):
    monkeypatch.setattr(native_attention, "refusal", lambda **_: "no library")
    with pytest.warns(UserWarning, match=r"plain jax\.numpy.*no library"):
        engine = _engine(max_num_batched_tokens=8, page_size=4)
    _assert_near_the_plain_model(engine, 1e-4)
    with pytest.raises(ConfigError, match="kv_cache_dtype=int8 needs the native kernel: no library"):
        _engine(kv_cache_dtype="int8")


def test_empty_input_gives_nothing(engine):
    assert list(engine.generate([])) == []


def test_one_prompt_may_be_given_bare(engine):
    (completion,) = engine.generate(hj.Request(id="only", prompt_token_ids=(1, 2)), hj.SamplingParams(max_tokens=3))
    assert completion.id == "only"
    assert completion.usage == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert completion.finish_reason == "length"


def test_samples_of_a_request_differ_and_repeat(engine):
    params = hj.SamplingParams(n=4, max_tokens=8, temperature=1, seed=3)
    (first,), (again,) = (list(engine.generate([[1, 2, 3]], params)) for _ in range(2))
    assert len({sample.token_ids for sample in first.outputs}) > 1
    assert [s.token_ids for s in first.outputs] == [s.token_ids for s in again.outputs]
    assert [sample.index for sample in first.outputs] == [0, 1, 2, 3]


def test_seed_of_the_engine_is_used_where_a_request_has_none():
    params = hj.SamplingParams(max_tokens=12, temperature=1)
    tokens = [next(_engine(seed=seed).generate([[1, 2, 3]], params)).token_ids for seed in (0, 0, 1)]
    assert tokens[0] == tokens[1] != tokens[2]


def test_many_prompts_through_a_small_pool(engine):
    small = _engine(kv_cache_bytes=40 << 10, page_size=4)
    prompts = [[n % 50, n % 7] for n in range(300)]
    params = hj.SamplingParams(max_tokens=4, temperature=0)
    seen = {completion.id: completion.token_ids for completion in small.generate(prompts, params)}
    assert len(seen) == 300
    alone = {completion.id: completion.token_ids for completion in engine.generate(prompts[:40], params)}
    assert {row: seen[row] for row in alone} == alone
    assert small.stats.pages_used == 0


def test_a_sequence_longer_than_the_model_is_refused_before_anything_runs(engine):
    steps = engine.stats.steps
    with pytest.raises(RequestError, match=r"request .1.*128"):
        next(engine.generate([[1], [2] * 200]))
    assert engine.stats.steps == steps


def test_recorded_errors_do_not_stop_the_others(engine):
    prompts = [[1], [2] * 200, "text", [10**6], []]
    found = {c.id: c for c in engine.generate(prompts, hj.SamplingParams(max_tokens=2), on_error="record")}
    assert [found[str(n)].finish_reason for n in range(5)] == ["length", "error", "error", "error", "error"]
    assert "no tokenizer" in found["2"].error
    assert "1000000 is outside the vocabulary" in found["3"].error
    assert "no tokens" in found["4"].error


def test_a_caller_that_stops_early_leaves_nothing_behind(engine):
    stream = engine.generate([[n] for n in range(20)], hj.SamplingParams(max_tokens=3, temperature=0))
    next(stream)
    stream.close()
    (after,) = engine.generate([[1, 2]], hj.SamplingParams(max_tokens=3, temperature=0))
    assert len(after.token_ids) == 3
    assert engine.stats.pages_used == 0


def test_more_logprobs_than_the_vocabulary_has_gives_them_all(engine):
    params = hj.SamplingParams(max_tokens=1, temperature=0, logprobs=128)
    assert len(next(engine.generate([[1]], params)).logprobs[0]) == 128
    with pytest.raises(RequestError, match=r"logit_bias token id 256 is outside the vocabulary 0\.\.255"):
        next(engine.generate([[1]], hj.SamplingParams(logit_bias={256: 1.0})))


def test_no_logprobs_but_the_drawn_one(engine):
    (completion,) = engine.generate([[1]], hj.SamplingParams(max_tokens=2, temperature=0, logprobs=0))
    assert [list(step) for step in completion.logprobs] == [[token] for token in completion.token_ids]


def test_stopping_while_another_microbatch_is_in_flight_gives_its_pages_and_its_place_back():
    engine = _engine(num_microbatches=2, max_num_batched_tokens=16)
    prompts = [[1] * length for length in (3, 12, 21, 30, 39)]
    params = hj.SamplingParams(max_tokens=8, temperature=0)
    expected = {c.id: c.token_ids for c in engine.generate(prompts, params)}
    for _ in range(3):  # more often than there are places
        stream = engine.generate(prompts, params)
        next(stream)
        stream.close()
        assert engine.stats.pages_used == 0
    assert {c.id: c.token_ids for c in engine.generate(prompts, params)} == expected


def test_stop_token_ids_end_a_sequence(engine):
    (free,) = engine.generate([[5, 6]], hj.SamplingParams(max_tokens=8, temperature=0))
    stop = free.token_ids[3]
    first = free.token_ids.index(stop)
    (stopped,) = engine.generate([[5, 6]], hj.SamplingParams(max_tokens=8, temperature=0, stop_token_ids=[stop]))
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert (stopped.finish_reason, stopped.outputs[0].stop_reason) == ("stop", stop)


def test_max_tokens_none_goes_on_to_the_end_of_the_model(engine):
    (completion,) = engine.generate([[1] * 100], hj.SamplingParams(max_tokens=None, temperature=0))
    assert completion.usage["total_tokens"] == 128
    assert completion.finish_reason == "length"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_bytes": 10}, "holds no page"),
        ({"tier1_memory_gb": 1e-6}, "the weights take"),
        ({"page_size": 0}, "page_size=0"),
        ({"tier1": "gpu"}, "tier1='gpu'.*JAX sees"),
        ({"attention": "tier3"}, "attention='tier3'"),
    ],
)
def test_configurations_that_do_not_fit_are_refused_with_the_numbers(options, message):
    with pytest.raises(ConfigError, match=message):
        _engine(**options)


def test_bf16_pools_and_weights_follow_the_plain_bf16_model():
    module = models.Decoder(TINY, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    loaded = dataclasses.replace(_loaded(TINY), module=module)
    engine = hj.Engine(loaded, hj.EngineConfig(kv_cache_bytes=1 << 20, max_model_len=64))
    (completion,) = engine.generate([[1, 2, 3, 4]], hj.SamplingParams(max_tokens=1, temperature=0, logprobs=5))
    logits = np.asarray(module(jnp.asarray([[1, 2, 3, 4]]), jnp.arange(4)[None])[0, -1], np.float64)
    expected = logits - np.log(np.exp(logits).sum())
    for token, value in completion.logprobs[0].items():
        assert value == pytest.approx(expected[token], abs=0.05)


def test_repr_says_what_runs_where(engine):
    assert "dense stages on" in repr(engine)
    assert "attention sites on" in repr(engine)
    assert "KV pages of 128 tokens" in repr(engine)


def test_messages_that_the_template_refuses_fail_alone():
    class NoTemplate:
        def encode(self, text, *, add_special_tokens=True):
            return [1, 2]

        def decode(self, ids, *, skip_special_tokens=True):
            return "x" * len(ids)

        def apply_chat_template(self, messages, *, add_generation_prompt=True):
            raise models.ChatTemplateError("no chat template")

    loaded = dataclasses.replace(_loaded(TINY), tokenizer=NoTemplate())
    engine = hj.Engine(loaded, hj.EngineConfig(kv_cache_bytes=1 << 20, max_model_len=128))
    chat = hj.Request(id="chat", messages=({"role": "user", "content": "Hello"},))
    prompts = [chat, hj.Request(id="plain", prompt="Hello")]
    found = {c.id: c for c in engine.generate(prompts, hj.SamplingParams(max_tokens=2), on_error="record")}
    assert found["chat"].error == "no chat template"
    assert len(found["plain"].token_ids) == 2
    with pytest.raises(RequestError, match="'chat': no chat template"):
        list(engine.generate(prompts))
