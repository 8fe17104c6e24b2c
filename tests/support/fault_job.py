"""A small job whose tokens show whether anything was lost, doubled or computed from the wrong cache."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import hetero_jax as hj
from small_model import SmallModel

WAIT_S = 60  # for what must happen; nothing here is timed
REQUESTS = [
    hj.Request(
        id=str(n),
        prompt_token_ids=tuple([1 + n, 2, 3, 5, 8][: 1 + n % 5]),
        sampling_params=hj.SamplingParams(max_tokens=2 + 3 * n, temperature=1, seed=3, ignore_eos=True),
    )
    for n in range(10)
]


@functools.cache
def plan() -> hj.Plan:
    """Of a model with random weights, whose next token depends on all before it."""
    small = SmallModel(kv_heads=3)
    return hj.partition(small, small.params(), max_rows=64)


def run(engine: hj.Engine, after: Callable[[int], object] = lambda count: None) -> dict[str, tuple[int, ...]]:
    """Tokens by request. after: called with how many completions there are."""
    found: dict[str, tuple[int, ...]] = {}
    for completion in engine.generate(REQUESTS):
        assert completion.id not in found
        found[completion.id] = completion.token_ids
        after(len(found))
    assert engine.stats.pages_used == 0
    return found


@functools.cache
def undisturbed() -> dict[str, tuple[int, ...]]:
    """Of an engine that keeps its attention to itself."""
    return run(hj.Engine(plan(), hj.EngineConfig(kv_cache_bytes=1 << 20, page_size=16)))


def engine_of(*workers: str, **config) -> hj.Engine:
    """An engine whose rows keep their bits on the way to its workers."""
    return hj.Engine(plan(), hj.EngineConfig(workers=workers, wire_dtype="float32", page_size=16, **config))


def wait_for_drain(engine: hj.Engine) -> None:
    """Until the engine has heard that a worker is about to leave."""
    end_s = time.monotonic() + WAIT_S
    while not any(session.draining for session in engine._fleet.sessions.values()):
        assert time.monotonic() < end_s
        time.sleep(0.01)
