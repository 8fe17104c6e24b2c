"""The output file of a job: appended as rows finish, durable in groups, and safe to go on with after a kill.

Each row carries the `key` of its input (a hash of the row, its sampling parameters and the model), so the file alone
says what is done: there is no second file that could disagree with it after a crash. Opening a file changes nothing in
it; `start` does, once the job has seen that the file is its own.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from hetero_jax.errors import JobError

_SYNC_ROWS = 32
_SYNC_S = 1.0
_ROW_START = b'{"id": '


class OutputFile:
    """Appends rows to `path`; use as a context manager. `done` maps the ids in the file to (key, is_error).

    Call `start` before the first `append`.

    Raises:
      JobError: another process writes the file, or it holds something else than rows.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Never truncates: another job may have made the file and written to it a moment ago.
            self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        except OSError as error:
            raise JobError(f"{path}: cannot be written: {error.strerror}") from error
        self._unsynced = 0
        self._synced_at_s = time.monotonic()
        self._end = 0  # of the last whole row
        self.done: dict[str, tuple[str, bool]] = {}
        try:
            if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                raise JobError(f"{path} is a device or a pipe; allowed: a file, which a job can go on with")
            self._lock(self._file)
            if not overwrite:
                self._read()
        except BaseException:
            self._file.close()
            raise

    def _lock(self, file: BinaryIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            in_place = os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        except OSError:
            in_place = False  # locked, or replaced by a job that drops rows just now
        if not in_place:
            raise JobError(f"{self.path}: another job is writing this file; wait for it or name another one")

    def _read(self) -> None:
        self._file.seek(0)
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n") and _is_torn(line):
                return
            try:
                row = json.loads(line)
                self.done[str(row["id"])] = (row["key"], "error" in row)
            except (ValueError, KeyError, TypeError) as error:
                raise JobError(
                    f"{self.path}: line {number} is not an output row of this program; "
                    "name another output or give --overwrite"
                ) from error
            self._end += len(line)

    def start(self, *, drop: Collection[str] = ()) -> None:
        """Make the file ready for `append`: cut off a last line that a kill tore, and take out the rows `drop`.

        Rows are taken out by writing the others, byte by byte, to a new file that takes the old one's place at once.
        """
        if drop:
            self._replace(drop)
        self._file.truncate(self._end)
        self._file.seek(self._end)

    def _replace(self, drop: Collection[str]) -> None:
        draft = self.path.with_name(f".{self.path.name}.rewrite")
        kept = draft.open("w+b")
        fcntl.flock(kept, fcntl.LOCK_EX)  # before it has the name that others open
        self._file.seek(0)
        left = self._end
        while left:
            line = self._file.readline()
            left -= len(line)
            if str(json.loads(line)["id"]) not in drop:
                kept.write(line)
        kept.flush()
        os.fsync(kept.fileno())
        os.replace(draft, self.path)
        self._file.close()
        self._file, self._end = kept, kept.tell()
        for row_id in drop:
            del self.done[row_id]

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row; it is on disk after the next sync."""
        self._file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        self._file.flush()
        self._unsynced += 1
        if self._unsynced >= _SYNC_ROWS or time.monotonic() - self._synced_at_s >= _SYNC_S:
            self.sync()

    def sync(self) -> None:
        """Make all rows durable."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._unsynced, self._synced_at_s = 0, time.monotonic()

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.sync()
        finally:
            self._file.close()


def _is_torn(line: bytes) -> bool:
    """The beginning of a row, or the zeros that some file systems leave after a power loss; else it is not ours."""
    try:
        return "key" in json.loads(line)  # all but the newline
    except (ValueError, TypeError):
        return line.startswith(_ROW_START) or _ROW_START.startswith(line) or not line.strip(b"\0")
