"""Golden tokens of SmolLM2-135M-Instruct through the two-tier path, however the work is cut up."""

from __future__ import annotations

import random

import pytest

import hetero_jax as hj
from golden import first_difference, golden_rows

CONFIGS = {
    "default": hj.EngineConfig(kv_cache_bytes=512 << 20, max_model_len=2560),
    "one microbatch, small pages, small budget": hj.EngineConfig(
        kv_cache_bytes=256 << 20, num_microbatches=1, page_size=8, max_num_batched_tokens=32, max_model_len=1024
    ),
    "four microbatches, large pages": hj.EngineConfig(
        kv_cache_bytes=256 << 20, num_microbatches=4, page_size=64, max_model_len=1024
    ),
    "so few pages that sequences are preempted": hj.EngineConfig(
        kv_cache_bytes=24 << 20, page_size=8, max_num_batched_tokens=64, max_model_len=1024
    ),
}


@pytest.fixture(scope="module")
def model(smollm2_gguf):
    return hj.load(str(smollm2_gguf))


def _requests(rows, order: int) -> list[hj.Request]:
    """Each row greedily, and each short row sampled at temperature 1, in a shuffled order."""
    found = []
    for row in rows:
        greedy = hj.SamplingParams(max_tokens=len(row["greedy_ids"]), temperature=0, ignore_eos=True)
        ids = tuple(row["prompt_ids"])
        found.append(hj.Request(id=row["id"], prompt_token_ids=ids, sampling_params=greedy))
        if len(ids) < 100:
            sampled = hj.SamplingParams(max_tokens=24, temperature=1, seed=7, ignore_eos=True, top_p=0.95)
            found.append(hj.Request(id="sampled " + row["id"], prompt_token_ids=ids, sampling_params=sampled))
    random.Random(order).shuffle(found)
    return found


@pytest.fixture(scope="module")
def runs(model) -> dict[str, tuple[hj.EngineStats, dict[str, tuple[int, ...]]]]:
    found = {}
    for order, (name, config) in enumerate(CONFIGS.items()):
        engine = hj.Engine(model, config)
        rows = [row for row in golden_rows() if len(row["prompt_ids"]) < 100]
        long = [row for row in golden_rows() if 100 <= len(row["prompt_ids"]) <= engine.max_model_len - 48]
        if name == "default":
            rows += long
        elif not name.startswith("so few"):
            rows += long[order % 2 :: 2]  # each in one of the two
        tokens = {completion.id: completion.token_ids for completion in engine.generate(_requests(rows, order))}
        found[name] = (engine.stats, tokens)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_equal_the_reference(runs, name):
    _, tokens = runs[name]
    rows = [row for row in golden_rows() if row["id"] in tokens]
    assert len(rows) >= 20
    different = {row["id"]: first_difference(row, tokens[row["id"]]) for row in rows}
    assert {row_id: at for row_id, at in different.items() if at is not None} == {}


def test_the_default_run_covers_every_golden_row(runs):
    assert {row["id"] for row in golden_rows()} <= set(runs["default"][1])


@pytest.mark.parametrize("name", list(CONFIGS)[1:])
def test_sampled_tokens_do_not_depend_on_how_the_work_is_cut_up(runs, name):
    reference, tokens = runs["default"][1], runs[name][1]
    sampled = [row_id for row_id in tokens if row_id.startswith("sampled")]
    assert len(sampled) >= 20
    assert {row_id: tokens[row_id] for row_id in sampled} == {row_id: reference[row_id] for row_id in sampled}


def test_sequences_were_preempted_where_pages_were_few(runs):
    assert runs["so few pages that sequences are preempted"][0].preemptions > 0
    assert all(stats.pages_used == 0 for stats, _ in runs.values())


def test_text_of_a_chat_row_goes_through_the_template(model):
    row = next(row for row in golden_rows() if "messages" in row)
    engine = hj.Engine(model, hj.EngineConfig(kv_cache_bytes=64 << 20, max_model_len=256))
    params = hj.SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    (completion,) = engine.generate(hj.Request(id="a", messages=tuple(row["messages"])), params)
    assert completion.prompt_token_ids == tuple(row["prompt_ids"])
    assert completion.token_ids == tuple(row["greedy_ids"][:12])
    assert model.tokenizer.decode(list(completion.token_ids)) == completion.text
