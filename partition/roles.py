"""Which elements of a site's operands are which head and feature: read by running the site, whatever its layout.

With a single key an attention's output is that key's value, so values that count 0, 1, 2 ... show where each goes. With
two keys it is a logistic function of the difference of their scores, and its slope by q at q = 0 shows which element of
k each element of q is multiplied with and which outputs that score weighs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from partition.attention_spec import Array

# Where the probes' query and keys are.
POSITION = 3


class FlatSite(Protocol):
    """A site with one q, k, v and output as a function of flat rows of `sizes` elements."""

    sizes: dict[str, int]

    def run(self, q: Array, k: Array, v: Array, query_position: int, key_positions: Array) -> Array:
        """[out elements] of one query [elements] over k and v [keys, elements]."""
        ...

    def slope(self, k: Array, v: Array, cotangent: Array) -> Array:
        """[q elements]: the derivative of the outputs, weighed by `cotangent`, by q at q = 0."""
        ...


class NotRecognisedError(Exception):
    """Why a site is not softmax attention of the kind that kernels know; never leaves the package."""


@dataclass(frozen=True, kw_only=True)
class Roles:
    """q, k, v, out: the order of elements that makes a flat row [heads, dim].

    Query head h reads key-value head h // (heads // kv_heads).
    """

    heads: int
    kv_heads: int
    dim: int
    v_dim: int
    q: Array
    k: Array
    v: Array
    out: Array


def read_roles(site: FlatSite) -> Roles:
    """Heads, dims and element orders of a site.

    Raises:
      NotRecognisedError: the site does not multiply q and k by heads, or does not weigh values.
    """
    source = _value_of_output(site)
    partner, weighed, slope = _products(site)
    groups = [np.flatnonzero(weighed == middle) for middle in np.unique(weighed)]
    head_of_output = _heads_of_outputs(site, groups, slope)
    heads = []
    for head, members in enumerate(groups):
        outputs = np.flatnonzero(head_of_output == head)
        keys, values = np.sort(partner[members]), np.sort(source[outputs])
        by_key = members[np.argsort(partner[members])]
        heads.append((tuple(keys), tuple(values), outputs[np.argsort(source[outputs])], by_key))
    heads.sort(key=lambda head: (head[0], int(head[2][0])))
    return _assemble(heads, site.sizes)


def _value_of_output(site: FlatSite) -> Array:
    """Per element of the output the element of v that it is a weighted sum of."""
    v = np.arange(site.sizes["v"], dtype=np.float32)[None]
    q, k = np.zeros(site.sizes["q"]), np.zeros((1, site.sizes["k"]))
    found = site.run(q, k, v, POSITION, np.array([POSITION]))
    if not np.allclose(found, np.round(found), atol=1e-3) or found.min() < 0 or found.max() > site.sizes["v"] - 1:
        raise NotRecognisedError("its output for a single key is not that key's value")
    return np.round(found).astype(int)


def _products(site: FlatSite) -> tuple[Array, Array, Array]:
    """Per element of q: the element of k it meets, the mean index of the outputs it weighs, and the score's slope."""
    v = np.stack([np.ones(site.sizes["v"]), np.zeros(site.sizes["v"])])

    def slope(first_key: Array, cotangent: Array) -> Array:
        return site.slope(np.stack([first_key, np.zeros(site.sizes["k"])]), v, cotangent)

    ones, count = np.ones(site.sizes["k"]), np.arange(site.sizes["k"])
    every = np.ones(site.sizes["out"])
    plain = slope(ones, every)
    if not np.isfinite(plain).all() or (plain <= 0).any():
        raise NotRecognisedError("its weights do not grow with the product of q and k")
    partner = slope(1.0 + count, every) / plain - 1
    weighed = slope(ones, np.arange(site.sizes["out"])) / plain
    if not np.allclose(partner, np.round(partner), atol=0.1):
        raise NotRecognisedError("elements of q meet more than one element of k")
    return np.round(partner).astype(int), np.round(4 * weighed) / 4, plain


def _heads_of_outputs(site: FlatSite, groups: list[Array], slope: Array) -> Array:
    """Per element of the output the group of q elements (a head) that weighs it: each head gets another score."""
    size, at = site.sizes["out"] / len(groups), np.array([POSITION, POSITION])
    q = np.zeros(site.sizes["q"])
    for members, score in zip(groups, np.linspace(-3, 3, len(groups) + 2)[1:-1], strict=True):
        q[members] = score / len(members) / (4 * slope[members] / size)
    k = np.stack([np.ones(site.sizes["k"]), np.zeros(site.sizes["k"])])
    v = np.stack([np.ones(site.sizes["v"]), np.zeros(site.sizes["v"])])
    weights = site.run(q, k, v, POSITION, at)
    ranks = np.concatenate([[0], np.cumsum(np.diff(np.sort(weights)) > 1e-5)])
    if ranks[-1] + 1 != len(groups):
        raise NotRecognisedError(f"{len(groups)} groups of q elements make {ranks[-1] + 1} different weights")
    found = np.empty(len(weights), int)
    found[np.argsort(weights, kind="stable")] = ranks
    return found


def _assemble(heads: list[tuple[tuple[int, ...], tuple[int, ...], Array, Array]], sizes: dict[str, int]) -> Roles:
    kv_heads = dict.fromkeys((keys, values) for keys, values, _, _ in heads)
    keys = np.array([key for each, _ in kv_heads for key in each])
    values = np.array([value for _, each in kv_heads for value in each])
    dims = {(len(keys), len(values), len(outputs), len(q)) for keys, values, outputs, q in heads}
    per_kv_head = {sum(head[:2] == kv for head in heads) for kv in kv_heads}
    is_whole = np.array_equal(np.sort(keys), np.arange(sizes["k"])) and np.array_equal(
        np.sort(values), np.arange(sizes["v"])
    )
    if len(dims) != 1 or len(per_kv_head) != 1 or not is_whole:
        raise NotRecognisedError("its heads do not share keys and values in groups of equal size")
    return Roles(
        heads=len(heads),
        kv_heads=len(kv_heads),
        dim=len(heads[0][0]),
        v_dim=len(heads[0][1]),
        q=np.concatenate([q for _, _, _, q in heads]),
        k=keys,
        v=values,
        out=np.concatenate([outputs for _, _, outputs, _ in heads]),
    )
