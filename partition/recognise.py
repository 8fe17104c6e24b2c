"""Reads the parameters of a site by running it: heads and layouts from its two products, the rest from probes.

A site that is softmax attention over one q, k and v is described by an `AttentionSpec`, which every attention kernel
understands; the description is then checked numerically against the site's own subgraph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import numpy as np

from partition.analysis import Analysis
from partition.errors import UnsupportedSiteError
from partition.jaxpr import Equation, Value
from partition.rules import axis_map
from partition.sites import End, Site, SiteFunction, operand_ends

Array = np.ndarray

_PROBE_KEYS = 32


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Causal softmax attention: out_i = sum_j softmax_j(cap(scale * q_i . k_j)) v_j over j <= i, i - j < window.

    Query head h reads key-value head h // (num_heads // num_kv_heads). window None: all earlier tokens.
    softcap c: cap(x) = c * tanh(x / c); None: cap(x) = x.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a value of the model holds [rows, heads, dim]: `order` are its axes in canonical order, size-1 axes last.

    row_axis: the value's axis that counts rows.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    row_axis: int
    heads: int
    dim: int

    def to_canonical(self, array: jax.Array) -> jax.Array:
        """[rows, heads, dim] from the model's layout."""
        rows = array.shape[self.row_axis]
        return array.transpose(self.order).reshape(rows, self.heads, self.dim)

    def from_canonical(self, array: jax.Array) -> jax.Array:
        """The model's layout from [rows, heads, dim]."""
        rows = array.shape[0]
        sizes = [rows if axis == self.row_axis else self.shape[axis] for axis in self.order]
        inverse = [self.order.index(axis) for axis in range(len(self.order))]
        return array.reshape(sizes).transpose(inverse)


@dataclass(frozen=True, kw_only=True)
class Recognised:
    """A site's spec and the layouts of q, k, v and the output."""

    site: Site
    spec: AttentionSpec
    q: Layout
    k: Layout
    v: Layout
    out: Layout


def recognise(analysis: Analysis, site: Site, *, max_rows: int) -> Recognised:
    """Describe a site as softmax attention, or refuse it.

    Args:
      max_rows: the longest sequence; the window is read up to this distance.

    Raises:
      UnsupportedSiteError: not softmax attention over one q, k, v with an exactly causal mask.
    """
    shape = _read_layouts(analysis, site)
    probe = _Probe(analysis, shape, max_rows)
    spec = probe.spec()
    return Recognised(site=site, spec=spec, q=shape.q, k=shape.k, v=shape.v, out=shape.out)


@dataclass(frozen=True, kw_only=True)
class _Layouts:
    site: Site
    q: Layout
    k: Layout
    v: Layout
    out: Layout


def _refuse(site: Site, why: str) -> UnsupportedSiteError:
    return UnsupportedSiteError(
        f"the attention opened at {site.opening.where} {why}; allowed: causal softmax attention over one q, k and v, "
        "with an optional sliding window and soft cap"
    )


def _read_layouts(analysis: Analysis, site: Site) -> _Layouts:
    opening, closing = site.opening, site.equations[-1]
    if len(site.outputs) != 1 or site.outputs[0] not in closing.outputs:
        raise _refuse(site, f"has {len(site.outputs)} outputs {[v.shape for v in site.outputs]}")
    if opening.primitive != "dot_general" or closing.primitive != "dot_general":
        raise _refuse(site, f"begins with '{opening.primitive}' and ends with '{closing.primitive}'")
    q_at = 0 if "query" in operand_ends(analysis, opening, 0, site.ends) else 1
    v_at = next((i for i, value in enumerate(closing.inputs) if not analysis.facts[value].sides), None)
    if v_at is None:
        raise _refuse(site, "closes with a product of two scores")
    q, k, v = opening.inputs[q_at], opening.inputs[1 - q_at], closing.inputs[v_at]
    expected: set[tuple[Value, End]] = {(q, "query"), (k, "key"), (v, "key")}
    if set(site.operands) != expected:
        raise _refuse(site, f"takes {[(value.shape, end) for value, end in site.operands]} instead of one q, k and v")
    roles = _Roles(analysis, site)
    return _Layouts(
        site=site,
        q=roles.opening_layout(q_at),
        k=roles.opening_layout(1 - q_at),
        v=roles.v_layout(v_at),
        out=roles.out_layout(v_at),
    )


