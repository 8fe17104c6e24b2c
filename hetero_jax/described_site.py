"""Attention sites as a worker gets them: scalars by name in the handshake, no model and no program."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hetero_jax.config import KV_CACHE_DTYPES
from hetero_jax.errors import ConfigError
from partition import AttentionSpec, PlannedSite, Value

Scalar = int | float | str | bool | None
Description = Mapping[str, Scalar]

_MOST = 1 << 16  # heads, dimensions and sites of any model


@dataclass(frozen=True, kw_only=True)
class DescribedSite:
    """What `AttentionTier` needs of a recognised site.

    pool: number of the pool that it appends to; sites that keep the same values share one.
    page_size, kv_cache_dtype: of the pool.
    sink_scores: [num_heads], of a spec that has sinks.
    """

    spec: AttentionSpec
    pool: int
    page_size: int
    kv_cache_dtype: str
    sink_scores: tuple[float, ...] = ()
    weights: tuple[Value, ...] = ()  # a worker has none

    @property
    def key(self) -> AttentionSpec:
        """As of `PlannedSite`."""
        return self.spec

    @property
    def cache_key(self) -> int:
        """As of `PlannedSite`."""
        return self.pool

    def kernel_weights(self, weights: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """As of `PlannedSite`."""
        return (jnp.asarray(self.sink_scores, jnp.float32),) if self.spec.has_sinks else ()


def describe(
    sites: Sequence[PlannedSite], weights: Mapping[Value, jax.Array], *, page_size: int, dtype: Any
) -> tuple[Description, ...]:
    """Descriptions of a plan's sites, in order; page size and element type of the pools are in each.

    Raises:
      ConfigError: a site that only its own traced operations compute; a worker runs nobody's programs.
    """
    pools = {key: number for number, key in enumerate(dict.fromkeys(site.cache_key for site in sites))}
    pool_kind = {"page_size": page_size, "kv_cache_dtype": jnp.dtype(dtype).name}
    return tuple({**_describe(site, weights), "pool": pools[site.cache_key], **pool_kind} for site in sites)


def _describe(site: PlannedSite, weights: Mapping[Value, jax.Array]) -> Description:
    if site.spec is None:
        raise ConfigError(
            f"the attention opened at {site.site.opening.where} cannot go to workers, which have kernels only: "
            f"{site.unrecognised}; allowed: without --workers"
        )
    spec = {name.name: getattr(site.spec, name.name) for name in fields(site.spec)}
    sinks = [np.asarray(array) for array in site.kernel_weights([weights[value] for value in site.weights])]
    return {
        **spec,
        "alibi_slopes": None if site.spec.alibi_slopes is None else _as_text(site.spec.alibi_slopes),
        "sink_scores": _as_text(sinks[0]) if sinks else "",
    }


def fingerprint(descriptions: Sequence[Description]) -> str:
    """Hex identity of what a worker serves."""
    return hashlib.sha256(json.dumps([dict(sorted(each.items())) for each in descriptions]).encode()).hexdigest()[:16]


def read_description(description: Description) -> DescribedSite:
    """The site that a peer describes.

    Raises:
      ConfigError: a value that is missing or out of range; the message has it.
    """
    heads = _natural(description, "num_heads")
    kv_heads = _natural(description, "num_kv_heads")
    if heads % kv_heads:
        raise ConfigError(f"num_heads={heads} of a site; allowed: a multiple of num_kv_heads={kv_heads}")
    has_sinks = bool(description.get("has_sinks"))
    slopes = description.get("alibi_slopes")
    return DescribedSite(
        spec=AttentionSpec(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=_natural(description, "head_dim"),
            v_head_dim=_natural(description, "v_head_dim"),
            scale=_number(description, "scale"),
            window=None if description.get("window") is None else _natural(description, "window", most=1 << 31),
            softcap=None if description.get("softcap") is None else _number(description, "softcap"),
            alibi_slopes=None if slopes is None else _per_head(description, "alibi_slopes", heads),
            has_sinks=has_sinks,
        ),
        pool=_natural(description, "pool", least=0),
        page_size=_natural(description, "page_size"),
        kv_cache_dtype=_dtype(description),
        sink_scores=_per_head(description, "sink_scores", heads) if has_sinks else (),
    )


def _as_text(values: Any) -> str:
    """Numbers of each head: kernels read them as float32, whose shortest decimals these are."""
    return " ".join(str(value) for value in np.asarray(values, np.float32))


def _natural(description: Description, name: str, *, least: int = 1, most: int = _MOST) -> int:
    value = description.get(name)
    if type(value) is not int or not least <= value <= most:
        raise ConfigError(f"{name}={value!r} of a site; allowed: {least} to {most}")
    return value


def _dtype(description: Description) -> str:
    value = description.get("kv_cache_dtype")
    if value not in KV_CACHE_DTYPES:
        raise ConfigError(f"kv_cache_dtype={value!r} of a site; allowed: {', '.join(KV_CACHE_DTYPES)}")
    return str(value)


def _number(description: Description, name: str) -> float:
    value = description.get(name)
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{name}={value!r} of a site; allowed: a finite number")
    return float(value)


def _per_head(description: Description, name: str, heads: int) -> tuple[float, ...]:
    text = description.get(name)
    try:
        values = tuple(float(part) for part in str(text).split())
    except ValueError:
        values = ()
    if len(values) != heads:
        raise ConfigError(f"{name}={text!r} of a site; allowed: {heads} numbers")
    return values
