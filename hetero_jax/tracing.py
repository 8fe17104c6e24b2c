"""What ran when: slices of time in lanes, one for each tier and link, as a file that Chrome and Perfetto read.

JAX computes behind the caller's back, so a thread per lane waits for what was dispatched there, in order. Workers say
by their own clocks when they began and ended; how far these are from ours follows from every call: it cannot begin
before it is sent, nor come back before it has ended.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from hetero_jax.devices import are_ready

TIER1, TIER2 = "tier 1", "tier 2"  # the latter in this process
_PAGES = "pages"


class Slice(NamedTuple):
    """Work in a lane, in seconds of the monotonic clock. num_bytes: that were moved."""

    lane: str
    name: str
    begin_s: float
    end_s: float
    num_bytes: int = 0


class WorkerCall(NamedTuple):
    """A call as both sides saw it: ours in seconds, the worker's in nanoseconds of another clock."""

    name: str
    begin_s: float
    sent_s: float
    done_s: float
    began_ns: int
    ended_ns: int
    bytes_up: int
    bytes_down: int


class PageCopy(NamedTuple):
    """Pages that went from one worker to another by way of this process, in seconds of the monotonic clock."""

    source: str
    target: str
    num_pages: int
    num_bytes: int
    asked_s: float
    there_s: float
    sent_s: float


class Trace:
    """Collects; `slices`, `write` and `summary` wait for what is still running."""

    def __init__(self) -> None:
        self._slices: list[Slice] = []
        self._calls: defaultdict[str, list[WorkerCall]] = defaultdict(list)
        self._copies: list[PageCopy] = []
        self.counts: list[tuple[str, float, int]] = []  # name, second of the monotonic clock, value
        self._lanes: dict[str, _Lane] = {}

    def computed(self, lane: str, name: str, inputs: Any, outputs: Any) -> None:
        """JAX computes these arrays of those, in this lane, from now or from when the inputs are there."""
        if lane not in self._lanes:
            self._lanes[lane] = _Lane(lane, self._slices)
        awaited = [array for array in jax.tree.leaves(inputs) if isinstance(array, jax.Array)]  # NumPy's are there
        self._lanes[lane].put(name, awaited, outputs)

    def called(self, address: str, call: WorkerCall) -> None:
        """A worker has answered."""
        self._calls[address].append(call)

    def copied(self, copy: PageCopy) -> None:
        """Pages have moved."""
        self._copies.append(copy)

    def count(self, name: str, value: int) -> None:
        """A number that is so from now on."""
        self.counts.append((name, time.monotonic(), value))

    def slices(self) -> list[Slice]:
        """All so far, by lane and time; those of one lane do not overlap."""
        for lane in self._lanes.values():
            lane.join()
        remote = [each for address, calls in self._calls.items() for each in _slices_of(address, calls)]
        remote += [each for copy in self._copies for each in _slices_of_copy(copy)]
        return sorted([*self._slices, *_in_turn(remote)], key=lambda each: (each.lane, each.begin_s, each.end_s))

    def busy_s(self, lane: str, begin_s: float, end_s: float) -> float:
        """Seconds of those between these two in which the lane was busy."""
        spans = [(max(each.begin_s, begin_s), min(each.end_s, end_s)) for each in self.slices() if each.lane == lane]
        return _covered_s(span for span in spans if span[0] < span[1])

    def write(self, path: str | Path) -> None:
        """In the Trace Event Format, in microseconds."""
        slices = self.slices()
        lanes = {lane: number for number, lane in enumerate(dict.fromkeys(each.lane for each in slices), 1)}
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": {"name": lane}}
            for lane, number in lanes.items()
        ]
        for each in slices:
            begin_us, end_us = round(each.begin_s * 1e6, 3), round(each.end_s * 1e6, 3)
            times = {"ts": begin_us, "dur": round(end_us - begin_us, 3)}
            bytes_ = {"args": {"bytes": each.num_bytes}} if each.num_bytes else {}
            events.append({"ph": "X", "name": each.name, "pid": 1, "tid": lanes[each.lane], **times, **bytes_})
        for name, at_s, value in self.counts:
            events.append({"ph": "C", "name": name, "pid": 1, "ts": round(at_s * 1e6, 3), "args": {name: value}})
        Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))

    def summary(self) -> str:
        """Busy fractions of the lanes, how much of it at once, bytes per token, pages."""
        slices = self.slices()
        if not slices:
            return "trace: nothing ran"
        spans: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        for each in slices:
            spans[each.lane].append((each.begin_s, each.end_s))
        total_s = max(each.end_s for each in slices) - min(each.begin_s for each in slices)
        busy = [f"{lane} busy {_covered_s(spans[lane]) / total_s:.0%}" for lane in spans]
        tier2 = [span for lane in spans if lane == TIER2 or lane.startswith("worker ") for span in spans[lane]]
        both_s = _covered_s(spans[TIER1]) + _covered_s(tier2) - _covered_s([*spans[TIER1], *tier2])
        tokens, pages = (
            max((n for each, _, n in self.counts if each == name), default=0) for name in ("tokens", "pages")
        )
        moved = sum(each.num_bytes for each in slices if each.name != _PAGES)
        return (
            f"trace: {total_s:.2f} s, {', '.join(busy)}; both tiers at once {both_s / total_s:.0%}; "
            f"{moved / max(tokens, 1):.0f} bytes moved per token of {tokens}; KV pages: at most {pages}"
            f"{self._copied()}"
        )

    def _copied(self) -> str:
        if not self._copies:
            return ""
        pages, mib = sum(copy.num_pages for copy in self._copies), sum(copy.num_bytes for copy in self._copies) / 2**20
        return f", {pages} moved to other workers ({mib:.1f} MiB)"


