"""When a worker that is lost is tried again."""

from __future__ import annotations

import itertools
import types

import pytest

from hetero_jax import worker_link
from hetero_jax.scheduler_types import PoolLost
from hetero_jax.worker_link import WorkerLink
from transport import Hello

HELLO = Hello(fingerprint="", generation=1, page_budget=1)


@pytest.fixture
def clock(monkeypatch):
    found = types.SimpleNamespace(now_s=1000.0, monotonic=lambda: found.now_s)
    monkeypatch.setattr(worker_link, "time", found)
    return found


def _session() -> types.SimpleNamespace:
    """Of a worker that is there, until `failure` is set."""
    return types.SimpleNamespace(
        num_pages=1, page_format="", speed=None, draining=False, failure=None, look=lambda: None, close=lambda: None
    )


def _pause_s(link: WorkerLink, clock) -> float:
    """Lose the session, and wait until another one has begun."""
    link.session.failure = "a test"
    assert isinstance(link.poll(lambda: HELLO), PoolLost)
    lost_s = clock.now_s
    while link.session is None:
        link.poll(lambda: HELLO)
        if link._attempt is None:
            clock.now_s += 0.25
        else:
            link._attempt.exception(timeout=10)
            link.poll(lambda: HELLO)
    return clock.now_s - lost_s


def test_one_that_is_lost_again_and_again_is_tried_later_and_later(clock):
    link = WorkerLink("a", lambda hello: _session(), itertools.count().__next__)
    link.join(HELLO)
    pauses = [_pause_s(link, clock) for _ in range(9)]
    assert pauses == pytest.approx([0, 1, 2, 4, 8, 16, 32, 32, 32], abs=0.25)
    clock.now_s += 3600  # a good while
    assert [_pause_s(link, clock) for _ in range(2)] == pytest.approx([0, 1], abs=0.25)
