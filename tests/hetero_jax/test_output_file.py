"""The output file on its own: torn rows at every byte, the lock between processes, overwriting."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager

import pytest

from hetero_jax.errors import JobError
from hetero_jax.output_file import OutputFile


def _row(row_id, text="é€😀") -> dict:
    return {"id": row_id, "text": text, "key": f"key of {row_id}"}


def _append(path, *rows, **options) -> None:
    with OutputFile(path, **options) as output:
        output.start()
        for row in rows:
            output.append(row)


def test_a_row_torn_at_any_byte_is_written_again_whole(tmp_path):
    path = tmp_path / "out"
    _append(path, _row("a"), _row("b"))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    # Every cut of the last row: inside the key, a string, a character of several bytes, before the newline.
    for size in range(first, len(whole)):
        path.write_bytes(whole[:size])
        with OutputFile(path) as output:
            assert output.done == {"a": ("key of a", False)}, size
            output.start()
            output.append(_row("b"))
        assert path.read_bytes() == whole, size


def test_opening_alone_changes_nothing_even_where_a_row_is_torn(tmp_path):
    path = tmp_path / "out"
    _append(path, _row("a"), _row("b"))
    torn = path.read_bytes()[:-5]
    path.write_bytes(torn)
    with OutputFile(path):
        pass
    assert path.read_bytes() == torn


def test_text_beyond_ascii_is_kept_readable_and_line_breaks_are_not_lines(tmp_path):
    row = _row("a", "é\n\u2028\x85\r")  # the latter are lines to str.splitlines, not to JSON lines
    _append(tmp_path / "out", row)
    written = (tmp_path / "out").read_bytes()
    assert "é".encode() in written
    assert written.count(b"\n") == 1
    assert json.loads(written) == row


def test_overwrite_drops_what_was_there_but_only_once_the_job_starts(tmp_path):
    path = tmp_path / "out"
    path.write_text("my notes")
    with OutputFile(path, overwrite=True):
        assert path.read_text() == "my notes"
    _append(path, _row("a"), overwrite=True)
    assert [json.loads(line)["id"] for line in path.read_bytes().splitlines()] == ["a"]


# Holds the lock of argv[1] until its input ends; without the package, which would take seconds to import.
_LOCKER = """
import fcntl, sys
file = open(sys.argv[1], "ab")
try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("locked", flush=True)
except BlockingIOError:
    print("refused", flush=True)
sys.stdin.read()
"""


@contextmanager
def _other_process(path):
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", _LOCKER, path], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()


def test_the_lock_holds_between_processes(tmp_path):
    path = tmp_path / "out"
    with OutputFile(path), _other_process(path) as answer:
        assert answer == "refused"
    with _other_process(path) as answer:
        assert answer == "locked"
        with pytest.raises(JobError, match="another job is writing this file"):
            OutputFile(path)
    with OutputFile(path) as output:
        assert output.done == {}


@pytest.mark.parametrize("rows", [0, 1, 40])
def test_rows_are_there_for_the_next_job(tmp_path, rows):
    _append(tmp_path / "out", *(_row(str(n)) for n in range(rows)))
    with OutputFile(tmp_path / "out") as output:
        assert output.done == {str(n): (f"key of {n}", False) for n in range(rows)}
