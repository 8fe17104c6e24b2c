"""How q, k, v and the output of a site hold rows, heads and features: read off the site's two products."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax

from partition.analysis import Analysis
from partition.errors import UnsupportedSiteError
from partition.jaxpr import Equation, Value
from partition.rules import axis_map
from partition.sites import End, Site, operand_ends


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
class Layouts:
    """Layouts of a site's q, k, v and output."""

    q: Layout
    k: Layout
    v: Layout
    out: Layout


def refuse(site: Site, why: str) -> UnsupportedSiteError:
    """The error that names a site, what is wrong with it and what is allowed."""
    return UnsupportedSiteError(
        f"the attention opened at {site.opening.where} {why}; allowed: causal softmax attention over one q, k and v, "
        "with an optional sliding window and soft cap"
    )


def read_layouts(analysis: Analysis, site: Site) -> Layouts:
    """Which axes of q, k, v and the output are rows, heads and features.

    Raises:
      UnsupportedSiteError: the site is not two products around something, with one q, k and v and one output.
    """
    opening, closing = site.opening, site.equations[-1]
    if len(site.outputs) != 1 or site.outputs[0] not in closing.outputs:
        raise refuse(site, f"has {len(site.outputs)} outputs {[v.shape for v in site.outputs]}")
    if opening.primitive != "dot_general" or closing.primitive != "dot_general":
        raise refuse(site, f"begins with '{opening.primitive}' and ends with '{closing.primitive}'")
    q_at = 0 if "query" in operand_ends(analysis, opening, 0, site.ends) else 1
    v_at = next((i for i, value in enumerate(closing.inputs) if not analysis.facts[value].sides), None)
    if v_at is None:
        raise refuse(site, "closes with a product of two scores")
    q, k, v = opening.inputs[q_at], opening.inputs[1 - q_at], closing.inputs[v_at]
    expected: set[tuple[Value, End]] = {(q, "query"), (k, "key"), (v, "key")}
    if set(site.operands) != expected:
        raise refuse(site, f"takes {[(value.shape, end) for value, end in site.operands]} instead of one q, k and v")
    roles = _Roles(analysis, site)
    return Layouts(
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
            raise refuse(self.site, f"has an operand {value.shape} that is not [rows, heads, dim] in some order")
        ones = [axis for axis in range(len(value.shape)) if axis not in used]
        return Layout(
            shape=value.shape,
            order=(*used, *ones),
            row_axis=rows[0],
            heads=math.prod(value.shape[axis] for axis in (*heads, *groups)),
            dim=math.prod(value.shape[axis] for axis in dims),
        )