class _Roles:
    """Follows the axes of the scores from the product that opens the site to the one that closes it.

    A role is ("head", i), ("group", i), ("query", 0) or ("key", 0).
    """

    def __init__(self, analysis: Analysis, site: Site) -> None:
        self.analysis, self.site = analysis, site
        self.opening, self.closing = site.opening, site.equations[-1]
        self.opening_map = axis_map(self.opening)
        self.closing_map = axis_map(self.closing)
        self.scores: dict[Value, tuple[tuple[str, int] | None, ...]] = {self.opening.outputs[0]: self._opening_roles()}
        for eqn in site.equations:
            self._follow(eqn)

    def _opening_roles(self) -> tuple[tuple[str, int] | None, ...]:
        score = self.opening.outputs[0]
        both = set(self.opening_map.to_output[0]) & set(self.opening_map.to_output[1])
        roles: list[tuple[str, int] | None] = []
        for axis, end in enumerate(self.site.ends[score]):
            if end is not None:
                roles.append((end, 0))
            else:
                roles.append(("head" if axis in both else "group", axis))
        return tuple(roles)

    def _follow(self, eqn: Equation) -> None:
        if eqn.outputs[0] in self.scores or not self.analysis.facts[eqn.outputs[0]].sides:
            return
        roles: list[tuple[str, int] | None] = [None] * len(eqn.outputs[0].shape)
        for value, targets in zip(eqn.inputs, axis_map(eqn).to_output, strict=True):
            for role, out in zip(self.scores.get(value, ()), targets, strict=False):
                if out is not None:
                    roles[out] = role
        self.scores[eqn.outputs[0]] = tuple(roles)

    def opening_layout(self, position: int) -> Layout:
        value, targets = self.opening.inputs[position], self.opening_map.to_output[position]
        roles = self.scores[self.opening.outputs[0]]
        axes = {axis: roles[out] for axis, out in enumerate(targets) if out is not None}
        dims = [pair[position] for pair in self.opening_map.paired]
        return self._layout(value, axes, dims, keys=("key", 0) in axes.values())

    def v_layout(self, v_at: int) -> Layout:
        value, targets = self.closing.inputs[v_at], self.closing_map.to_output[v_at]
        scores, score_targets = self.closing.inputs[1 - v_at], self.closing_map.to_output[1 - v_at]
        by_output = dict(zip(score_targets, self.scores[scores], strict=True))
        pairs = [(pair[v_at], pair[1 - v_at]) for pair in self.closing_map.paired]
        axes: dict[int, tuple[str, int] | None] = {}
        for axis, other in pairs:
            axes[axis] = self.scores[scores][other]
        dims = []
        for axis, out in enumerate(targets):
            if out is not None and out in by_output:
                axes[axis] = by_output[out]
            elif out is not None:
                dims.append(axis)
        return self._layout(value, axes, dims, keys=True)

    def out_layout(self, v_at: int) -> Layout:
        scores, score_targets = self.closing.inputs[1 - v_at], self.closing_map.to_output[1 - v_at]
        axes = {out: role for role, out in zip(self.scores[scores], score_targets, strict=True) if out is not None}
        dims = [out for out in self.closing_map.to_output[v_at] if out is not None and out not in axes]
        return self._layout(self.closing.outputs[0], axes, dims, keys=False)

    def _layout(
        self, value: Value, axes: Mapping[int, tuple[str, int] | None], dims: list[int], *, keys: bool
    ) -> Layout:
        end = "key" if keys else "query"
        rows = [axis for axis, role in axes.items() if role == (end, 0)]
        heads = sorted((axis for axis, role in axes.items() if role and role[0] == "head"), key=lambda a: axes[a] or "")
        groups = sorted(
            (axis for axis, role in axes.items() if role and role[0] == "group"), key=lambda a: axes[a] or ""
        )
        stray = [axis for axis in groups if value.shape[axis] != 1] if keys else []
        used = [*rows, *heads, *groups, *dims]
        if (
            len(rows) != 1
            or stray
            or any(value.shape[axis] != 1 for axis in range(len(value.shape)) if axis not in used)
        ):
            raise _refuse(self.site, f"has an operand {value.shape} that is not [rows, heads, dim] in some order")
        ones = [axis for axis in range(len(value.shape)) if axis not in used]
        return Layout(
            shape=value.shape,
            order=(*used, *ones),
            row_axis=rows[0],
            heads=math.prod(value.shape[axis] for axis in (*heads, *groups)),
            dim=math.prod(value.shape[axis] for axis in dims),
        )


