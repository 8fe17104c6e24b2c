"""Sites without a kernel in the handshake: what the engine says of them, and what a worker makes of that."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hetero_jax import attention
from hetero_jax.description import Description, choice, natural, read_pool_kind
from hetero_jax.errors import ConfigError
from hetero_jax.exported_attention import NUM_PROGRAMS, ExportedAttention, export_attention
from hetero_jax.joined_rows import JoinedRows
from hetero_jax.page_groups import SitePages
from partition import PlannedSite, Value

# Of rows that are not heads times dimensions, no axis is known that could share a scale.
JOINED_WIRE_DTYPES = ("bfloat16", "float32")
_MOST_WHERE = 200  # characters


@dataclass(frozen=True, kw_only=True, eq=False)
class ExportedSite:
    """What `AttentionTier` needs of a site that came as programs, and how its rows travel.

    attention: the programs; equal sites share them.
    pages, page_size, kv_cache_dtype: as of `DescribedSite`.
    arrays: weights that every call takes.
    """

    attention: ExportedAttention
    pages: SitePages
    page_size: int
    kv_cache_dtype: str
    wire_dtype: str
    arrays: tuple[np.ndarray, ...]
    weights: tuple[Value, ...] = ()  # a worker has none

    @property
    def key(self) -> ExportedAttention:
        """As of `PlannedSite`."""
        return self.attention

    @property
    def page_shape(self) -> Any:
        """As of `DescribedSite`."""
        return tuple(self.attention.pool)

    def kernel_weights(self, weights: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """As of `PlannedSite`."""
        return tuple(jnp.asarray(array) for array in self.arrays)

    def unpack(self, sent: Sequence[np.ndarray], *, shares_pool: bool) -> tuple[list[np.ndarray], str]:
        """As of `DescribedSite`; all travels as one array, whatever is shared."""
        del shares_pool
        if len(sent) != 1:
            raise ConfigError(f"{len(sent)} arrays of rows; allowed for this site: one, in which all are joined")
        return self._received.split(sent[0]), self.wire_dtype

    def pack(self, outputs: Sequence[np.ndarray]) -> np.ndarray:
        """As of `DescribedSite`."""
        return self._answered.join(outputs)

    @functools.cached_property
    def _received(self) -> JoinedRows:
        return JoinedRows.of(self.attention.inputs, self.wire_dtype)

    @functools.cached_property
    def _answered(self) -> JoinedRows:
        return JoinedRows.of(self.attention.outputs, self.wire_dtype)


class SiteExporter:
    """Describes sites without a kernel. artifacts: what the descriptions refer to by number; each only once.

    Args:
      weights: arrays of the weights that sites read.
      page_size, dtype: of the pools.
    """

    def __init__(self, weights: Mapping[Value, jax.Array], *, page_size: int, dtype: Any, wire_dtype: str) -> None:
        self.artifacts: list[np.ndarray] = []
        self._weights, self._page_size, self._dtype, self._wire_dtype = weights, page_size, jnp.dtype(dtype), wire_dtype
        self._known: dict[Any, int] = {}  # numbers of the artifacts, by site and by weight

    def describe(self, site: PlannedSite) -> Description:
        """Its description; announces what is slow.

        Raises:
          ConfigError: it cannot travel.
        """
        where = site.site.opening.where
        try:
            self._check()
            program = self._number((site.key, site.shares_cache), lambda: self._export(site))
        except ConfigError as error:
            raise ConfigError(f"the attention opened at {where} cannot go to workers: {error}") from error
        weights = [self._number(value, functools.partial(self._weight, value)) for value in site.weights]
        return {
            "program": program,
            "weights": " ".join(map(str, weights)),
            "where": where[-_MOST_WHERE:],
            "wire_dtype": self._wire_dtype,
        }

    def _check(self) -> None:
        for name, value, allowed in (
            ("kv_cache_dtype", self._dtype.name, attention.DTYPES),
            ("wire_dtype", self._wire_dtype, JOINED_WIRE_DTYPES),
        ):
            if value not in allowed:
                raise ConfigError(f"{name}={value} needs the native kernel; allowed: {', '.join(allowed)}")

    def _number(self, key: Any, make: Callable[[], list[np.ndarray]]) -> int:
        """Of the first of the artifacts that were made for a key."""
        if key not in self._known:
            self._known[key] = len(self.artifacts)
            self.artifacts += make()
        return self._known[key]

    def _weight(self, value: Value) -> list[np.ndarray]:
        return [np.asarray(self._weights[value])]

    def _export(self, site: PlannedSite) -> list[np.ndarray]:
        warnings.warn(
            f"the attention opened at {site.site.opening.where} runs by its own traced operations, exported to "
            f"workers, slower than a kernel, as {site.unrecognised}",
            stacklevel=9,  # whoever makes an engine
        )
        return export_attention(site, page_size=self._page_size, dtype=self._dtype)


class ExportedSites:
    """Reads what a SiteExporter wrote. allowed: whether programs may come at all."""

    def __init__(self, artifacts: Sequence[np.ndarray], *, allowed: bool) -> None:
        self._artifacts, self._allowed = artifacts, allowed
        self._attentions: dict[int, ExportedAttention] = {}

    def read(self, description: Description) -> ExportedSite:
        """The site of a description that has a program.

        Raises:
          ConfigError: programs are not allowed, or it is no such description.
        """
        if not self._allowed:
            where = str(description.get("where"))[:_MOST_WHERE]
            raise ConfigError(
                f"the attention opened at {where} has no kernel and comes as a program; "
                "allowed: with --allow_exported_sites and --secret_file of the worker"
            )
        number = natural(description, "program", least=0, most=len(self._artifacts) - NUM_PROGRAMS)
        if number not in self._attentions:
            self._attentions[number] = ExportedAttention(self._artifacts[number : number + NUM_PROGRAMS])
        found = ExportedSite(
            attention=self._attentions[number],
            wire_dtype=choice(description, "wire_dtype", JOINED_WIRE_DTYPES),
            arrays=self._arrays(description.get("weights")),
            **read_pool_kind(description),
        )
        if any(shape[:1] != (found.page_size,) for shape, _ in found.attention.pool):
            raise ConfigError(f"page_size={found.page_size} of a site whose program has another")
        return found

    def _arrays(self, text: Any) -> tuple[np.ndarray, ...]:
        numbers = [int(part) if part.isdecimal() else -1 for part in str(text).split()]
        if any(not 0 <= number < len(self._artifacts) for number in numbers):
            raise ConfigError(f"weights={text!r} of a site; allowed: numbers below {len(self._artifacts)}")
        return tuple(self._artifacts[number] for number in numbers)
