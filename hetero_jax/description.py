"""Descriptions of sites as they travel, scalars by name, and how their values are read: each bounded, or refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypedDict

from hetero_jax.config import KV_CACHE_DTYPES
from hetero_jax.errors import ConfigError
from hetero_jax.page_groups import SitePages

Scalar = int | float | str | bool | None
Description = Mapping[str, Scalar]

_MOST = 1 << 16  # heads, dimensions and sites of any model


def natural(description: Description, name: str, *, least: int = 1, most: int = _MOST) -> int:
    """An integer of [least, most]; ConfigError otherwise, as of all below."""
    value = description.get(name)
    if type(value) is not int or not least <= value <= most:
        raise ConfigError(f"{name}={value!r} of a site; allowed: {least} to {most}")
    return value


def choice(description: Description, name: str, allowed: tuple[str, ...]) -> str:
    """One of the allowed texts."""
    value = description.get(name)
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} of a site; allowed: {', '.join(allowed)}")
    return str(value)


class PoolKind(TypedDict):
    """As of `DescribedSite`."""

    pages: SitePages
    page_size: int
    kv_cache_dtype: str


def read_pool_kind(description: Description) -> PoolKind:
    """What every description has."""
    return PoolKind(
        pages=SitePages(natural(description, "group", least=0), natural(description, "pool", least=0)),
        page_size=natural(description, "page_size"),
        kv_cache_dtype=choice(description, "kv_cache_dtype", KV_CACHE_DTYPES),
    )


def number(description: Description, name: str) -> float:
    """A finite number."""
    value = description.get(name)
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{name}={value!r} of a site; allowed: a finite number")
    return float(value)


def numbers(description: Description, name: str, count: int) -> tuple[float, ...]:
    """So many numbers in a text."""
    text = description.get(name)
    try:
        values = tuple(float(part) for part in str(text).split())
    except ValueError:
        values = ()
    if len(values) != count:
        raise ConfigError(f"{name}={text!r} of a site; allowed: {count} numbers")
    return values
