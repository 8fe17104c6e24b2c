"""Request lengths of a real service, so that benches run on what users send and not on one round number.

Two samples of the Azure LLM inference traces of 2023 come with the project (origin and licence: data/README.md beside
this file); a full trace in the same columns loads by its path.

    for request in load_workload("conv"):
        request.prompt_tokens, request.output_tokens
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path

SAMPLES = ("code", "conv")
COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_SECONDS_DIGITS = len("2023-11-16 18:15:46.680590")  # datetime keeps microseconds; the traces have one digit more


@dataclass(frozen=True, kw_only=True)
class RequestLengths:
    """One request of a trace: when it came, counted from the first one, and how many tokens went in and out."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


def load_workload(source: str | Path, *, limit: int | None = None) -> tuple[RequestLengths, ...]:
    """The requests of the sample "code" or "conv", or of a CSV file with the columns of `COLUMNS`, in order of arrival.

    At most the first `limit` rows are read. Raises ValueError that names the file and the line for other columns, for
    a field that is no time or no positive count, and for a time before that of the row above.
    """
    path = files("experiments") / "data" / f"azure_llm_2023_{source}.csv" if source in SAMPLES else Path(source)
    with path.open(encoding="utf-8") as lines:
        return tuple(itertools.islice(_parse(lines, str(path)), limit))


def _parse(lines: Iterable[str], name: str) -> Iterator[RequestLengths]:
    rows = csv.reader(lines)
    header = tuple(next(rows, ()))
    if header != COLUMNS:
        raise ValueError(f"{name}, line 1: columns {header}, expected {COLUMNS}")
    first = previous = None
    for number, row in enumerate(rows, start=2):
        try:
            time, prompt_tokens, output_tokens = _fields(row)
        except ValueError as error:
            raise ValueError(f"{name}, line {number}: {error}") from error
        if previous is not None and time < previous:
            raise ValueError(f"{name}, line {number}: {time} is before the row above ({previous})")
        first, previous = first or time, time
        arrival_s = (time - first).total_seconds()
        yield RequestLengths(arrival_s=arrival_s, prompt_tokens=prompt_tokens, output_tokens=output_tokens)


def _fields(row: list[str]) -> tuple[datetime, int, int]:
    if len(row) != len(COLUMNS):
        raise ValueError(f"{len(row)} fields, expected {len(COLUMNS)}")
    counts = [int(text) for text in row[1:]]
    if min(counts) < 1:
        raise ValueError(f"token counts {counts}, expected at least 1 each")
    return datetime.fromisoformat(row[0][:_SECONDS_DIGITS]), counts[0], counts[1]
