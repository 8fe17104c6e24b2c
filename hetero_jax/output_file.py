"""The output file of a job: appended as rows finish, durable in groups, and safe to go on with after a kill.

Each row carries the `key` of its input (a hash of the row, its sampling parameters and the model), so the file alone
says what is done: there is no second file that could disagree with it after a crash.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from hetero_jax.errors import JobError

_SYNC_ROWS = 32
_SYNC_S = 1.0


class OutputFile:
    """Appends rows to `path`; use as a context manager. `done` maps the ids in the file to (key, is_error).

    Raises:
      JobError: another process writes the file, or it holds something else than rows.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("r+b" if path.exists() else "w+b")
        except OSError as error:
            raise JobError(f"{path}: cannot be written: {error.strerror}") from error
        self._lock()
        if overwrite:
            self._file.truncate(0)
        self._repair()
        self.done = self._read()
        self._file.seek(0, os.SEEK_END)
        self._unsynced = 0
        self._synced_at_s = time.monotonic()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise JobError(f"{self.path}: another job is writing this file; wait for it or name another one") from error

    def _repair(self) -> None:
        """Cut off a last line that a kill tore: its row is done again."""
        self._file.seek(0, os.SEEK_END)
        size = self._file.tell()
        keep = size
        while keep and self._byte(keep - 1) != b"\n":
            block = max(0, keep - 65536)
            self._file.seek(block)
            keep = block + self._file.read(keep - block).rfind(b"\n") + 1
        if keep != size:
            self._file.truncate(keep)

    def _byte(self, offset: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(1)

    def _read(self) -> dict[str, tuple[str, bool]]:
        self._file.seek(0)
        done: dict[str, tuple[str, bool]] = {}
        for number, line in enumerate(self._file, start=1):
            try:
                row = json.loads(line)
                done[str(row["id"])] = (row["key"], "error" in row)
            except (ValueError, KeyError, TypeError) as error:
                raise JobError(
                    f"{self.path}: line {number} is not an output row of this program; "
                    "name another output or give --overwrite"
                ) from error
        return done

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
        self.sync()
        self._file.close()
