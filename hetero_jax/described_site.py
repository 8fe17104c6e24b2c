"""Attention sites as a worker gets them in the handshake: scalars by name, and programs for what no kernel knows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hetero_jax.description import Description, natural, number, numbers, read_pool_kind
from hetero_jax.errors import ConfigError
from hetero_jax.exported_site import ExportedSite, ExportedSites, SiteExporter
from hetero_jax.page_groups import SitePages
from hetero_jax.wire import WIRE_DTYPES
from partition import AttentionSpec, PlannedSite, Value


@dataclass(frozen=True, kw_only=True)
class DescribedSite:
    """What `AttentionTier` needs of a recognised site.

    pages: where it keeps them; sites that keep the same values have the same place.
    page_size, kv_cache_dtype: of the pool.
    sink_scores: [num_heads], of a spec that has sinks.
    """

    spec: AttentionSpec
    pages: SitePages
    page_size: int
    kv_cache_dtype: str
    sink_scores: tuple[float, ...] = ()
    weights: tuple[Value, ...] = ()  # a worker has none

    @property
    def key(self) -> AttentionSpec:
        """As of `PlannedSite`."""
        return self.spec

    @property
    def page_shape(self) -> Any:
        """Equal for sites that can share an array of pages."""
        return self.spec.kept_shape

    def kernel_weights(self, weights: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """As of `PlannedSite`."""
        return (jnp.asarray(self.sink_scores, jnp.float32),) if self.spec.has_sinks else ()

    def unpack(self, sent: Sequence[np.ndarray], *, shares_pool: bool) -> tuple[list[np.ndarray], str]:
        """Rows of the site's inputs as they travel, and their wire dtype, of the arrays in a message.

        Args:
          shares_pool: an earlier site keeps k and v.
        Raises:
          ConfigError: other arrays than these, or no wire dtype.
        """
        if len(sent) != (1 if shares_pool else 3):
            allowed = "q alone, as an earlier site keeps k and v" if shares_pool else "q, k and v"
            raise ConfigError(f"{len(sent)} arrays of rows; allowed for this site: {allowed}")
        if (dtype := sent[0].dtype.name) not in WIRE_DTYPES:
            raise ConfigError(f"rows of {dtype}; allowed: {', '.join(WIRE_DTYPES)}")
        return list(sent), dtype

    def pack(self, outputs: Sequence[np.ndarray]) -> np.ndarray:
        """The array of a message, of the site's outputs as they travel."""
        (output,) = outputs
        return output


def describe(
    sites: Sequence[PlannedSite],
    pages: Sequence[SitePages],
    weights: Mapping[Value, jax.Array],
    *,
    page_size: int,
    dtype: Any,
    wire_dtype: str,
) -> tuple[tuple[Description, ...], tuple[np.ndarray, ...]]:
    """What tells workers of a plan's sites, and where each keeps its pages.

    Returns:
      descriptions of the sites, in order; page size and element type of the pools are in each.
      artifacts that those of sites without a kernel refer to by number: programs [bytes] uint8, weights.

    Raises:
      ConfigError: a site that has no kernel and does not travel as a program either.
    """
    kind = {"page_size": page_size, "kv_cache_dtype": jnp.dtype(dtype).name}
    exporter = SiteExporter(weights, page_size=page_size, dtype=dtype, wire_dtype=wire_dtype)
    descriptions: list[Description] = []
    # No comprehension, which is a frame of Python 3.11 for the exporter's warning to count.
    for site, place in zip(sites, pages, strict=True):
        found = exporter.describe(site) if site.spec is None else _describe(site, site.spec, weights)
        descriptions.append({**found, **place._asdict(), **kind})
    return tuple(descriptions), tuple(exporter.artifacts)


def _describe(site: PlannedSite, spec: AttentionSpec, weights: Mapping[Value, jax.Array]) -> Description:
    sinks = [np.asarray(array) for array in site.kernel_weights([weights[value] for value in site.weights])]
    return {
        **{name.name: getattr(spec, name.name) for name in fields(spec)},
        "alibi_slopes": None if spec.alibi_slopes is None else _as_text(spec.alibi_slopes),
        "sink_scores": _as_text(sinks[0]) if sinks else "",
    }


def fingerprint(descriptions: Sequence[Description], artifacts: Sequence[np.ndarray]) -> str:
    """Hex identity of what a worker serves."""
    found = hashlib.sha256(json.dumps([dict(sorted(each.items())) for each in descriptions]).encode())
    for array in artifacts:
        found.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return found.hexdigest()[:16]


def read_descriptions(
    descriptions: Sequence[Description], artifacts: Sequence[np.ndarray], *, allow_exported_sites: bool
) -> list[DescribedSite | ExportedSite]:
    """The sites that a peer describes.

    Args:
      allow_exported_sites: whether the peer may bring programs.
    Raises:
      ConfigError: a value that is missing or out of range, or a program that may not be; the message has it.
    """
    exported = ExportedSites(artifacts, allowed=allow_exported_sites)
    return [exported.read(each) if "program" in each else _read_described(each) for each in descriptions]


def _read_described(description: Description) -> DescribedSite:
    heads = natural(description, "num_heads")
    kv_heads = natural(description, "num_kv_heads")
    if heads % kv_heads:
        raise ConfigError(f"num_heads={heads} of a site; allowed: a multiple of num_kv_heads={kv_heads}")
    has_sinks = bool(description.get("has_sinks"))
    slopes = description.get("alibi_slopes")
    spec = AttentionSpec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=natural(description, "head_dim"),
        v_head_dim=natural(description, "v_head_dim"),
        scale=number(description, "scale"),
        window=None if description.get("window") is None else natural(description, "window", most=1 << 31),
        softcap=None if description.get("softcap") is None else number(description, "softcap"),
        alibi_slopes=None if slopes is None else numbers(description, "alibi_slopes", heads),
        has_sinks=has_sinks,
    )
    sinks = numbers(description, "sink_scores", heads) if has_sinks else ()
    return DescribedSite(spec=spec, sink_scores=sinks, **read_pool_kind(description))


def _as_text(values: Any) -> str:
    """Numbers of each head: kernels read them as float32, whose shortest decimals these are."""
    return " ".join(str(value) for value in np.asarray(values, np.float32))
