"""Prompts that begin alike are computed once: fewer rows and pages, and the tokens of the plain model."""

from __future__ import annotations

import functools

import pytest

import hetero_jax as hj
import zoo_attention as zoo
from small_model import SmallModel, softmax_attention
from worker_thread import ThreadWorker

PROMPT = tuple(range(1, 12))  # 2 pages of 4, and 3 tokens
MODELS = {
    "native": SmallModel(),
    "window": SmallModel(attention=functools.partial(softmax_attention, window=14)),
    "no kernel": SmallModel(attention=zoo.sigmoid),
}

pytestmark = pytest.mark.filterwarnings("ignore:the attention opened at")


def _engine(model: SmallModel, *, page_size: int = 4, **config) -> hj.Engine:
    plan = hj.partition(model, model.params(), max_rows=64)
    return hj.Engine(plan, hj.EngineConfig(page_size=page_size, max_model_len=64, kv_cache_bytes=1 << 20, **config))


def _requests(prompts, *, n: int = 1, max_tokens: int = 6, temperature: float = 0) -> list[hj.Request]:
    params = hj.SamplingParams(n=n, max_tokens=max_tokens, temperature=temperature, seed=5, ignore_eos=True)
    return [
        hj.Request(id=str(index), prompt_token_ids=prompt, sampling_params=params)
        for index, prompt in enumerate(prompts)
    ]


def _tokens(engine: hj.Engine, requests: list[hj.Request]) -> dict[str, list[tuple[int, ...]]]:
    found = {each.id: [sample.token_ids for sample in each.outputs] for each in engine.generate(requests)}
    assert engine.stats.pages_used == 0
    return found


@pytest.mark.parametrize("name", MODELS)
def test_samples_share_the_pages_of_their_prompt(name):
    requests = _requests([PROMPT], n=3, temperature=1)
    engine, apart = (_engine(MODELS[name], enable_prefix_caching=enable) for enable in (True, False))
    assert _tokens(engine, requests) == _tokens(apart, requests)
    whole = 3 * (len(PROMPT) + 6 - 1)
    assert (apart.stats.rows_computed, apart.stats.prefix_cache_hits) == (whole, 0)
    assert (engine.stats.rows_computed, engine.stats.prefix_cache_hits) == (whole - 16, 16)


@pytest.mark.parametrize("name", MODELS)
def test_prompts_of_several_requests_share_what_they_begin_with(name):
    model = MODELS[name]
    prompts = [(*PROMPT, 20 + last) for last in range(4)] + [PROMPT[:8], PROMPT[:4], (9, *PROMPT)]
    engine = _engine(model, max_num_batched_tokens=8)
    expected = {str(n): [tuple(model.greedy(model.params(), prompt, 6))] for n, prompt in enumerate(prompts)}
    assert _tokens(engine, _requests(prompts)) == expected
    assert engine.stats.prefix_cache_hits > 0
    rows = sum(len(prompt) + 5 for prompt in prompts)
    assert engine.stats.rows_computed + engine.stats.prefix_cache_hits == rows


def test_what_is_shared_outlives_who_computed_it():
    model = MODELS["native"]
    lengths = [1, 9, 5]
    requests = [
        hj.Request(
            id=str(n),
            prompt_token_ids=PROMPT,
            sampling_params=hj.SamplingParams(max_tokens=length, temperature=0, ignore_eos=True),
        )
        for n, length in enumerate(lengths)
    ]
    expected = model.greedy(model.params(), list(PROMPT), max(lengths))
    engine = _engine(model, max_num_seqs=1)
    for hits in (16, 40):  # all but the first of all
        assert _tokens(engine, requests) == {str(n): [tuple(expected[:length])] for n, length in enumerate(lengths)}
        assert engine.stats.prefix_cache_hits == hits


def test_samples_on_workers_share_within_each_and_survive_the_loss_of_one():
    requests = _requests([PROMPT, PROMPT[::-1]], n=4, max_tokens=12, temperature=1)
    undisturbed = _tokens(_engine(MODELS["native"], enable_prefix_caching=False), requests)
    with ThreadWorker(at=12, fault=ThreadWorker.die) as dies, ThreadWorker() as stays:
        workers = (dies.address, stays.address)
        engine = _engine(MODELS["native"], workers=workers, wire_dtype="float32", max_num_batched_tokens=16)
        assert _tokens(engine, requests) == undisturbed
        assert engine.stats.workers_lost == 1 and engine.stats.prefix_cache_hits > 0
