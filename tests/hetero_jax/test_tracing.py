"""Traces: what the file says, and that it fits together."""

from __future__ import annotations

import itertools
import json

import pytest

import hetero_jax as hj
from fault_job import engine_of, run, undisturbed, wait_for_drain
from hetero_jax.tracing import PageCopy, Slice, Trace, WorkerCall
from small_model import SmallModel
from worker_process import worker_process
from worker_thread import ThreadWorker


def _run(config: hj.EngineConfig, path) -> tuple[hj.Engine, Trace, list[dict]]:
    small = SmallModel(layers=3)
    engine = hj.Engine(hj.partition(small, small.params(), max_rows=64), config)
    engine.trace = trace = Trace()
    list(engine.generate([[1, 2, 3], [4, 5]], hj.SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)))
    trace.write(path)
    return engine, trace, json.loads(path.read_text())["traceEvents"]


def _by_lane(events: list[dict]) -> dict[str, list[dict]]:
    names = {each["tid"]: each["args"]["name"] for each in events if each["ph"] == "M"}
    return {name: [e for e in events if e["ph"] == "X" and e["tid"] == tid] for tid, name in names.items()}


def _check_no_overlap(lanes: dict[str, list[dict]]) -> None:
    for slices in lanes.values():
        assert all(each["dur"] >= 0 for each in slices)
        for before, after in itertools.pairwise(slices):
            assert before["ts"] + before["dur"] <= after["ts"] + 0.01  # us: rounding


def test_a_trace_in_one_process_has_a_slice_for_each_stage_and_site(tmp_path):
    engine, _, events = _run(hj.EngineConfig(kv_cache_bytes=1 << 20), tmp_path / "run.json")
    lanes = _by_lane(events)
    assert lanes.keys() == {"tier 1", "tier 2"}
    _check_no_overlap(lanes)
    for index in range(3):
        assert len([e for e in lanes["tier 1"] if e["name"] == f"stage {index}"]) == engine.stats.steps
        assert len([e for e in lanes["tier 2"] if e["name"] == f"site {index}"]) == engine.stats.steps
    assert max(e["args"]["tokens"] for e in events if e["name"] == "tokens") == 12


def test_a_trace_of_a_worker_has_its_links(tmp_path):
    with worker_process("--kv_cache_bytes=1M") as (address, _):
        engine, trace, events = _run(hj.EngineConfig(workers=(address,), wire_dtype="float32"), tmp_path / "run.json")
    lanes = _by_lane(events)
    assert lanes.keys() == {"tier 1", f"worker {address}", f"to {address}", f"from {address}"}
    _check_no_overlap(lanes)
    calls = 3 * engine.stats.steps
    ways = [lanes[f"{way} {address}"] for way in ("to", "worker", "from")]
    assert [len(way) for way in ways] == [calls] * 3
    for up, work, down in zip(*ways, strict=True):
        assert up["name"] == work["name"] == down["name"]
        assert up["ts"] <= work["ts"] + 0.01 and work["ts"] + work["dur"] <= down["ts"] + down["dur"] + 0.01
    # 8 rows at least: 6 heads of q, 2 of k and of v down, 6 up, of 4 float32
    assert all(e["args"]["bytes"] >= 8 * 10 * 4 * 4 for e in ways[0])
    moved = sum(e["args"]["bytes"] for e in (*ways[0], *ways[2]))
    assert f"{moved / 12:.0f} bytes moved per token of 12" in trace.summary()
    assert f"worker {address} busy" in trace.summary()
    positions = [e["args"][e["name"]] for e in events if e["name"] == f"KV positions of {address}"]
    assert positions[0] == 3 + 1 + 2 and positions[-1] == 0  # the first prompt and a token, and the second