class _Lane:
    """Waits for the arrays of one lane, in a thread of its own."""

    def __init__(self, name: str, slices: list[Slice]) -> None:
        self._name, self._slices = name, slices
        self._dispatched: queue.Queue[tuple[str, Any, Any, float]] = queue.Queue()
        threading.Thread(target=self._watch, name=f"trace of {name}", daemon=True).start()

    def put(self, name: str, inputs: Any, outputs: Any) -> None:
        self._dispatched.put((name, inputs, outputs, time.monotonic()))

    def join(self) -> None:
        self._dispatched.join()

    def _watch(self) -> None:
        last_s = 0.0
        while True:
            name, inputs, outputs, dispatched_s = self._dispatched.get()
            begin_s = max(dispatched_s, last_s)
            if not are_ready(inputs):
                jax.block_until_ready(inputs)
                begin_s = time.monotonic()
            jax.block_until_ready(outputs)
            last_s = time.monotonic()
            self._slices.append(Slice(self._name, name, begin_s, last_s))
            del inputs, outputs
            self._dispatched.task_done()


def _slices_of(address: str, calls: Sequence[WorkerCall]) -> Iterable[Slice]:
    """Of the worker and of the links to it and from it, which may overlap.

    While the worker is busy, nobody knows when a call arrived.
    """
    ordered = sorted(calls, key=lambda call: call.began_ns)
    earliest_s = max(call.begin_s - call.began_ns / 1e9 for call in ordered)
    latest_s = min(call.done_s - call.ended_ns / 1e9 for call in ordered)
    ahead_s = (earliest_s + latest_s) / 2  # of our clock before the worker's
    ended_s = 0.0
    for call in ordered:
        began_s = max(call.began_ns / 1e9 + ahead_s, ended_s)
        was_idle = began_s > max(ended_s, call.sent_s)
        arrived_s = began_s if was_idle else call.sent_s
        ended_s = max(call.ended_ns / 1e9 + ahead_s, began_s)
        for lane, begin_s, end_s, num_bytes in (
            (f"to {address}", call.begin_s, arrived_s, call.bytes_up),
            (f"worker {address}", began_s, ended_s, 0),
            (f"from {address}", ended_s, call.done_s, call.bytes_down),
        ):
            yield Slice(lane, call.name, begin_s, end_s, num_bytes)


def _slices_of_copy(copy: PageCopy) -> Iterable[Slice]:
    """Of both links. What was asked for before, the source answers before."""
    yield Slice(f"from {copy.source}", _PAGES, copy.asked_s, copy.there_s, copy.num_bytes)
    yield Slice(f"to {copy.target}", _PAGES, copy.there_s, copy.sent_s, copy.num_bytes)


def _in_turn(slices: Iterable[Slice]) -> Iterable[Slice]:
    """A link carries one after the other: what begins to be sent first comes first, and so it ends first."""
    until_s: defaultdict[str, float] = defaultdict(float)
    for each in sorted(slices, key=lambda each: each.end_s if each.lane.startswith("from ") else each.begin_s):
        begin_s = max(each.begin_s, until_s[each.lane])
        until_s[each.lane] = end_s = max(begin_s, each.end_s)
        yield each._replace(begin_s=begin_s, end_s=end_s)


def _covered_s(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds in at least one of them."""
    covered_s, until_s = 0.0, float("-inf")
    for begin_s, end_s in sorted(spans):
        covered_s += max(end_s - max(begin_s, until_s), 0.0)
        until_s = max(until_s, end_s)
    return covered_s
