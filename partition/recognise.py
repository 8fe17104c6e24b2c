"""Reads the parameters of a site by running it on chosen q, k, v and positions.

A site that is softmax attention over one q, k and v is described by an `AttentionSpec`, which every attention kernel
understands; the description is then checked numerically against the site's own subgraph. Any other site keeps its
subgraph, if that is exactly causal.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partition.analysis import Analysis
from partition.attention_spec import Array, AttentionSpec, reference_attention
from partition.causality import check_causal
from partition.jaxpr import Value
from partition.labels import Axis
from partition.layouts import Port, ordered, rows_first
from partition.planned_site import PlannedSite
from partition.roles import POSITION, NotRecognisedError, Roles, read_roles
from partition.site_function import SiteFunction
from partition.sites import Site

_PROBE_KEYS = 32
# A score that outweighs any bias by distance, and that no mask (-1e9 and below) lets through.
_LARGE_SCORE = 1e5


def plan_site(analysis: Analysis, site: Site, *, max_rows: int) -> PlannedSite:
    """Establish that a site is causal, and describe it as softmax attention if it is that.

    Args:
      max_rows: the longest sequence; the window is read up to this distance.

    Raises:
      UnsupportedSiteError: the site is not exactly causal.
    """
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        traced = _as_traced(analysis, site)
        wide = SiteFunction(analysis=analysis, site=site, widened=True)
        check_causal(dataclasses.replace(traced, function=wide), max_rows=max_rows)
        try:
            return _recognised(traced, wide, max_rows)
        except NotRecognisedError as error:
            return dataclasses.replace(traced, unrecognised=str(error))


def _as_traced(analysis: Analysis, site: Site) -> PlannedSite:
    def port(name: str, value: Value, is_cached: bool = False) -> Port:
        layout = rows_first(value, analysis.facts[value].labels.index(Axis.ROW))
        return Port(name=name, value=value, layout=layout, is_cached=is_cached)

    sides = {"query": "q", "key": "k"}
    return PlannedSite(
        site=site,
        function=SiteFunction(analysis=analysis, site=site),
        inputs=tuple(
            port(f"{sides[end]}{index}", value, end == "key") for index, (value, end) in enumerate(site.operands)
        ),
        outputs=tuple(port(f"out{index}", value) for index, value in enumerate(site.outputs)),
        spec=None,
    )


def _recognised(traced: PlannedSite, wide: SiteFunction, max_rows: int) -> PlannedSite:
    operands = _Operands(traced, wide)
    roles = read_roles(operands)
    inners = {
        "q": (roles.heads, roles.dim),
        "k": (roles.kv_heads, roles.dim),
        "v": (roles.kv_heads, roles.v_dim),
        "out": (roles.heads, roles.v_dim),
    }
    ports = {
        name: dataclasses.replace(port, name=name, layout=ordered(port.layout, inners[name], getattr(roles, name)))
        for name, port in operands.ports.items()
    }
    probe = _Probe(operands, roles, max_rows)
    spec = dataclasses.replace(probe.spec(), has_sinks=bool(traced.weights) or operands.is_partial)
    found = dataclasses.replace(
        traced, function=wide, inputs=(ports["q"], ports["k"], ports["v"]), outputs=(ports["out"],), spec=spec
    )
    operands.as_is(_random_weights(traced))
    probe.check(spec, np.asarray(found.sinks(operands.weights), np.float64) if spec.has_sinks else None)
    return dataclasses.replace(found, function=traced.function)


def _random_weights(traced: PlannedSite) -> list[jax.Array]:
    random = np.random.default_rng(4)
    return [jnp.asarray(random.normal(size=value.shape), value.dtype) for value in traced.weights]


class _Operands:
    """A site with one q, k, v and output, as a function of flat rows.

    weights: what the site gets for its weights; at first so negative that, where they are scores of sinks, these have
      no weight.
    is_partial: a single key's weight is less than 1, so sinks of constant scores have the rest. The outputs are then
      those without sinks, until `as_is`: what they are divided by what they are for values of 1.

    Raises:
      NotRecognisedError: it has others.
    """

    def __init__(self, traced: PlannedSite, wide: SiteFunction) -> None:
        queries = [port for port in traced.inputs if not port.is_cached]
        keys = [port for port in traced.inputs if port.is_cached]
        if len(queries) != 1 or len(keys) != 2 or len(traced.outputs) != 1:
            raise NotRecognisedError(
                f"it takes {len(queries)} values on the query side and {len(keys)} on the key side, and gives "
                f"{len(traced.outputs)}"
            )
        values = (*(port.value for port in (*traced.inputs, *traced.outputs)), *traced.weights)
        if not all(jnp.issubdtype(value.dtype, jnp.floating) for value in values):
            raise NotRecognisedError("it takes or gives values of no float type")
        self.traced, self.function = traced, wide
        self.weights = [jnp.full(value.shape, -1e4, value.dtype) for value in traced.weights]
        self.ports = {"q": queries[0], "k": keys[0], "v": keys[1], "out": traced.outputs[0]}
        self.as_is(self.weights)
        if self._is_value("k"):
            self.ports |= {"k": keys[1], "v": keys[0]}
        if self._is_value("k") or not self._is_value("v"):
            raise NotRecognisedError("a single key's output is not that of one of its two operands alone")
        self.sizes = {name: math.prod(port.layout.inner) for name, port in self.ports.items()}
        self.is_partial = self._is_partial()
        if self.is_partial:
            self._use(self._without_sinks)

    def as_is(self, weights: list[jax.Array]) -> None:
        """From now on the site's own outputs, for these weights."""
        self.weights = weights
        self._use(self._flat)

    def _use(self, site: Callable[..., jax.Array]) -> None:
        self._site, self._forward, self._backward = site, jax.jit(site), jax.jit(self._slope)

    def _is_partial(self) -> bool:
        """Do keys of score 0 together weigh less than 1?"""
        q, k, v = (np.full((1, self.sizes[name]), value) for name, value in (("q", 0.0), ("k", 0.0), ("v", 1.0)))
        seen = self.run(q[0], k, v, POSITION, np.array([POSITION]))
        return bool(((seen > 0) & (seen < 1 - 1e-6)).all())

    def run(self, q: Array, k: Array, v: Array, query_position: int, key_positions: Array) -> Array:
        """[out elements] of one query q [elements] over flat k and v [keys, elements].

        All is repeated to _PROBE_KEYS keys, which changes no weighted mean where the number of keys divides that.
        """
        times = _PROBE_KEYS // len(key_positions)
        k, v, key_positions = (np.repeat(each, times, axis=0) for each in (k, v, key_positions))
        found = self._forward(self.weights, q[None], k, v, np.array([query_position]), key_positions)
        return np.asarray(found[0], np.float64)

    def slope(self, k: Array, v: Array, cotangent: Array) -> Array:
        """[q elements]: the derivative of a sum of outputs by q at q = 0, all keys at one position."""
        k, v = (np.repeat(each, _PROBE_KEYS // len(each), axis=0) for each in (k, v))
        q = np.zeros((1, self.sizes["q"]), np.float32)
        return np.asarray(self._backward(self.weights, q, k, v, np.asarray(cotangent, np.float32))[0], np.float64)

    def _flat(self, weights: Any, q: Array, k: Array, v: Any, query_positions: Any, key_positions: Any) -> jax.Array:
        arrays = {self.ports["q"]: q, self.ports["k"]: k, self.ports["v"]: v}
        rows = [port.layout.from_canonical(jnp.asarray(arrays[port], jnp.float32)) for port in self.traced.inputs]
        (out,) = self.function(rows, query_positions, key_positions, weights)
        return self.ports["out"].layout.to_canonical(out).reshape(len(query_positions), -1)

    def _without_sinks(self, weights: Any, q: Array, k: Array, v: Any, *at: Any) -> jax.Array:
        return self._flat(weights, q, k, v, *at) / self._flat(weights, q, k, jnp.ones_like(v), *at)

    def _slope(self, weights: Any, q: jax.Array, k: Array, v: Array, cotangent: Array) -> jax.Array:
        at = jnp.full(_PROBE_KEYS, POSITION)
        return jax.grad(lambda q: jnp.sum(self._site(weights, q, k, v, at[:1], at)[0] * cotangent))(q)

    def _is_value(self, name: str) -> bool:
        """Does the output for a single key change with this operand, for q = 0?"""
        random = np.random.default_rng(0)
        rows = {port: random.normal(size=(1, math.prod(port.layout.inner))) for port in self.ports.values()}
        at = np.array([POSITION])
        found = []
        for factor in (1.0, 2.0):
            q, k, v = (rows[self.ports[each]] * (factor if each == name else 1.0) for each in "qkv")
            found.append(self.run(0 * q[0], k, v, POSITION, at))
        return not np.allclose(*found, rtol=1e-5)


class _Probe:
    """Reads mask, scale, soft cap and bias of a site of known roles."""

    def __init__(self, operands: _Operands, roles: Roles, max_rows: int) -> None:
        self.operands, self.roles, self.max_rows = operands, roles, max_rows

    def run(self, q: Array, k: Array, v: Array, q_at: int, k_at: Array) -> Array:
        """[heads, v_dim] from canonical q [heads, dim], k and v [_PROBE_KEYS, kv_heads, dim]."""
        q, k, v = (
            array.reshape(len(array), -1)[:, np.argsort(order)]
            for array, order in ((q[None], self.roles.q), (k, self.roles.k), (v, self.roles.v))
        )
        out = self.operands.run(q[0], k, v, q_at, k_at)[self.roles.out]
        return out.reshape(self.roles.heads, self.roles.v_dim)

    def weights(self, scores: Array, q_at: int, k_at: Array) -> Array:
        """[keys, heads]: the attention of one query whose q . k is `scores` [keys] at positions `k_at` [keys].

        Padded with keys of score 0 at the query's own position, so that all probes share one executable.
        """
        roles, asked, keys = self.roles, len(k_at), _PROBE_KEYS
        k_at = np.concatenate([k_at, np.full(keys - asked, q_at)])
        scores = np.concatenate([scores, np.zeros(keys - asked)])
        q = np.zeros((roles.heads, roles.dim))
        q[:, 0] = 1
        k = np.zeros((keys, roles.kv_heads, roles.dim))
        k[:, :, 0] = scores[:, None]
        found = []
        for start in range(0, keys, roles.v_dim):
            v = np.zeros((keys, roles.kv_heads, roles.v_dim))
            chunk = np.arange(start, min(start + roles.v_dim, keys))
            v[chunk, :, chunk - start] = 1
            found.append(self.run(q, k, v, q_at, k_at)[:, : len(chunk)].T)
        return np.concatenate(found)

    def spec(self) -> AttentionSpec:
        window = self.window()
        slopes = self.slopes(window)
        self.check_mask(window, slopes)
        scale, softcap = self.scale_and_cap()
        spec = AttentionSpec(
            num_heads=self.roles.heads,
            num_kv_heads=self.roles.kv_heads,
            head_dim=self.roles.dim,
            v_head_dim=self.roles.v_dim,
            scale=scale,
            window=window,
            softcap=softcap,
            alibi_slopes=slopes,
        )
        return spec

    def allowed(self, distance: int) -> bool:
        """Does the last position see the key `distance` before it, whatever bias the distance brings?"""
        keys = np.array([self.max_rows - 1, self.max_rows - 1 - distance])
        weights = (self.weights(np.array([0.0, score]), keys[0], keys) for score in (0.0, _LARGE_SCORE))
        return any((found[1] > 0).all() for found in weights)

    def window(self) -> int | None:
        if self.allowed(self.max_rows - 1):
            return None
        return _largest(self.allowed, self.max_rows - 1) + 1

    def slopes(self, window: int | None) -> tuple[float, ...] | None:
        """Of each head, from the log-odds of the next key and a query's own; None where they are even."""
        if window == 1:
            return None
        rough = -self.odds(0.0, 1)
        if not np.isfinite(rough).all():
            raise NotRecognisedError(f"it gives the key before a query the log-odds {-rough} at equal scores")
        if np.abs(rough).max() < 1e-5:
            return None
        # Read where the bias is large, which is exact to more digits.
        slopes = rough
        for distance in (d for d in (8, 64, 512, 4096) if d < min(window or self.max_rows, self.max_rows)):
            odds = -self.odds(0.0, distance)
            slopes = np.where(np.abs(rough) * distance < 20, odds / distance, slopes)
        return tuple(_snap_power(float(slope)) for slope in slopes)

    def odds(self, score: float, distance: int) -> Array:
        """[heads]: log-odds of a key of `score` before a query and of the query's own key of score 0."""
        position = min(max(9, distance), self.max_rows - 1)
        keys = np.array([position, position - distance])
        weights = self.weights(np.array([0.0, score]), position, keys)
        return np.log(weights[1] / weights[0])

    def check_mask(self, window: int | None, slopes: tuple[float, ...] | None) -> None:
        """Causal exactly, the same at every position, and weights that the slopes explain where scores are equal."""
        bias = np.zeros(self.roles.heads) if slopes is None else np.array(slopes)
        for q_at in (self.max_rows - 1, self.max_rows // 2, 7):
            distances = _distances(window, q_at, self.max_rows)
            distances = np.concatenate([distances, np.zeros(_PROBE_KEYS - len(distances), int)])
            weights = self.weights(np.zeros(len(distances)), q_at, q_at - distances)
            visible = (distances >= 0) & (distances < (window or self.max_rows))
            expected = np.where(visible[:, None], np.exp(-bias * np.maximum(distances, 0)[:, None]), 0)
            expected /= expected.sum(axis=0)
            if (weights[~visible] != 0).any() or not np.allclose(weights, expected, rtol=1e-4, atol=1e-30):
                raise NotRecognisedError("its weights for equal scores are not even (nor those of linear biases)")

    def scale_and_cap(self) -> tuple[float, float | None]:
        """Log-odds of two keys as a function of q . k."""

        def score(x: float) -> float:
            odds = self.odds(x, 0)
            if np.ptp(odds) > 1e-5 * max(1.0, abs(odds[0])):
                raise NotRecognisedError(f"it scales its heads differently: {odds}")
            return float(odds[0])

        small = score(0.25) / 0.25
        if small <= 0:
            raise NotRecognisedError(f"its scale is {small:.3g}")
        probe = 4.0 / small
        linear = score(probe) / probe
        if math.isclose(linear, small, rel_tol=1e-4):
            return self._snap(linear), None
        return self._fit_cap(score, small)

    def _fit_cap(self, score: Callable[[float], float], small: float) -> tuple[float, float | None]:
        # At x -> infinity the log-odds tend to the cap; beyond about 80 the other weight underflows.
        limit = score(1e6 / small)
        if not math.isfinite(limit) or not 0 < limit < 80:
            raise NotRecognisedError("it transforms its scores in an unknown way")
        cap = float(round(limit)) if math.isclose(limit, round(limit), rel_tol=1e-4) else limit
        x = cap / small
        scale = self._snap(math.atanh(score(x) / cap) * cap / x)
        return scale, cap

    def _snap(self, scale: float) -> float:
        for exact in (1.0, self.roles.dim**-0.5, 1.0 / self.roles.dim):
            if math.isclose(scale, exact, rel_tol=2e-5):
                return exact
        return scale

    def check(self, spec: AttentionSpec, sinks: Array | None) -> None:
        """The description against the site's own subgraph, on random numbers."""
        random = np.random.default_rng(0)
        near = np.arange(_PROBE_KEYS - 4) - 14 + (spec.window or 0)
        keys = np.unique(np.clip([*near, *np.arange(4)], 0, self.max_rows - 1))
        keys = np.concatenate([np.zeros(_PROBE_KEYS - len(keys), int), keys])
        k = random.normal(size=(len(keys), spec.num_kv_heads, spec.head_dim))
        v = random.normal(size=(len(keys), spec.num_kv_heads, spec.v_head_dim))
        for query in keys[-12:]:
            q = random.normal(size=(spec.num_heads, spec.head_dim))
            expected = reference_attention(spec, q[None], k, v, np.array([query]), keys, sinks)[0]
            error = float(np.abs(self.run(q, k, v, query, keys) - expected).max())
            if not error <= 1e-4:
                raise NotRecognisedError(f"it differs from {spec} by {error:.3g} on random input")


def _snap_power(slope: float) -> float:
    """ALiBi's slopes are powers of two, or of a root of two."""
    exact = 2.0 ** (round(16 * math.log2(slope)) / 16) if slope > 0 else slope
    return exact if math.isclose(slope, exact, rel_tol=1e-4) else slope


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
