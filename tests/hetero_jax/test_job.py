"""Jobs: bad rows, exit codes, going on after a kill, and what is refused."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

import fake_job
from fake_job import FakeEngine, config
from hetero_jax import rows_file
from hetero_jax.errors import JobError, RequestError
from hetero_jax.job import run_job
from hetero_jax.output_file import OutputFile
from hetero_jax.rows_file import read_rows
from hetero_jax.sampling_params import SamplingParams


def _write(path: Path, rows) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _run(job, engine=None) -> tuple[int, str]:
    log = io.StringIO()
    code = run_job(job, lambda: engine or FakeEngine(), log=log)
    return code, log.getvalue()


BAD = {
    "no json\n": "not a JSON object",
    "[1]\n": "a JSON list; allowed: an object",
    '{"id": "x", "prompt": "a", "promt": "b"}\n': "unknown key 'promt'",
    '{"prompt": "a"}\n': "id None; allowed",
    '{"id": true, "prompt": "a"}\n': "id True; allowed",
    '{"id": "x"}\n': "no prompt",
    '{"id": "x", "prompt": "a", "prompt_token_ids": [1]}\n': "prompt and prompt_token_ids",
    '{"id": "x", "prompt": 3}\n': "prompt is a int; allowed: a string",
    '{"id": "x", "messages": []}\n': "messages must be a list of objects",
    '{"id": "x", "prompt_token_ids": [1.5]}\n': "prompt_token_ids must be a list of integers",
    '{"id": "x", "prompt": "a", "sampling_params": {"top_p": 7}}\n': "top_p=7",
    '{"id": "x", "prompt": "a", "sampling_params": [1]}\n': "sampling_params is a list",
    '{"id": "x", "prompt": "a", "sampling_params": false}\n': "sampling_params is a bool",
    '{"id": "x", "prompt": "\\ud800"}\n': "surrogates not allowed",
    '{"id": "x", "prompt_token_ids": [' + "9" * 5000 + "]}\n": "not a JSON object",
    '{"id": "line:1", "prompt": "a"}\n': "id 'line:1' is the name of line 1",
    '{"id": "good", "prompt": "again"}\n': "id 'good' is also on line 1",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_line_is_reported_with_its_number_and_the_rest_is_kept(tmp_path, line):
    source = _write(tmp_path / "in", [{"id": "good", "prompt": "a"}, "\n", line, {"id": 7, "prompt": "b"}])
    rows, bad = read_rows(source, SamplingParams(), {})
    assert [row.id for row in rows] == ["good", 7]
    assert [row.line for row in bad] == [3]
    assert BAD[line] in bad[0].error


def test_bytes_that_are_not_utf8_and_a_line_too_long_are_bad_rows_like_others(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_file, "_LARGEST_LINE_BYTES", 100)
    source = tmp_path / "in"
    lines = [b'{"id": "\xff"}', b'{"id": "' + b"x" * 1000 + b'"}', '{"id": "a", "prompt": "é"}'.encode(), b"y" * 101]
    source.write_bytes(b"\n".join(lines))
    rows, bad = read_rows(source, SamplingParams(), {})
    assert [row.id for row in rows] == ["a"]
    assert [(row.line, row.id) for row in bad] == [(1, "line:1"), (2, "line:2"), (4, "line:4")]
    assert "utf-8" in bad[0].error
    assert "longer than 100 bytes" in bad[1].error


def test_a_key_changes_with_prompt_parameters_and_context_and_with_nothing_else(tmp_path):
    def key(row, defaults=None, context=None):
        source = _write(tmp_path / "in", [row])
        return read_rows(source, defaults or SamplingParams(), context or {"model": "a"})[0][0].key

    base = {"id": "1", "prompt": "a"}
    assert key(base) == key({"prompt": "a", "id": "1", "sampling_params": {}})
    assert key({**base, "sampling_params": {"max_tokens": 9}}) == key(base, SamplingParams(max_tokens=9))
    assert key(base, SamplingParams(temperature=0)) == key(base, SamplingParams(temperature=0.0))
    lengths = [{"max_model_len": 8}, {"max_model_len": 9}]
    assert len({key(base, None, context) for context in lengths}) == 1
    assert len({key(base, SamplingParams(max_tokens=None), context) for context in lengths}) == 2
    others = [key({**base, "prompt": "b"}), key(base, SamplingParams(max_tokens=9)), key(base, None, {"model": "b"})]
    assert len({key(base), *others}) == 4


def test_rows_come_out_once_each_in_the_order_of_finishing(tmp_path):
    source = _write(tmp_path / "in", [{"id": n, "prompt": "a"} for n in range(50)])
    code, _ = _run(config(source, tmp_path / "out"))
    rows = _rows(tmp_path / "out")
    assert code == 0
    assert sorted(row["id"] for row in rows) == list(range(50))
    assert {"id", "text", "token_ids", "finish_reason", "usage", "key"} == set(rows[0])


def test_empty_input_is_a_clean_job_that_loads_no_model(tmp_path):
    def no_engine():
        raise AssertionError("loaded")

    assert run_job(config(_write(tmp_path / "in", []), tmp_path / "out"), no_engine, log=io.StringIO()) == 0


def test_bad_and_failing_rows_are_recorded_and_the_exit_code_says_so(tmp_path):
    rows = [{"id": "a", "prompt": "x"}, "oops\n", {"id": "b", "prompt": "too long"}, {"id": "c", "top": 1}]
    source = _write(tmp_path / "in", rows)
    code, log = _run(config(source, tmp_path / "out"))
    found = {row["id"]: row for row in _rows(tmp_path / "out")}
    assert code == 2
    assert set(found) == {"a", "b", "c", "line:2"}
    assert {row_id for row_id, row in found.items() if row["finish_reason"] == "error"} == {"b", "c", "line:2"}
    assert "in:2: not a JSON object" in log
    again, _ = _run(config(source, tmp_path / "out"))
    assert again == 2
    assert len(_rows(tmp_path / "out")) == 4


def test_failed_rows_are_tried_again_and_the_others_left_as_they_are(tmp_path):
    rows = [{"id": "a", "prompt": "too long"}, {"id": "b", "promt": "x"}, {"id": "c", "prompt": "x"}, "oops\n"]
    _run(config(_write(tmp_path / "in", rows), tmp_path / "out"))
    kept = {row["id"]: row for row in _rows(tmp_path / "out")}
    repaired = [{"id": "a", "prompt": "short"}, {"id": "b", "prompt": "x"}, *rows[2:]]
    engine = FakeEngine()
    code, _ = _run(config(_write(tmp_path / "in", repaired), tmp_path / "out"), engine)
    found = _rows(tmp_path / "out")
    assert code == 2
    assert sorted(engine.asked) == ["a", "b"]
    assert sorted(row["id"] for row in found) == ["a", "b", "c", "line:4"]
    assert [row["id"] for row in found if row["finish_reason"] == "error"] == ["line:4"]
    assert [row for row in found if row["id"] in ("c", "line:4")] == [
        kept[row_id] for row_id in kept if row_id in ("c", "line:4")
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_kill_while_rows_are_taken_out_loses_none(tmp_path, monkeypatch):
    source = _write(tmp_path / "in", [{"id": "a", "prompt": "too long"}, {"id": "b", "prompt": "x"}])
    _run(config(source, tmp_path / "out"))
    before = (tmp_path / "out").read_bytes()

    def killed(*paths):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            _run(config(source, tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == before
    assert _run(config(source, tmp_path / "out"))[0] == 2
    assert sorted((tmp_path / "out").read_bytes().splitlines()) == sorted(before.splitlines())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_rows_that_are_taken_out_leave_the_file_locked(tmp_path):
    source = _write(tmp_path / "in", [{"id": "a", "prompt": "too long"}])
    _run(config(source, tmp_path / "out"))
    with OutputFile(tmp_path / "out") as output:
        output.start(drop={"a"})
        assert output.done == {}
        with pytest.raises(JobError, match="another job is writing"):
            OutputFile(tmp_path / "out")


def test_on_error_fail_lists_all_bad_lines_and_runs_nothing(tmp_path):
    source = _write(tmp_path / "in", [{"id": "a", "prompt": "x"}, "oops\n", {"id": "a", "prompt": "x"}])
    with pytest.raises(JobError, match=r"2 bad rows(?s:.*)line 2: not a JSON(?s:.*)line 3: id 'a' is also on line 1"):
        _run(config(source, tmp_path / "out", on_error="fail"))
    assert not (tmp_path / "out").exists()


def test_on_error_fail_holds_for_rows_that_only_the_engine_refuses(tmp_path):
    source = _write(tmp_path / "in", [{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "too long"}])
    with pytest.raises(RequestError, match="too long"):
        _run(config(source, tmp_path / "out", on_error="fail"))
    assert _rows(tmp_path / "out") == []
    assert _run(config(source, tmp_path / "out"))[0] == 2


def test_a_rerun_does_only_what_is_missing(tmp_path):
    rows = [{"id": str(n), "prompt": "a"} for n in range(6)]
    _run(config(_write(tmp_path / "in", rows[:4]), tmp_path / "out"))
    before = (tmp_path / "out").read_bytes()
    engine = FakeEngine()
    code, log = _run(config(_write(tmp_path / "in", rows), tmp_path / "out"), engine)
    assert code == 0
    assert sorted(engine.asked) == ["4", "5"]
    assert "4 of 6 rows are done already" in log
    assert (tmp_path / "out").read_bytes().startswith(before)


@pytest.mark.parametrize("change", [{"defaults": SamplingParams(max_tokens=5)}, {"context": {"model": "other"}}])
def test_an_output_of_another_job_is_refused_and_left_alone(tmp_path, change):
    source = _write(tmp_path / "in", [{"id": "a", "prompt": "x"}])
    _run(config(source, tmp_path / "out"))
    before = (tmp_path / "out").read_bytes()
    with pytest.raises(JobError, match=r"id 'a' of another prompt, sampling parameters or model.*--overwrite"):
        _run(config(source, tmp_path / "out", **change))
    assert (tmp_path / "out").read_bytes() == before
    assert _run(config(source, tmp_path / "out", overwrite=True, **change))[0] == 0
    assert len(_rows(tmp_path / "out")) == 1


@pytest.mark.parametrize("text", ["my notes\n", "my notes", '{"id": "a", "prompt": "x"}', '{"mine": 1}', "3"])
def test_a_file_that_is_no_output_is_refused_and_left_alone(tmp_path, text):
    source = _write(tmp_path / "in", [{"id": "a", "prompt": "x"}])
    (tmp_path / "out").write_text(text)
    with pytest.raises(JobError, match="line 1 is not an output row"):
        _run(config(source, tmp_path / "out"))
    assert (tmp_path / "out").read_text() == text


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_input_is_not_taken_for_the_output(tmp_path, overwrite):
    source = _write(tmp_path / "in", [{"id": "a", "prompt": "x"}])
    before = source.read_bytes()
    with pytest.raises(JobError, match="both input and output"):
        _run(config(source, tmp_path / "in", overwrite=overwrite))
    assert source.read_bytes() == before


def test_a_device_is_no_output(tmp_path):
    with pytest.raises(JobError, match="/dev/null is a device or a pipe"):
        _run(config(_write(tmp_path / "in", [{"id": "a", "prompt": "x"}]), Path("/dev/null")))


def test_a_log_that_is_no_terminal_gets_whole_lines(tmp_path):
    _, log = _run(config(_write(tmp_path / "in", [{"id": n, "prompt": "a"} for n in range(3)]), tmp_path / "out"))
    assert log == "3 of 3 sequences, 1 tokens/s, 0/1 KV pages\n"


@pytest.mark.parametrize("cut", [1, 5, 40, -1])
def test_a_torn_last_line_is_cut_off_and_done_again(tmp_path, cut):
    source = _write(tmp_path / "in", [{"id": str(n), "prompt": "a"} for n in range(5)])
    _run(config(source, tmp_path / "out"))
    whole = (tmp_path / "out").read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    end = last + cut if cut > 0 else len(whole) + cut
    (tmp_path / "out").write_bytes(whole[:end])
    assert _run(config(source, tmp_path / "out"))[0] == 0
    assert (tmp_path / "out").read_bytes() == whole


def test_two_jobs_do_not_write_one_file(tmp_path):
    with OutputFile(tmp_path / "out"), pytest.raises(JobError, match="another job is writing"):
        OutputFile(tmp_path / "out")


def test_an_input_that_is_not_there_is_one_error(tmp_path):
    with pytest.raises(JobError, match="no-such-file: cannot be read"):
        _run(config(tmp_path / "no-such-file", tmp_path / "out"))


def test_killed_at_twenty_points_every_row_comes_out_once_with_the_same_bytes(tmp_path):
    source = _write(tmp_path / "in", [{"id": f"row-{n}", "prompt": "a"} for n in range(400)])
    _run(config(source, tmp_path / "undisturbed"))
    expected = sorted((tmp_path / "undisturbed").read_bytes().splitlines())
    target, chance = tmp_path / "out", random.Random(0)
    # The server imports the package once; each run is a fork of it.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["hetero_jax.job"])
    for _ in range(20):
        goal = len(target.read_bytes()) + chance.randrange(1, 2500) if target.exists() else 300
        job = processes.Process(target=fake_job.run_slowly, args=(source, target))
        job.start()
        while job.is_alive() and (not target.exists() or target.stat().st_size < goal):
            time.sleep(0.001)
        job.kill()
        job.join()
        assert job.exitcode == -signal.SIGKILL
    last = processes.Process(target=fake_job.run_slowly, args=(source, target))
    last.start()
    last.join()
    assert last.exitcode == 0
    assert sorted(target.read_bytes().splitlines()) == expected
