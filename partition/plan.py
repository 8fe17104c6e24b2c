"""The plan: stages, sites and weights of a partitioned model. Frozen and printable; knows no devices."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from partition.analysis import Analysis, analyse
from partition.attention_spec import AttentionSpec
from partition.cost import flops
from partition.cut import Stage, constants_of, cut
from partition.draw import picture
from partition.forward import Forward, as_forward
from partition.jaxpr import Value
from partition.planned_site import PlannedSite
from partition.recognise import plan_site
from partition.sites import Site, find_sites
from partition.structure import closure, row_bytes, size_bytes
from partition.trace import check_any_rows, trace_causal

if TYPE_CHECKING:
    from partition.verify import Verification


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Plan:
    """Stage 0, site 0, stage 1, site 1 ... stage L: a cached decoder derived from a plain causal forward pass.

    stages: L + 1 dense stages. sites: L attention sites.
    max_rows: the longest sequence (position tables have that many rows).
    forward: the plain forward pass and its parameters.
    """

    forward: Forward
    analysis: Analysis
    stages: tuple[Stage, ...]
    sites: tuple[PlannedSite, ...]
    max_rows: int

    def of_shapes(self) -> Plan:
        """The same plan, which keeps no parameters alive."""
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self.forward.params)
        return replace(self, forward=replace(self.forward, params=shapes))

    def verify(self, params: Any, tokens: Sequence[int], *, seed: int = 0) -> Verification:
        """Decode `tokens` with a cache beside the plain model and report the largest difference of each stage and site.

        Args:
          params: the pytree that the plan was made from, with arrays.
          tokens: [T] ids, split at random (by `seed`) into prefill chunks and single rows.
        """
        from partition.verify import verify  # which needs plans

        return verify(self, params, tokens, seed=seed)

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Write an SVG picture of stages and sites, with the bytes of a row that pass between them."""
        Path(path).write_text(picture(self), encoding="utf-8")

    @property
    def stage_leaves(self) -> frozenset[int]:
        """Which leaves of the parameters the stages read, by their numbers in `jax.tree.leaves`."""
        return self._leaves_of(value for stage in self.stages for value in stage.externals)

    @property
    def site_leaves(self) -> frozenset[int]:
        """Which leaves of the parameters the sites read."""
        return self._leaves_of(value for site in self.sites for value in site.weights)

    def _leaves_of(self, values: Iterable[Value]) -> frozenset[int]:
        values = set(values)
        made_from = closure(values, self.analysis.made_by, lambda _: True)
        read = values.union(*(eqn.inputs for eqn in made_from))
        return frozenset(number for number, leaf in enumerate(self.analysis.traced.weights) if leaf in read)

    @property
    def constants(self) -> Mapping[Value, Any]:
        """Captured arrays by value."""
        return constants_of(self.analysis)

    @property
    def vocab_size(self) -> int:
        """Length of a row of logits."""
        return self.analysis.traced.program.outputs[0].shape[-1]

    @property
    def num_dense_executables(self) -> int:
        """Dense executables per bucket of rows: structurally equal stages share one."""
        return len({stage.key for stage in self.stages})

    @property
    def num_attention_executables(self) -> int:
        """Attention executables per shape of call."""
        return len({(site.key, site.shares_cache) for site in self.sites})

    @property
    def window(self) -> int | None:
        """Positions, its own included, that a row needs of its sequence at any site; None: all."""
        windows = [site.spec.window if site.spec else None for site in self.sites]
        return max((w for w in windows if w), default=None) if all(windows) else None

    def row_bytes(self, value: Value) -> int:
        """Bytes of one row of a token value."""
        return row_bytes(value, self.analysis.traced.rows)

    def weight_bytes(self, stage: Stage) -> int:
        """Bytes of what a stage reads besides rows, as traced (tables at the traced number of rows)."""
        return sum(size_bytes(value) for value in stage.externals)

    def carried_bytes(self, stage: Stage) -> int:
        """Bytes per row that stay alive on tier 1 across the site behind a stage."""
        return sum(self.row_bytes(value) for value in stage.carried)

    def repeated_flops(self, stage: Stage) -> int:
        """FLOPs per row of what a stage computes again rather than have it carried; a lookup counts as its traffic."""
        return sum(flops(eqn) for eqn in stage.repeated) // self.analysis.traced.rows

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes cached per token over all sites, for elements of `itemsize` bytes."""
        kept = {site.cache_key: site.cached for site in self.sites}
        return sum(math.prod(port.layout.inner) for cached in kept.values() for port in cached) * itemsize

    def __repr__(self) -> str:
        return "\n".join([self.headline, *(f"  {name}: {text}" for name, text in self.parts())])

    @property
    def headline(self) -> str:
        """How many stages, sites and executables."""
        equations = len(self.analysis.traced.program.equations)
        executables = f"{self.num_dense_executables} dense + {self.num_attention_executables} attention executables"
        return (
            f"Plan: {len(self.stages)} dense stages and {len(self.sites)} attention sites from {equations} equations; "
            f"{executables} per bucket of rows"
        )

    def parts(self) -> list[tuple[str, str]]:
        """(name, description) of stages and sites in turn; runs of equal ones are one."""
        found = []
        for _, group in itertools.groupby(self.stages, key=self._look):
            same = list(group)
            first, last = same[0].index, same[-1].index
            numbers = f" {first}" if first == last else f"s {first}..{last}"
            found.append((f"stage{numbers}", self._describe(same[0])))
            if first < len(self.sites):
                found.append((f"site{numbers}", _describe_site(self.sites[first])))
        return found

    def _look(self, stage: Stage) -> Any:
        """What is equal for stages that are described as one."""
        return stage.key, self._describe(stage), self._site_look(stage)

    def _site_look(self, stage: Stage) -> Any:
        site = self.sites[stage.index] if stage.index < len(self.sites) else None
        return None if site is None else (site.key, site.shares_cache)

    def _describe(self, stage: Stage) -> str:
        sent = {send.port.name: self.row_bytes(send.value) for send in stage.sends}
        down = ", ".join(f"{role} {count}" for role, count in sent.items())
        parts = [f"{len(stage.equations)} equations", f"weights {self.weight_bytes(stage) / 1e6:.2f} MB"]
        if stage.repeated:
            parts.append(f"recomputes {self._describe_repeated(stage)}")
        if stage.index < len(self.sites):
            parts.append(f"keeps {self.carried_bytes(stage)} B/row")
        else:
            parts.append(f"gives {sum(self.row_bytes(value) for value in stage.writes)} B/row of logits")
        if down:
            queries = [send.value for send in stage.sends if not send.port.is_cached]
            ready = f"; q after {stage.equations_until(queries)} equations" if queries else ""
            parts.append(f"sends {sum(sent.values())} B/row ({down}{ready})")
        return ", ".join(parts)

    def _describe_repeated(self, stage: Stage) -> str:
        lines = list(dict.fromkeys(_file_and_line(eqn.where) for eqn in stage.repeated))
        more = f" and {len(lines) - 3} more lines" if len(lines) > 3 else ""
        where = ", ".join(lines[:3]) + more
        return f"{len(stage.repeated)} equations ({self.repeated_flops(stage)} FLOPs/row) of {where}"


def _file_and_line(where: str) -> str:
    """'folder/file.py:7:21 (function)' without folder and column."""
    place, space, function = where.partition(" ")
    return re.sub(r"^(.*/)?([^/:]*:\d+)(:\d+)?$", r"\2", place) + space + function


def _describe_site(site: PlannedSite) -> str:
    kept = "; keys and values are those of an earlier site" if site.shares_cache else ""
    if site.spec is not None:
        return _describe_spec(site.spec) + kept
    cached = ", ".join(f"{port.name} {list(port.layout.inner)}" for port in site.cached)
    equations = f"its own {len(site.site.equations)} equations ({site.unrecognised})"
    return f"causal attention by {equations}; caches {cached}{kept}"


def _describe_spec(spec: AttentionSpec) -> str:
    parts = [f"{spec.num_heads} heads over {spec.num_kv_heads} kv heads of {spec.head_dim}"]
    if spec.v_head_dim != spec.head_dim:
        parts.append(f"values of {spec.v_head_dim}")
    parts.append(f"scale {spec.scale:.6g}")
    parts.append("full causal" if spec.window is None else f"sliding window {spec.window}")
    if spec.softcap is not None:
        parts.append(f"soft cap {spec.softcap:g}")
    if spec.alibi_slopes is not None:
        parts.append("linear biases (ALiBi)")
    if spec.has_sinks:
        parts.append("a sink per head")
    return ", ".join(parts)


def partition(model: Any, params: Any = None, *, max_rows: int = 4096) -> Plan:
    """Find the attention of a causal language model, prove the rest token-wise, and cut there.

    Args:
      model: a plain forward pass over tokens [1, T] int32 that returns logits [1, T, vocab], or those of the last token
        alone, [1, 1, vocab] or [1, vocab]: a function `fn(params, tokens[, positions][, mask])`, an `nnx.Module`, or a
        linen module bound to its variables, called as `module(tokens[, positions][, mask])`. positions and mask are
        [1, T] int32; the mask is all ones.
      params: of a function: pytree of arrays or `jax.ShapeDtypeStruct`; only shapes and dtypes are read here.
      max_rows: the longest sequence that will be asked for, in tokens.

    Raises:
      PartitionError: what cannot be partitioned, with the primitive and the model's source line.
    """
    forward = as_forward(model, params)
    traced = trace_causal(forward, max_rows=max_rows)
    analysis = analyse(traced)
    check_any_rows(traced)
    known: dict[str, PlannedSite] = {}
    sites = tuple(_plan_once(analysis, site, known, max_rows) for site in find_sites(analysis))
    sites = _sharing_caches(sites)
    return Plan(forward=forward, analysis=analysis, stages=cut(analysis, sites), sites=sites, max_rows=max_rows)


def _sharing_caches(sites: Sequence[PlannedSite]) -> tuple[PlannedSite, ...]:
    """Sites with a mark where an earlier one keeps the same values; a site without a query needs rows of its own."""
    kept: set[Any] = set()
    found = []
    for site in sites:
        is_shared = site.cache_key in kept and len(site.cached) < len(site.inputs)
        found.append(replace(site, shares_cache=is_shared))
        kept.add(site.cache_key)
    return tuple(found)


def _plan_once(analysis: Analysis, site: Site, known: dict[str, PlannedSite], max_rows: int) -> PlannedSite:
    """Sites with equal keys compute the same function, so the probes run once for all of them."""
    if site.key not in known:
        known[site.key] = plan_site(analysis, site, max_rows=max_rows)
    return known[site.key].of(site)