class _Probe:
    """Runs the site's own subgraph on chosen q, k, v and positions."""

    def __init__(self, analysis: Analysis, layouts: _Layouts, max_rows: int) -> None:
        self.layouts, self.site, self.max_rows = layouts, layouts.site, max_rows
        self.function = jax.jit(SiteFunction(analysis=analysis, site=layouts.site, widened=True))
        self.heads, self.kv_heads = layouts.q.heads, layouts.k.heads
        self.dim, self.v_dim = layouts.q.dim, layouts.v.dim
        if layouts.v.heads != self.kv_heads or self.heads % self.kv_heads or layouts.k.dim != self.dim:
            raise _refuse(
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
                raise _refuse(
                    self.site,
                    f"is not exactly causal: position {q_at} gives weight {weights[~visible].max():.3g} to the key at "
                    f"position {q_at - seen[0]}",
                )
            if not np.allclose(weights[visible], 1 / visible.sum(), rtol=1e-5, atol=0):
                raise _refuse(self.site, "adds a bias by position or a sink to the scores, or is no softmax")

    def scale_and_cap(self) -> tuple[float, float | None]:
        """Log-odds of two keys as a function of q . k."""
        position = min(9, self.max_rows - 1)

        def score(x: float) -> float:
            weights = self.weights(np.array([0.0, x]), position, np.array([position, position - 1]))
            odds = np.log(weights[1] / weights[0])
            if np.ptp(odds) > 1e-5 * max(1.0, abs(odds[0])):
                raise _refuse(self.site, f"scales its heads differently: {odds}")
            return float(odds[0])

        small = score(0.25) / 0.25
        if small <= 0:
            raise _refuse(self.site, f"has a scale of {small:.3g}")
        probe = 4.0 / small
        linear = score(probe) / probe
        if math.isclose(linear, small, rel_tol=1e-4):
            return self._snap(linear), None
        return self._fit_cap(score, small)

    def _fit_cap(self, score: Callable[[float], float], small: float) -> tuple[float, float | None]:
        # At x -> infinity the log-odds tend to the cap; beyond about 80 the other weight underflows.
        limit = score(1e6 / small)
        if not math.isfinite(limit) or not 0 < limit < 80:
            raise _refuse(self.site, "transforms its scores in an unknown way")
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
            raise _refuse(self.site, f"differs from {spec} by {error:.3g} on random input")


def reference_attention(
    spec: AttentionSpec, q: Array, k: Array, v: Array, query_positions: Array, key_positions: Array
) -> Array:
    """The definition of `AttentionSpec` in NumPy: q [queries, heads, dim], k and v [keys, kv_heads, dim]."""
    group = spec.num_heads // spec.num_kv_heads
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = spec.scale * np.einsum("qhd,khd->hqk", q, k)
    if spec.softcap is not None:
        scores = spec.softcap * np.tanh(scores / spec.softcap)
    distance = query_positions[:, None] - key_positions[None, :]
    visible = (distance >= 0) & (distance < (spec.window or np.inf))
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(axis=-1, keepdims=True), v)


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
