"""Input rows of a job: JSON lines, checked one by one, with every bad line reported."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hetero_jax.errors import JobError, RequestError
from hetero_jax.outputs import Request
from hetero_jax.sampling_params import SamplingParams

_LARGEST_LINE_BYTES = 64 << 20
_RESERVED_ID = re.compile(r"line:[0-9]+")  # what rows without a usable id are reported under
_FIELDS = ("id", "prompt", "messages", "prompt_token_ids", "sampling_params")


@dataclass(frozen=True, kw_only=True)
class InputRow:
    """A row that can be asked for. id: as the file has it. key: hash of all that its output depends on."""

    id: str | int
    request: Request
    key: str


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """A row that cannot: its line number (from 1), the id to report it under, and why."""

    line: int
    id: str | int
    key: str
    error: str


def read_rows(path: Path, defaults: SamplingParams, context: Mapping[str, Any]) -> tuple[list[InputRow], list[BadRow]]:
    """Rows {"id", "prompt" | "messages" | "prompt_token_ids", "sampling_params"?} of a JSON lines file.

    Args:
      defaults: sampling parameters under those of each row.
      context: what else the outputs depend on (model, seed, dtypes); part of every key, but "max_model_len" only of
        rows without max_tokens.
    Raises:
      JobError: the file cannot be read.
    """
    rows: list[InputRow] = []
    bad: list[BadRow] = []
    lines_of: dict[str, int] = {}
    for number, line in _lines(path):
        row_id: str | int = f"line:{number}"
        try:
            values = _parse(line)
            row_id = _row_id(values, number)
            if str(row_id) in lines_of:
                raise RequestError(f"id {row_id!r} is also on line {lines_of[str(row_id)]}; allowed: unique ids")
            lines_of[str(row_id)] = number
            rows.append(_row(row_id, values, defaults, context))
        except RequestError as error:
            twin = str(row_id) in lines_of and lines_of[str(row_id)] != number
            reported = f"line:{number}" if twin else row_id
            bad.append(BadRow(line=number, id=reported, key=_hash(line.decode("utf-8", "replace")), error=str(error)))
    return rows, bad


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(_LARGEST_LINE_BYTES + 1), b""), start=1):
                rest = line
                while len(rest) > _LARGEST_LINE_BYTES and not rest.endswith(b"\n"):
                    rest = file.readline(_LARGEST_LINE_BYTES + 1)  # skipped: what is held is enough to refuse it
                if line.strip():
                    yield number, line
    except OSError as error:
        raise JobError(f"{path}: cannot be read: {error.strerror}") from error


def _parse(line: bytes) -> dict[str, Any]:
    if len(line) > _LARGEST_LINE_BYTES:
        raise RequestError(f"longer than {_LARGEST_LINE_BYTES} bytes")
    try:
        # From bytes, json would also take UTF-16 and half surrogates.
        values = json.loads(line.decode("utf-8-sig"))
        if b"\\u" in line:
            json.dumps(values, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise RequestError(f"not a JSON object: {error}") from error
    if not isinstance(values, dict):
        raise RequestError(f"a JSON {type(values).__name__}; allowed: an object")
    return values


def _row_id(values: Mapping[str, Any], number: int) -> str | int:
    row_id = values.get("id")
    if isinstance(row_id, bool) or not isinstance(row_id, (str, int)) or row_id == "":
        raise RequestError(f"id {row_id!r}; allowed: a non-empty string or an integer")
    if isinstance(row_id, str) and _RESERVED_ID.fullmatch(row_id) and row_id != f"line:{number}":
        raise RequestError(f"id {row_id!r} is the name of line {row_id[5:]}; allowed: another one")
    return row_id


def _row(
    row_id: str | int, values: Mapping[str, Any], defaults: SamplingParams, context: Mapping[str, Any]
) -> InputRow:
    unknown = sorted(set(values) - set(_FIELDS))
    if unknown:
        raise RequestError(f"unknown key {unknown[0]!r}; allowed: {', '.join(_FIELDS)}")
    given = {} if values.get("sampling_params") is None else values["sampling_params"]
    if not isinstance(given, dict):
        raise RequestError(f"sampling_params is a {type(given).__name__}; allowed: an object")
    params = SamplingParams.from_dict(given, defaults)
    request = Request(
        id=str(row_id),
        prompt=_prompt(values.get("prompt")),
        messages=_messages(values.get("messages")),
        prompt_token_ids=_token_ids(values.get("prompt_token_ids")),
        sampling_params=params,
    )
    content = {name: values[name] for name in _FIELDS[:-1] if name in values}
    # The model's length decides only where the row sets no limit.
    context = {name: value for name, value in context.items() if name != "max_model_len" or params.max_tokens is None}
    return InputRow(id=row_id, request=request, key=_hash([content, params.to_dict(), context]))


def _prompt(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise RequestError(f"prompt is a {type(value).__name__}; allowed: a string")
    return value


def _messages(value: Any) -> tuple[dict[str, Any], ...] | None:
    if value is None:
        return None
    ok = isinstance(value, list) and value and all(isinstance(item, dict) and "role" in item for item in value)
    if not ok:
        raise RequestError('messages must be a list of objects with "role" and "content", at least one')
    return tuple(value)


def _token_ids(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or any(isinstance(item, bool) or not isinstance(item, int) for item in value):
        raise RequestError("prompt_token_ids must be a list of integers")
    return tuple(value)


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
