"""Workers that an engine starts itself, and workers that a file names and renames while a job runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fault_job import engine_of, run, undisturbed
from hetero_jax.errors import ConfigError
from hetero_jax.local_worker import own_cores
from hetero_jax.workers_file import WorkersFile
from worker_thread import ThreadWorker

WAIT_S = 60  # for what must happen; nothing here is timed
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")


def _parents() -> dict[int, int]:
    """The parent of each process that runs."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has ended meanwhile
            continue
        if state != "Z":
            found[int(path.parent.name)] = int(parent)
    return found


def _children(pid: int) -> list[int]:
    return [child for child, parent in _parents().items() if parent == pid]


def _becomes(condition) -> bool:
    """Whether it holds before long."""
    end_s = time.monotonic() + WAIT_S
    while not condition() and time.monotonic() < end_s:
        time.sleep(0.05)
    return bool(condition())


@needs_proc
@pytest.mark.parametrize("partition", ["sequence", "head"])
def test_local_workers_are_pinned_apart_started_again_when_they_die_and_end_with_the_engine(partition):
    before = set(_children(os.getpid()))
    engine = engine_of(local_workers=2, kv_partition=partition, kv_cache_bytes=2 << 20)
    workers = sorted(set(_children(os.getpid())) - before)
    assert len(workers) == 2
    if len(os.sched_getaffinity(0)) > 1:
        first, second = (os.sched_getaffinity(worker) for worker in workers)
        assert first and second and not first & second
    assert run(engine, lambda count: count == 3 and os.kill(workers[0], signal.SIGKILL)) == undisturbed()
    assert engine.stats.workers_lost == 1
    assert run(engine) == undisturbed()
    assert set(_children(os.getpid())) - before - {workers[0]}
    del engine
    assert _becomes(lambda: set(_children(os.getpid())) <= before)


@needs_proc
def test_local_workers_end_with_a_killed_engine(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"id": 0, "prompt_token_ids": [1, 2]}\n')
    files = [f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}"]
    command = [sys.executable, "-m", "hetero_jax", "generate", "--model=random:tiny", "--local_workers=1", *files]
    engine = subprocess.Popen([*command, "--kv_cache_bytes=1M", "--max_model_len=64"], stderr=subprocess.DEVNULL)
    workers: list[int] = []
    assert _becomes(lambda: workers.extend(_children(engine.pid)) or workers)
    engine.kill()
    engine.wait()
    assert _becomes(lambda: not _parents().keys() & set(workers))


def test_cores_are_shared_out_evenly(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 5, 6, 7, 9}, raising=False)
    assert own_cores(2) == [[4, 5], [6, 7]]
    assert own_cores(5) == [[4], [5], [6], [7], [9]]
    assert own_cores(6) == [[4], [5], [6], [7], [9], [4]]


def test_workers_join_and_leave_as_their_file_says(tmp_path):
    path = tmp_path / "workers"
    with ThreadWorker() as first, ThreadWorker() as second:
        path.write_text(f"# of this job\n{first.address}  # the first\n\n")
        engine = engine_of(workers_file=str(path), max_num_seqs=3)

        def rewrite(count: int) -> None:
            if count in (1, 5):
                path.write_text(f"{first.address}\n{second.address}\n" if count == 1 else f"{second.address}\n")
                time.sleep(0.6)  # it is looked at now and then

        pages = engine.stats.pages_total
        assert run(engine, rewrite) == undisturbed()
        assert second.handler.served > 0
        assert (engine.stats.pages_total, engine.stats.workers_lost) == (pages, 0)  # only the second is left
        assert (first.handler.sessions, second.handler.sessions) == (1, 1)


def test_a_file_that_names_nobody_yet_is_waited_for(tmp_path):
    path = tmp_path / "workers"
    path.write_text("127.0.0.1:1\n")
    engine = engine_of(workers_file=str(path))
    with ThreadWorker() as worker:
        path.write_text(f"127.0.0.1:1\n{worker.address}\n")
        assert run(engine) == undisturbed()


def test_a_file_that_cannot_be_used_is_refused_at_first_and_ignored_later(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("hetero_jax.workers_file._LOOK_EVERY_S", 0)
    path = tmp_path / "workers"
    path.write_text("127.0.0.1:7000\n127.0.0.1:7000\n")
    with pytest.raises(ConfigError, match="has an address twice"):
        WorkersFile(str(path))
    path.write_text("127.0.0.1:7000\n")
    file = WorkersFile(str(path))
    path.write_text("nobody\n")
    assert not file.changed() and not file.changed()
    path.unlink()
    assert not file.changed()
    assert file.addresses == ("127.0.0.1:7000",)
    assert [record.message.partition(": ")[2][:15] for record in caplog.records] == [
        "address 'nobody",
        "[Errno 2] No su",
    ]
    path.write_text("127.0.0.1:7001\n")
    assert file.changed() and file.addresses == ("127.0.0.1:7001",)
    with pytest.raises(ConfigError, match="local_workers=-1"):
        engine_of(local_workers=-1)
