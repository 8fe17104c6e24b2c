"""Checks of the numbers in a config.

A header is data from a stranger: each size has a ceiling far above any published model, so that no product of
them is allocated before a tensor of that size was seen in the file.
"""

from __future__ import annotations

import math

from models.errors import ModelFormatError, UnsupportedModelError

MAX_LAYERS = 1024
MAX_POSITIONS = 1 << 26
MAX_HEADS = 4096
MAX_EXPERTS = 4096
CEILINGS = {
    "vocab_size": 1 << 22,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": MAX_LAYERS,
    "num_attention_heads": MAX_HEADS,
    "num_key_value_heads": MAX_HEADS,
    "head_dim": 4096,
    "max_position_embeddings": MAX_POSITIONS,
}


def check_int(name: str, value: object, ceiling: int) -> None:
    """ModelFormatError unless `value` is an integer in 1..ceiling."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= ceiling:
        raise ModelFormatError(f"{name} must be an integer in 1..{ceiling}, not {value!r}")


def check_positive(name: str, value: object) -> None:
    """ModelFormatError unless `value` is a finite number above 0."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not (math.isfinite(value) and value > 0):
        raise ModelFormatError(f"{name} must be a positive number, not {value!r}")


def check_rope_base(name: str, value: object) -> None:
    """ModelFormatError unless `value` is a number above 1: the frequencies must fall."""
    check_positive(name, value)
    if value <= 1:  # type: ignore[operator]
        raise ModelFormatError(f"{name} must be greater than 1, not {value!r}")


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """UnsupportedModelError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise UnsupportedModelError(f"{name} {value!r} is not supported; allowed: {allowed}")