def test_pages_that_move_are_slices_of_both_links(tmp_path):
    pages: list[int] = []
    with ThreadWorker() as leaving, ThreadWorker() as other:
        engine = engine_of(leaving.address, other.address)
        engine.trace = trace = Trace()
        serve = other.handler.store_pages
        other.handler.store_pages = lambda message: pages.append(len(message.pages)) or serve(message)

        def leave(count: int) -> None:
            if count == 6:
                leaving.server.drain("a test")
                wait_for_drain(engine)

        assert run(engine, leave) == undisturbed()
    trace.write(tmp_path / "run.json")
    lanes = _by_lane(json.loads((tmp_path / "run.json").read_text())["traceEvents"])
    _check_no_overlap(lanes)
    page_bytes = engine._attention.pool_bytes // engine._attention.num_pages
    for lane in (f"from {leaving.address}", f"to {other.address}"):
        assert [e["args"]["bytes"] for e in lanes[lane] if e["name"] == "pages"] == [n * page_bytes for n in pages]
    assert not any(e["name"] == "pages" for e in (*lanes[f"to {leaving.address}"], *lanes[f"from {other.address}"]))
    mib = sum(pages) * page_bytes / 2**20
    assert trace.summary().endswith(f", {sum(pages)} moved to other workers ({mib:.1f} MiB)")


def test_the_summary_follows_from_the_slices():
    trace = Trace()
    assert trace.summary() == "trace: nothing ran"
    trace._slices += [Slice("tier 1", "a", 10, 11), Slice("tier 1", "b", 11.5, 13), Slice("tier 2", "c", 10.5, 12)]
    trace._slices += [Slice("tier 2", "d", 14, 15)]
    trace.count("tokens", 5)
    trace.count("pages", 7)
    trace.count("pages", 3)
    assert (trace.busy_s("tier 1", 10.5, 12), trace.busy_s("tier 2", 0, 11)) == (1.0, 0.5)
    # 2.5 s and 2.5 s of 5 s; together from 10.5 to 11 and from 11.5 to 12
    expected = "trace: 5.00 s, tier 1 busy 50%, tier 2 busy 50%; both tiers at once 20%; 0 bytes moved per token of 5"
    assert trace.summary() == f"{expected}; KV pages: at most 7"


@pytest.mark.parametrize("other_clock_s", [-1000.0, 0.0, 5000.0])
def test_a_workers_clock_is_set_by_what_can_be(other_clock_s):
    """Calls of 2 ms that travel 1 ms at least, each way; some longer, and one finds the worker busy."""
    trace = Trace()
    for begin_s, up_s, down_s in [(1.000, 0.001, 0.004), (1.020, 0.003, 0.001), (1.021, 0.004, 0.001)]:
        began_ns = round((begin_s + up_s + 2000 - other_clock_s) * 1e9)
        done_s = begin_s + up_s + 0.002 + down_s
        ours = {"begin_s": begin_s, "sent_s": begin_s + 1e-4, "done_s": done_s, "bytes_up": 1, "bytes_down": 1}
        trace.called("there", WorkerCall(name="site", began_ns=began_ns, ended_ns=began_ns + 2_000_000, **ours))
    lanes = {lane: list(group) for lane, group in itertools.groupby(trace.slices(), key=lambda each: each.lane)}
    assert [each.begin_s for each in lanes["worker there"]] == pytest.approx([1.001, 1.023, 1.025], abs=1e-6)
    assert [each.end_s for each in lanes["worker there"]] == pytest.approx([1.003, 1.025, 1.027], abs=1e-6)
    assert [each.end_s for each in lanes["to there"]] == pytest.approx([1.001, 1.023, 1.023], abs=1e-6)
    assert [each.end_s for each in lanes["from there"]] == pytest.approx([1.007, 1.026, 1.028], abs=1e-6)


def test_pages_take_their_turn_on_a_link():
    """What was asked for while a call was under way comes behind its answer; what is sent behind a call, behind it."""
    trace = Trace()
    for address in ("a", "b"):
        call = {"begin_s": 1.0, "sent_s": 1.1, "done_s": 1.5, "bytes_up": 1, "bytes_down": 1}
        trace.called(address, WorkerCall(name="site", began_ns=1_200_000_000, ended_ns=1_400_000_000, **call))
    trace.copied(PageCopy("a", "b", num_pages=3, num_bytes=3 << 20, asked_s=1.1, there_s=1.8, sent_s=1.9))
    slices = [each[:4] for each in trace.slices() if each.name == "pages"]
    assert slices == [("from a", "pages", 1.5, 1.8), ("to b", "pages", 1.8, 1.9)]
    assert trace.summary().endswith(
        "4 bytes moved per token of 0; KV pages: at most 0, 3 moved to other workers (3.0 MiB)"
    )
