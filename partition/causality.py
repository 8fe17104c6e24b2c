"""Is a site exactly causal? Established by running its own subgraph, whatever it computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partition.attention_spec import Array
from partition.errors import UnsupportedSiteError
from partition.planned_site import PlannedSite

_KEYS = 32


def refuse(site: PlannedSite, why: str) -> UnsupportedSiteError:
    """The error that names a site, what is wrong with it and what is allowed."""
    return UnsupportedSiteError(
        f"the attention opened at {site.site.opening.where} {why}; allowed: attention in which a token sees itself and "
        "tokens before it, and what it does not see has a weight of exactly 0 whatever the scores are"
    )


def check_causal(site: PlannedSite, *, max_rows: int) -> None:
    """Later keys change nothing: the derivative by them is exactly 0, and so is the effect of other keys, or of none.

    The site runs on random numbers at several positions up to max_rows - 1: on a run of neighbours at the beginning,
    and near and far from two later queries. Flags (operands of no float type) take both values, but the first token
    of all may need one of them: a padding token that sees nothing is not asked about.

    Raises:
      UnsupportedSiteError: a query depends on a later key, or gets no finite output.
    """
    probe = _Probe(site)
    start = np.arange(min(_KEYS, max_rows))
    if all(probe.leak(0, start, seed, own_flag=flag) for seed, flag in enumerate((True, False))):
        raise refuse(site, f"is not exactly causal: position 0 {probe.last_leak}")
    for query, keys in (
        (len(start) // 2 - 3, start),
        (max_rows // 2, _around(max_rows // 2, max_rows)),
        (max_rows - 1, _around(max_rows - 1, max_rows)),
    ):
        for seed, flag in enumerate((True, False)):
            if probe.leak(query, keys, seed, own_flag=flag):
                raise refuse(site, f"is not exactly causal: position {query} {probe.last_leak}")
    if probe.counts(len(start) // 2 - 3, start):
        raise refuse(site, "is not exactly causal: an output depends on the number of later keys")


def _around(query: int, max_rows: int) -> Array:
    """_KEYS positions (fewer in a short model) near and far from a query, itself and later ones among them."""
    near = np.arange(query - 6, query + 6)
    far = np.random.default_rng(1).permutation(max_rows)
    found = [int(key) for key in (*near, *far) if 0 <= key < max_rows]
    return np.sort(list(dict.fromkeys(found))[:_KEYS])


class _Probe:
    def __init__(self, site: PlannedSite) -> None:
        self.site = site
        self.random = np.random.default_rng(0)
        self.weights = [jnp.asarray(self.draw((), value.shape, value.dtype)) for value in site.weights]
        self.derivative = jax.jit(self._derivative)
        self.last_leak = ""

    def draw(self, rows: tuple[int, ...], inner: Sequence[int], dtype: Any) -> Array:
        shape = (*rows, *inner)
        is_float = jnp.issubdtype(dtype, jnp.floating)
        return (self.random.normal(size=shape) if is_float else self.random.integers(0, 2, size=shape)).astype(dtype)

    def leak(self, query: int, keys: Array, seed: int, *, own_flag: bool) -> bool:
        """Does the query depend on keys after it? Says how in `last_leak`."""
        self.random = np.random.default_rng(seed)
        first = self.operands(query, keys, own_flag)
        later = np.flatnonzero(keys > query)
        outputs, slopes = self.derivative(first, np.array([query]), keys)
        if not all(np.isfinite(np.asarray(out, np.float32)).all() for out in outputs):
            self.last_leak = "gets no finite output"
            return True
        if not len(later):
            return False
        for port, slope in zip(self.site.inputs, slopes, strict=True):
            moved = np.nan_to_num(np.asarray(slope, np.float32)[later]) if port.is_cached else np.zeros(0)
            if moved.any():
                key = keys[later[np.argwhere(moved)[0][0]]]
                self.last_leak = f"depends on '{port.name}' of position {key}"
                return True
        return self.changes(outputs, first, query, keys, later)

    def changes(self, outputs: Any, first: list[Array], query: int, keys: Array, later: Array) -> bool:
        """Do other later keys change the outputs?"""
        others = [array.copy() for array in first]
        for port, array in zip(self.site.inputs, others, strict=True):
            if port.is_cached:
                array[later] = self.draw((len(later),), port.layout.inner, array.dtype)
        changed, _ = self.derivative(others, np.array([query]), keys)
        self.last_leak = "depends on the keys after it"
        return any(not np.array_equal(a, b) for a, b in zip(outputs, changed, strict=True))

    def counts(self, query: int, keys: Array) -> bool:
        """Does the query's output depend on whether there are later keys?"""
        operands, kept = self.operands(query, keys, own_flag=True), keys <= query
        fewer = [
            array[kept] if port.is_cached else array for port, array in zip(self.site.inputs, operands, strict=True)
        ]
        outputs, _ = self.derivative(operands, np.array([query]), keys)
        alone, _ = self.derivative(fewer, np.array([query]), keys[kept])
        return not all(np.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(outputs, alone, strict=True))

    def operands(self, query: int, keys: Array, own_flag: bool) -> list[Array]:
        """Random rows; flags of the query's own row are `own_flag`, and a value on both sides is one value there."""
        own = int(np.flatnonzero(keys == query)[0])
        found, on_key_side = [], {}
        for port in sorted(self.site.inputs, key=lambda port: not port.is_cached):
            rows = len(keys) if port.is_cached else 1
            array = self.draw((rows,), port.layout.inner, port.value.dtype)
            if not jnp.issubdtype(array.dtype, jnp.floating):
                array[own if port.is_cached else 0] = own_flag
            if port.is_cached:
                on_key_side[port.value] = array
            elif port.value in on_key_side:
                array = on_key_side[port.value][own : own + 1]
            found.append((port, array))
        by_port = dict(found)
        return [by_port[port] for port in self.site.inputs]

    def _derivative(self, operands: list[jax.Array], queries: jax.Array, keys: jax.Array) -> Any:
        """Outputs, and the derivative of a random sum of them by each operand."""

        def run(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            return self.site.attend(arrays, queries, keys, self.weights)

        outputs, pull = jax.vjp(run, *operands)
        draw = np.random.default_rng(2)
        slopes = pull(tuple(_cotangent(out, draw.normal(size=out.shape)) for out in outputs))
        shaped = [
            jnp.zeros(array.shape, jnp.float32) if slope.dtype == jax.dtypes.float0 else slope
            for slope, array in zip(slopes, operands, strict=True)
        ]
        return outputs, shaped


def _cotangent(out: jax.Array, drawn: Array) -> Any:
    """Counts, of no float type, have no derivative."""
    if jnp.issubdtype(out.dtype, jnp.floating):
        return jnp.asarray(drawn, out.dtype)
    return np.zeros(out.shape, jax.dtypes.float0)
