"""Layers with and without a window: how they are grouped, what a sequence of such a model keeps, and its tokens."""

from __future__ import annotations

import collections
import dataclasses
import functools
import random
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hetero_jax as hj
from fault_job import wait_for_drain
from hetero_jax.page_groups import group_pages
from partition import AttentionSpec
from scheduler_executor import Executor, make_config, make_executor
from small_model import SmallModel, softmax_attention
from worker_thread import ThreadWorker

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, v_head_dim=8, scale=1.0)
GEMMA_3 = (512,) * 5 + (None,)


def _sites(*windows: int | None, keys: tuple[int, ...] | None = None, **changes: int) -> list:
    """Of a plan; sites with equal keys keep the same values."""
    return [
        SimpleNamespace(spec=dataclasses.replace(SPEC, window=window, **changes), cache_key=(key, *changes.items()))
        for window, key in zip(windows, keys or range(len(windows)), strict=True)
    ]


@pytest.mark.parametrize(
    ("windows", "groups"),
    [
        ((None,) * 30, {(None, 30): 1}),
        ((4096,) * 32, {(4096, 32): 1}),
        ((4096, None) * 13, {(4096, 13): 1, (None, 13): 1}),  # Gemma 2 2B
        ((128, None) * 12, {(128, 12): 1, (None, 12): 1}),  # gpt-oss
        (GEMMA_3 * 3, {(512, 3): 5, (None, 3): 1}),  # Gemma 3 270M
        ((GEMMA_3 * 5)[:26], {(512, 4): 5, (512, 2): 1, (None, 4): 1}),  # 1B
        (GEMMA_3 * 8, {(512, 8): 5, (None, 8): 1}),  # 12B
        ((GEMMA_3 * 11)[:62], {(512, 10): 5, (512, 2): 1, (None, 10): 1}),  # 27B
        ((4096, None) * 12 + (None,), {(4096, 12): 1, (None, 13): 1}),
        ((64, 9000, None), {(64, 1): 1, (None, 2): 1}),  # no sequence is longer than 8192
    ],
)
def test_groups_of_known_models(windows, groups):
    found = group_pages(_sites(*windows), max_model_len=8192)
    sizes = collections.Counter(place.group for place in found.sites)
    assert collections.Counter((found.windows[group], sizes[group]) for group in sizes) == groups
    assert len(set(found.sites)) == len(windows)
    for group, size in sizes.items():
        assert sorted(place.pool for place in found.sites if place.group == group) == list(range(size))
    for window, place in zip(windows, found.sites, strict=True):
        assert found.windows[place.group] == (None if window is None or window > 8192 else window)


def test_sites_that_keep_the_same_values_have_one_place_that_sees_as_far_as_any_of_them():
    found = group_pages(_sites(4, None, 4, None, 8, keys=(0, 1, 0, 2, 2)), max_model_len=64)
    (first, second, third, fourth, fifth) = found.sites
    assert first == third and fourth == fifth and len({first, second, fourth}) == 3
    assert [found.windows[place.group] for place in found.sites] == [4, None, 4, None, None]


def test_pages_of_several_shapes_or_of_no_kernel_have_one_table():
    no_kernel = [SimpleNamespace(spec=None, cache_key="no kernel")]
    for other in (_sites(4, head_dim=16), _sites(4, num_kv_heads=4), no_kernel):
        found = group_pages([*_sites(4, None), *other], max_model_len=64)
        assert found.windows == (None,) and {place.pool for place in found.sites} == {0, 1, 2}


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.integers(1, 40)), min_size=1, max_size=4),
    st.sampled_from([1, 3, 4, 16]),
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 14)), max_size=6),
    st.integers(1, 20),
    st.randoms(use_true_random=False),
)
def test_pages_in_use_are_those_that_rows_see_of_each_group(windows, page_size, sequences, budget, rng):
    """And what they see is in them, as the executor checks."""
    config = make_config(*windows, page_size=page_size, max_num_batched_tokens=budget, max_model_len=64)
    executor = Executor(config, {0: 2000})  # nobody lacks pages
    for seq_id, (prompt, max_tokens) in enumerate(sequences):
        executor.add(seq_id, prompt, max_tokens)
    while executor.scheduler.has_unfinished:
        while executor.launch() is not None:
            assert executor.scheduler.pages_used == executor.pages_needed()
        executor.land(rng.choice(list(executor.in_flight)))
        assert executor.scheduler.pages_used == executor.pages_needed()
    assert executor.scheduler.pages_used == executor.scheduler.num_preemptions == 0


