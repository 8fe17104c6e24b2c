"""The offline job: rows of a file to rows of a file, once each, whatever happens in between.

Rows are checked before the weights are loaded. Outputs are appended in the order in which they finish. Run the same
command again after a kill: finished rows (same id and key) are skipped, a torn last line is cut off, the rest is done;
a row's bytes do not depend on where the job was interrupted, as its tokens do not depend on its batch. Rows that failed
are tried again: their error rows are taken out first, and a row that was repaired in the input simply runs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from tqdm import tqdm

from hetero_jax.errors import JobError
from hetero_jax.output_file import OutputFile
from hetero_jax.outputs import Completion, Request
from hetero_jax.rows_file import BadRow, InputRow, read_rows
from hetero_jax.sampling_params import SamplingParams

EXIT_CLEAN, EXIT_FAILED, EXIT_SOME_ROWS_FAILED = 0, 1, 2
_LOG_EVERY_S = 10.0


class Generator(Protocol):
    """What a job needs of an engine."""

    @property
    def stats(self) -> Any:
        """Counters: sequences_done, tokens_per_s, pages_used, pages_total."""

    def generate(
        self,
        prompts: Sequence[Request],
        sampling_params: SamplingParams | None = None,
        *,
        on_error: Literal["fail", "record"] = "fail",
    ) -> Iterator[Completion]:
        """Completions as they finish."""
        ...


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """A job's files and rules.

    on_error: "record" writes a bad row as an output row with `error`; "fail" ends the job before any row runs:
      before the weights are loaded or, where only the engine can tell (a prompt too long), right after.
    context: what outputs depend on besides rows and parameters: model fingerprint, seed, dtypes.
    """

    input: Path
    output: Path
    defaults: SamplingParams
    context: Mapping[str, Any]
    on_error: Literal["fail", "record"] = "record"
    overwrite: bool = False


def run_job(config: JobConfig, make_engine: Callable[[], Generator], *, log: Any = None) -> int:
    """Run a job; returns the exit code: 0 clean, 2 some rows failed.

    Args:
      make_engine: called once, and only if there is a row to do.
      log: text stream of messages and progress; None: standard error.
    Raises:
      JobError: bad rows with on_error="fail", or an output file that cannot be gone on with.
      RequestError: a row that the engine refuses, with on_error="fail".
    """
    log = log or sys.stderr
    rows, bad = read_rows(config.input, config.defaults, config.context)
    if bad and config.on_error == "fail":
        raise JobError(_all_bad(config.input, bad))
    _check_files(config)
    with OutputFile(config.output, overwrite=config.overwrite) as output:
        todo = [row for row in rows if not _is_done(row, output)]
        todo_bad = [row for row in bad if not _is_done(row, output)]
        output.start(drop={str(row.id) for row in (*todo, *todo_bad) if str(row.id) in output.done})
        for row in bad:
            print(f"{config.input}:{row.line}: {row.error}", file=log)
        for row in todo_bad:
            output.append(_error_row(row))
        if len(todo) < len(rows):
            print(f"{len(rows) - len(todo)} of {len(rows)} rows are done already", file=log)
        failed = len(bad)
        if todo:
            failed += _generate(todo, make_engine(), output, on_error=config.on_error, total=len(rows), log=log)
    return EXIT_SOME_ROWS_FAILED if failed else EXIT_CLEAN


def _check_files(config: JobConfig) -> None:
    if config.output.exists() and config.output.samefile(config.input):
        raise JobError(f"{config.output} is both input and output; name another output")


def _all_bad(path: Path, bad: Sequence[BadRow]) -> str:
    lines = "\n".join(f"  line {row.line}: {row.error}" for row in bad)
    return f"{path}: {len(bad)} bad rows, nothing was run (--on_error=record runs the others):\n{lines}"


def _is_done(row: InputRow | BadRow, output: OutputFile) -> bool:
    if str(row.id) not in output.done:
        return False
    key, failed = output.done[str(row.id)]
    if failed:
        return isinstance(row, BadRow) and key == row.key  # the same bad row would fail alike
    if key != row.key:
        raise JobError(
            f"{output.path} has a row with id {row.id!r} of another prompt, sampling parameters or model; "
            "name another output or give --overwrite"
        )
    return True


def _error_row(row: BadRow) -> dict[str, Any]:
    empty = {"text": "", "token_ids": [], "finish_reason": "error"}
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    return {"id": row.id, **empty, "usage": usage, "error": row.error, "key": row.key}


def _generate(
    todo: Sequence[InputRow],
    engine: Generator,
    output: OutputFile,
    *,
    on_error: Literal["fail", "record"],
    total: int,
    log: Any,
) -> int:
    """Run the rows and write them; returns how many failed."""
    by_id = {row.request.id: row for row in todo}
    failed = 0
    with _Progress(total, total - len(todo), log) as progress:
        for completion in engine.generate([row.request for row in todo], on_error=on_error):
            row = by_id[completion.id]
            output.append({**completion.to_row(), "id": row.id, "key": row.key})
            failed += completion.error is not None
            progress.update(engine.stats)
    return failed


class _Progress:
    """A bar on a terminal; where nobody watches (a log file), a line every ten seconds and at the end."""

    def __init__(self, total: int, done: int, log: Any) -> None:
        self._log, self._is_terminal = log, getattr(log, "isatty", lambda: False)()
        self._bar = tqdm(
            total=total, initial=done, unit="seq", desc="sequences", file=log, disable=not self._is_terminal
        )
        self._total, self._done = total, done
        self._line, self._written_at_s = "", time.monotonic()

    def update(self, stats: Any) -> None:
        """One more sequence is done."""
        self._done += 1
        speed = f"{stats.tokens_per_s:.0f} tokens/s, {stats.pages_used}/{stats.pages_total} KV pages"
        self._bar.set_postfix_str(speed, refresh=False)
        self._bar.update()
        self._line = f"{self._done} of {self._total} sequences, {speed}"
        if time.monotonic() - self._written_at_s >= _LOG_EVERY_S:
            self._write_line()

    def _write_line(self) -> None:
        if self._line and not self._is_terminal:
            print(self._line, file=self._log, flush=True)
        self._line, self._written_at_s = "", time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._write_line()
        self._bar.close()
