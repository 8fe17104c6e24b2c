"""A site as the engine gets it: what goes down, what comes up, and how it is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from partition.attention_spec import AttentionSpec
from partition.jaxpr import Value
from partition.layouts import Port
from partition.site_function import SiteFunction
from partition.sites import Site


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedSite:
    """A causal attention site.

    inputs: q, k and v of a recognised site, as [rows, heads, dim]; else the site's operands, their row axis first.
    outputs: in the order of `site.outputs`; that of a recognised site as [rows, heads, v_head_dim].
    spec: what a kernel needs to know; None where only the site's own subgraph says what it computes.
    unrecognised: why there is no spec.
    shares_cache: an earlier site of the plan sends and keeps the same values (cross-layer shared KV).
    """

    site: Site
    function: SiteFunction
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    spec: AttentionSpec | None
    unrecognised: str = ""
    shares_cache: bool = False

    @property
    def weights(self) -> tuple[Value, ...]:
        """Weights that tier 2 needs to compute the site."""
        return self.site.weights

    def kernel_weights(self, weights: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """What each call takes, of the arrays of `self.weights`: these, or what a kernel makes of them."""
        if self.spec is None:
            return tuple(weights)
        return (self.sinks(weights),) if self.spec.has_sinks else ()

    def sinks(self, weights: Sequence[jax.Array]) -> jax.Array:
        """[num_heads] float32: what is missing of the weight of a single key of score 0 is the sink's."""
        at = jnp.zeros(1, jnp.int32)
        rows = [
            jnp.full((1, *port.layout.inner), 1.0 if port.name == "v" else 0.0, jnp.float32) for port in self.inputs
        ]
        wide = dataclasses.replace(self, function=dataclasses.replace(self.function, widened=True))
        (out,) = wide.attend(rows, at, at, weights)
        seen = out[0, :, 0]
        return jnp.log(jnp.maximum(1 - seen, jnp.finfo(jnp.float32).tiny)) - jnp.log(seen)

    @property
    def key(self) -> Any:
        """Equal for sites that can share an executable."""
        return self.spec if self.spec is not None else self.site.key

    @property
    def cached(self) -> tuple[Port, ...]:
        """What tier 2 keeps for the site."""
        return tuple(port for port in self.inputs if port.is_cached)

    @property
    def sent(self) -> tuple[int, ...]:
        """Which of the inputs stages send it: not those that are cached already."""
        return tuple(n for n, port in enumerate(self.inputs) if not (port.is_cached and self.shares_cache))

    @property
    def cache_key(self) -> Any:
        """Equal for sites of one plan that keep the same values, which are kept once."""
        values = [(port.value, port.layout) for port in sorted(self.cached, key=lambda port: port.name)]
        return self.spec is None, tuple(values)

    def of(self, site: Site) -> PlannedSite:
        """The same description of another site with the same key."""
        operands = dict(zip(self.site.operands, site.operands, strict=True))
        outputs = dict(zip(self.site.outputs, site.outputs, strict=True))

        def entering(port: Port) -> Port:
            return dataclasses.replace(port, value=operands[(port.value, "key" if port.is_cached else "query")][0])

        return dataclasses.replace(
            self,
            site=site,
            function=dataclasses.replace(self.function, site=site),
            inputs=tuple(entering(port) for port in self.inputs),
            outputs=tuple(dataclasses.replace(port, value=outputs[port.value]) for port in self.outputs),
        )

    def attend(
        self, operands: Sequence[jax.Array], query_positions: Any, key_positions: Any, weights: Sequence[jax.Array]
    ) -> tuple[jax.Array, ...]:
        """The site's own subgraph on `inputs` and `outputs` as rows.

        Args:
          operands: [queries or keys, *inner] of each input.
          query_positions, key_positions: [queries], [keys] int32.
          weights: of `self.weights`.
        """
        rows = [port.layout.from_canonical(array) for port, array in zip(self.inputs, operands, strict=True)]
        found = self.function(rows, query_positions, key_positions, weights)
        return tuple(port.layout.to_canonical(array) for port, array in zip(self.outputs, found, strict=True))
