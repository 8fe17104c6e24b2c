"""Small files next to the weights, read with a ceiling on their size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from models.errors import ModelFormatError, ModelNotFoundError

MAX_TEXT_BYTES = 256 << 20  # the largest published tokenizer.json has about 35 MB


def read_text(path: Path) -> str:
    """The whole of a UTF-8 file; ModelFormatError where it is too large or no text."""
    try:
        size = path.stat().st_size
        if size > MAX_TEXT_BYTES:
            raise ModelFormatError(f"{path}: {size} bytes; allowed: {MAX_TEXT_BYTES}")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ModelNotFoundError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise ModelFormatError(f"{path}: not UTF-8 ({error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ModelFormatError where it is none."""
    try:
        values = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ModelFormatError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ModelFormatError(f"{path}: must hold a JSON object, not {type(values).__name__}")
    return values
