"""Rotary embeddings as a config.json describes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.errors import ModelFormatError, UnsupportedModelError
from models.hf_values import default
from models.rope import ROPE_TYPES, RopeScaling

_SCALING_FIELDS = {
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}


def rope_from_hf(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from `rope_theta` + `rope_scaling` or from the newer `rope_parameters`."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ModelFormatError(f"config.json: rope_scaling must be an object, not {rope!r}")
    theta = default(rope, "rope_theta", default(values, "rope_theta", 10000.0))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return theta, None
    if rope_type not in _SCALING_FIELDS:
        allowed = ("default", *(t for t in ROPE_TYPES if t in _SCALING_FIELDS))
        raise UnsupportedModelError(
            f"config.json: rope_scaling type {rope_type!r} is not supported; allowed: {allowed}"
        )
    return theta, _scaling(values, rope, rope_type)


def _scaling(values: Mapping[str, Any], rope: Mapping[str, Any], rope_type: str) -> RopeScaling:
    known = {*_SCALING_FIELDS[rope_type], "rope_type", "type", "rope_theta"}
    if rope_type == "linear":  # written by some converters, without effect on the linear rule
        known.add("original_max_position_embeddings")
    unknown = [key for key, value in rope.items() if key not in known and value is not None]
    if unknown:
        raise UnsupportedModelError(
            f"config.json: rope_scaling key {unknown[0]!r} is not supported for type {rope_type!r}; "
            f"allowed: {_SCALING_FIELDS[rope_type]}"
        )
    fields = {key: rope[key] for key in _SCALING_FIELDS[rope_type] if rope.get(key) is not None}
    context = default(values, "max_position_embeddings", None)
    if rope_type == "yarn":
        fields.setdefault("original_max_position_embeddings", context)
        if "factor" not in fields and context is not None:
            fields["factor"] = _ratio(context, fields["original_max_position_embeddings"])
    for key in _SCALING_FIELDS[rope_type][: 4 if rope_type == "llama3" else 1]:
        if key not in fields:
            raise ModelFormatError(f"config.json: rope_scaling type {rope_type!r} needs the key {key!r}")
    try:
        return RopeScaling(rope_type=rope_type, **fields)
    except TypeError as error:
        raise ModelFormatError(f"config.json: rope_scaling {dict(rope)!r}: {error}") from error


def _ratio(context: Any, original: Any) -> float:
    for value in (context, original):
        if not isinstance(value, int | float) or value <= 0:
            raise ModelFormatError(f"config.json: max_position_embeddings must be a positive integer, not {value!r}")
    return context / original