def test_memory_flows_between_groups():
    """24 pages hold one sequence of 48 positions, 12 + 2 and a chunk, or four of 12, 3 + 2 each."""
    for lengths in ([48], [12] * 4):
        executor = make_executor(24, page_size=4, max_num_batched_tokens=8, windows=(None, 5))
        for seq_id, length in enumerate(lengths):
            executor.add(seq_id, length - 3, 4)
        executor.drain(random.Random(0))
        assert executor.scheduler.num_preemptions == 0


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.one_of(st.none(), st.integers(1, 30)), min_size=2, max_size=3))
def test_a_shared_beginning_is_there_in_every_group(seed, windows):
    """However little memory there is: the executor checks what rows see, and who writes where."""
    rng = random.Random(seed)
    config = make_config(*windows, page_size=4, max_num_batched_tokens=rng.randint(1, 24), max_model_len=64)
    num_pages = config.most_pages(60) + rng.randrange(20)
    executor = Executor(config, {0: num_pages, 1: num_pages}, families=2, num_common=13, formats={0: "a", 1: "a"})
    for seq_id in range(12):
        executor.add(seq_id, rng.randint(1, 48), rng.randint(1, 12))
    executor.drain(rng)
    assert len(executor.done) == 12


def test_a_beginning_is_shared_though_its_pages_behind_the_window_hold_something_else():
    config = make_config(None, 4, page_size=4, max_num_batched_tokens=64, num_microbatches=1)
    executor = Executor(config, {0: 28}, families=2)
    executor.add(0, prompt=40, max_tokens=9)  # has 10 pages of each group, then 9 fewer of the second
    executor.land(executor.launch().batch_id)
    executor.add(1, prompt=22, max_tokens=9)  # another beginning: takes what never was in use, and more
    executor.land(executor.launch().batch_id)
    assert executor.scheduler.pages_used == 11 + 2 + 6 + 2
    executor.add(2, prompt=36, max_tokens=9)
    executor.drain(random.Random(0))
    assert executor.shared_positions == 32


@dataclasses.dataclass(frozen=True)
class Gemma(SmallModel):
    """Layers with a window of so many positions, or none."""

    layers: int = 6
    windows: tuple[int | None, ...] = (5, 5, 5, 5, 5, None)

    def __call__(self, params, tokens, positions):
        x = params["embed"][tokens]
        for layer, window in zip(params["layers"], self.windows, strict=True):
            attention = functools.partial(softmax_attention, window=window)
            x = SmallModel.block(dataclasses.replace(self, attention=attention), x, layer, positions)
        return x @ params["embed"].T


MODELS = {
    "Gemma 2": Gemma(layers=4, windows=(5, None) * 2, kv_heads=3),  # of which one of two workers has more
    "Gemma 3": Gemma(),
    "three kinds": Gemma(layers=4, windows=(None, 3, 12, None)),
}
PROMPTS = [tuple(range(1, 30)), tuple(range(1, 20)), (4,) * 25, (7, 3)]
COMMON = {"page_size": 4, "max_model_len": 64, "max_num_batched_tokens": 16}


@functools.cache
def _plan(name: str) -> hj.Plan:
    model = MODELS[name]
    return hj.partition(model, model.params(), max_rows=64)


@functools.cache
def _expected(name: str) -> dict[str, list[int]]:
    model = MODELS[name]
    return {str(n): model.greedy(model.params(), prompt, 12, max_rows=48) for n, prompt in enumerate(PROMPTS)}


