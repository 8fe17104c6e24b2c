"""Reads the parameters of a site by running it: heads and layouts from its two products, the rest from probes.

A site that is softmax attention over one q, k and v is described by an `AttentionSpec`, which every attention kernel
understands; the description is then checked numerically against the site's own subgraph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from partition.analysis import Analysis
from partition.attention_spec import Array, AttentionSpec, reference_attention
from partition.jaxpr import Value
from partition.layouts import Layout, Layouts, read_layouts, refuse
from partition.sites import End, Site, SiteFunction

_PROBE_KEYS = 32


@dataclass(frozen=True, kw_only=True)
class Recognised:
    """A site, what it computes, and the layouts of q, k, v and the output."""

    site: Site
    spec: AttentionSpec
    layouts: Layouts


def recognise(analysis: Analysis, site: Site, *, max_rows: int) -> Recognised:
    """Describe a site as softmax attention, or refuse it.

    Args:
      max_rows: the longest sequence; the window is read up to this distance.

    Raises:
      UnsupportedSiteError: not softmax attention over one q, k, v with an exactly causal mask.
    """
    layouts = read_layouts(analysis, site)
    return Recognised(site=site, spec=_Probe(analysis, site, layouts, max_rows).spec(), layouts=layouts)


class _Probe:
    """Runs the site's own subgraph on chosen q, k, v and positions."""

    def __init__(self, analysis: Analysis, site: Site, layouts: Layouts, max_rows: int) -> None:
        self.layouts, self.site, self.max_rows = layouts, site, max_rows
        self.function = jax.jit(SiteFunction(analysis=analysis, site=site, widened=True))
        self.heads, self.kv_heads = layouts.q.heads, layouts.k.heads
        self.dim, self.v_dim = layouts.q.dim, layouts.v.dim
        if layouts.v.heads != self.kv_heads or self.heads % self.kv_heads or layouts.k.dim != self.dim:
            raise refuse(
                self.site,
                f"has q [{self.heads}, {self.dim}], k [{self.kv_heads}, {layouts.k.dim}], "
                f"v [{layouts.v.heads}, {self.v_dim}] heads and dims",
            )

    def run(self, q: Array, k: Array, v: Array, q_at: Array, k_at: Array) -> Array:
        """[queries, heads, v_dim] from canonical q [queries, heads, dim], k and v [keys, kv_heads, dim]."""
        arrays = []
        for value, end in self.site.operands:
            layout, array = self._operand(value, end, q, k, v)
            arrays.append(layout.from_canonical(jax.numpy.asarray(array, np.float32)))
        (out,) = self.function(arrays, q_at.astype(np.int32), k_at.astype(np.int32))
        return np.asarray(self.layouts.out.to_canonical(out), np.float64)

    def _operand(self, value: Value, end: End, q: Array, k: Array, v: Array) -> tuple[Layout, Array]:
        if end == "query":
            return self.layouts.q, q
        is_k = value in self.site.opening.inputs
        return (self.layouts.k, k) if is_k else (self.layouts.v, v)

    def weights(self, scores: Array, q_at: int, k_at: Array) -> Array:
        """[keys, heads]: the attention of one query whose q . k is `scores` [keys] at positions `k_at` [keys].

        Padded with keys of score 0 at the query's own position, so that all probes share one executable.
        """
        asked, keys = len(k_at), _PROBE_KEYS
        k_at = np.concatenate([k_at, np.full(keys - asked, q_at)])
        scores = np.concatenate([scores, np.zeros(keys - asked)])
        q = np.zeros((1, self.heads, self.dim))
        q[:, :, 0] = 1
        k = np.zeros((keys, self.kv_heads, self.dim))
        k[:, :, 0] = scores[:, None]
        found = []
        for start in range(0, keys, self.v_dim):
            v = np.zeros((keys, self.kv_heads, self.v_dim))
            chunk = np.arange(start, min(start + self.v_dim, keys))
            v[chunk, :, chunk - start] = 1
            out = self.run(q, k, v, np.array([q_at]), k_at)
            found.append(out[0, :, : len(chunk)].T)
        return np.concatenate(found)

    def spec(self) -> AttentionSpec:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            window = self.window()
            self.check_mask(window)
            scale, softcap = self.scale_and_cap()
            spec = AttentionSpec(
                num_heads=self.heads,
                num_kv_heads=self.kv_heads,
                head_dim=self.dim,
                v_head_dim=self.v_dim,
                scale=scale,
                window=window,
                softcap=softcap,
            )
            self.check(spec)
        return spec

    def allowed(self, distance: int) -> bool:
        """Does the last position see the key `distance` before it?"""
        last = self.max_rows - 1
        weights = self.weights(np.zeros(2), last, np.array([last, last - distance]))
        return bool((weights[1] > 0).all())

    def window(self) -> int | None:
        if self.allowed(self.max_rows - 1):
            return None
        return _largest(self.allowed, self.max_rows - 1) + 1

    def check_mask(self, window: int | None) -> None:
        """Causal exactly, the same at every position, and equal weights where scores are equal."""
        for q_at in (self.max_rows - 1, self.max_rows // 2, 7):
            distances = _distances(window, q_at, self.max_rows)
            distances = np.concatenate([distances, np.zeros(_PROBE_KEYS - len(distances), int)])
            weights = self.weights(np.zeros(len(distances)), q_at, q_at - distances)
            visible = (distances >= 0) & (distances < (window or self.max_rows))
            if (weights[~visible] != 0).any():
                seen = distances[~visible][(weights[~visible] != 0).any(axis=1)]
                raise refuse(
                    self.site,
                    f"is not exactly causal: position {q_at} gives weight {weights[~visible].max():.3g} to the key at "
                    f"position {q_at - seen[0]}",
                )
            if not np.allclose(weights[visible], 1 / visible.sum(), rtol=1e-5, atol=0):
                raise refuse(self.site, "adds a bias by position or a sink to the scores, or is no softmax")

    def scale_and_cap(self) -> tuple[float, float | None]:
        """Log-odds of two keys as a function of q . k."""
        position = min(9, self.max_rows - 1)

        def score(x: float) -> float:
            weights = self.weights(np.array([0.0, x]), position, np.array([position, position - 1]))
            odds = np.log(weights[1] / weights[0])
            if np.ptp(odds) > 1e-5 * max(1.0, abs(odds[0])):
                raise refuse(self.site, f"scales its heads differently: {odds}")
            return float(odds[0])

        small = score(0.25) / 0.25
        if small <= 0:
            raise refuse(self.site, f"has a scale of {small:.3g}")
        probe = 4.0 / small
        linear = score(probe) / probe
        if math.isclose(linear, small, rel_tol=1e-4):
            return self._snap(linear), None
        return self._fit_cap(score, small)

    def _fit_cap(self, score: Callable[[float], float], small: float) -> tuple[float, float | None]:
        # At x -> infinity the log-odds tend to the cap; beyond about 80 the other weight underflows.
        limit = score(1e6 / small)
        if not math.isfinite(limit) or not 0 < limit < 80:
            raise refuse(self.site, "transforms its scores in an unknown way")
        cap = float(round(limit)) if math.isclose(limit, round(limit), rel_tol=1e-4) else limit
        x = cap / small
        scale = self._snap(math.atanh(score(x) / cap) * cap / x)
        return scale, cap

    def _snap(self, scale: float) -> float:
        for exact in (1.0, self.dim**-0.5, 1.0 / self.dim):
            if math.isclose(scale, exact, rel_tol=2e-5):
                return exact
        return scale

    def check(self, spec: AttentionSpec) -> None:
        """The description against the site's own subgraph, on random numbers."""
        random = np.random.default_rng(0)
        keys = np.unique(np.clip(np.arange(24) - 12 + (spec.window or 0), 0, self.max_rows - 1))
        queries = keys[len(keys) // 2 :]
        keys = np.unique(np.concatenate([keys, np.arange(min(4, self.max_rows))]))
        q = random.normal(size=(len(queries), self.heads, self.dim))
        k = random.normal(size=(len(keys), self.kv_heads, self.dim))
        v = random.normal(size=(len(keys), self.kv_heads, self.v_dim))
        seen = self.run(q, k, v, queries, keys)
        expected = reference_attention(spec, q, k, v, queries, keys)
        error = float(np.abs(seen - expected).max())
        if error > 1e-4:
            raise refuse(self.site, f"differs from {spec} by {error:.3g} on random input")


def _largest(predicate: Callable[[int], bool], limit: int) -> int:
    """The largest n in [0, limit) with predicate(n), for one that is true up to some point and false after it."""
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if predicate(middle) else (low, middle)
    return low


def _distances(window: int | None, q_at: int, max_rows: int) -> Array:
    """Distances to probe from one position: near, future, around the window's edge, and a seeded sample."""
    sample = np.random.default_rng(1).integers(0, max_rows, size=12)
    edge = [] if window is None else [window - 2, window - 1, window, window + 1]
    found = np.unique(np.array([-9, -2, -1, 0, 1, 2, 3, 5, 7, q_at, *edge, *sample]))
    return found[(q_at - found >= 0) & (q_at - found < max_rows)]
