"""Values of a config.json with their mistakes named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.errors import ModelFormatError, UnsupportedModelError


def need(values: Mapping[str, Any], key: str) -> Any:
    """The value of a key; ModelFormatError where it is missing or null."""
    if values.get(key) is None:
        raise ModelFormatError(f"config.json: the key {key!r} is missing")
    return values[key]


def count(values: Mapping[str, Any], key: str, *, least: int = 1) -> int:
    """An integer of at least `least`; ModelFormatError where it is missing or something else."""
    value = need(values, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ModelFormatError(f"config.json: {key} must be a positive integer, not {value!r}")
    return value


def default(values: Mapping[str, Any], key: str, otherwise: Any) -> Any:
    """The value of a key, or `otherwise` where it is missing or null."""
    value = values.get(key)
    return otherwise if value is None else value


def refuse_options(values: Mapping[str, Any], neutral: Mapping[str, tuple[object, ...]]) -> None:
    """UnsupportedModelError naming a key with a value other than null and those that mean "not used"."""
    for key, allowed in neutral.items():
        value = values.get(key)
        if value is not None and value not in allowed:
            raise UnsupportedModelError(f"config.json: {key}={value!r} is not supported; allowed: {(None, *allowed)}")