def _tokens(engine: hj.Engine) -> dict[str, list[int]]:
    params = hj.SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    found = {each.id: list(each.token_ids) for each in engine.generate(PROMPTS, params)}
    assert engine.stats.pages_used == 0
    return found


def _engine(name: str, num_pages: int) -> hj.Engine:
    """With so many pages."""
    tier = hj.Engine(_plan(name), hj.EngineConfig(kv_cache_bytes=1 << 20, **COMMON))._attention
    memory = num_pages * (tier.pool_bytes // tier.num_pages)
    engine = hj.Engine(_plan(name), hj.EngineConfig(kv_cache_bytes=memory, **COMMON))
    assert engine.stats.pages_total == num_pages
    return engine


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_the_plain_model(name):
    assert _tokens(_engine(name, 200)) == _expected(name)


def test_preempted_sequences_have_the_tokens_of_the_plain_model():
    engine, model = _engine("Gemma 3", 48), MODELS["Gemma 3"]
    params = hj.SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    found = {each.id: list(each.token_ids) for each in engine.generate([(1, 2), (3, 4), (5,), (6, 1)], params)}
    prompts = {"0": (1, 2), "1": (3, 4), "2": (5,), "3": (6, 1)}
    assert found == {name: model.greedy(model.params(), p, 40, max_rows=48) for name, p in prompts.items()}
    assert engine.stats.preemptions > 0 == engine.stats.pages_used


def test_a_sequence_fits_for_which_one_table_for_all_layers_had_no_pages():
    """47 positions take 12 pages a layer, 72 in all; but at most 6 at once where 5 are seen, a chunk of 16 included."""
    engine = _engine("Gemma 3", 12 + 5 * 6)
    params = hj.SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    (found,) = engine.generate([tuple(range(28))], params)
    model = MODELS["Gemma 3"]
    assert list(found.token_ids) == model.greedy(model.params(), tuple(range(28)), 20, max_rows=48)


@pytest.mark.parametrize("partition", ["sequence", "head"])
@pytest.mark.parametrize("name", ["Gemma 2", "Gemma 3"])
def test_workers_serve_groups_too(name, partition):
    with ThreadWorker() as one, ThreadWorker() as other:
        workers = (one.address, other.address)
        config = hj.EngineConfig(workers=workers, kv_partition=partition, wire_dtype="float32", **COMMON)
        assert _tokens(hj.Engine(_plan(name), config)) == _expected(name)


def test_pages_of_all_groups_move_with_their_sequence():
    with ThreadWorker() as leaving, ThreadWorker() as stays:
        config = hj.EngineConfig(workers=(leaving.address, stays.address), wire_dtype="float32", **COMMON)
        engine = hj.Engine(_plan("Gemma 3"), config)
        params = hj.SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
        found = {}
        prompts = [hj.Request(id=str(n), prompt_token_ids=prompt) for n, prompt in enumerate(PROMPTS)]
        short = dataclasses.replace(params, max_tokens=3)
        prompts.append(hj.Request(id="short", prompt_token_ids=(1, 2), sampling_params=short))
        for completion in engine.generate(prompts, params):
            if completion.id == "short":
                leaving.server.drain("a test")
                wait_for_drain(engine)
            found[completion.id] = list(completion.token_ids)
    del found["short"]
    assert found == _expected("Gemma 3")
    assert engine.stats.sequences_moved > 0 and engine.stats.workers_lost == 0


def test_a_lost_workers_sequences_are_computed_again():
    with ThreadWorker(at=40, fault=ThreadWorker.die) as dies, ThreadWorker() as stays:
        config = hj.EngineConfig(workers=(dies.address, stays.address), wire_dtype="float32", **COMMON)
        engine = hj.Engine(_plan("Gemma 3"), config)
        assert _tokens(engine) == _expected("Gemma 3")
        assert engine.stats.workers_lost == 1
