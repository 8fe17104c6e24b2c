"""What an engine asks workers to serve."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hetero_jax.described_site import fingerprint
from hetero_jax.description import Description
from hetero_jax.head_slices import HeadSlice, describe_slice, slice_heads
from transport import Hello


@dataclass(frozen=True, kw_only=True, eq=False)
class Offer:
    """sites, artifacts: as `describe` gives them. most_pages: that the engine could use."""

    sites: Sequence[Description]
    artifacts: tuple[np.ndarray, ...]
    most_pages: int

    def whole(self) -> Hello:
        """To a worker that serves all heads, as the next of its sessions."""
        return self._hello(self.sites)

    def part(self, index: int, count: int) -> Hello:
        """To the worker `index` of `count` that have the KV heads of every site between them."""
        heads = self.heads(index, count)
        return self._hello([describe_slice(site, own) for site, own in zip(self.sites, heads, strict=True)])

    def heads(self, index: int, count: int) -> list[HeadSlice]:
        """Of each site, that such a worker has."""
        return [slice_heads(site, index, count) for site in self.sites]

    def _hello(self, sites: Sequence[Description]) -> Hello:
        return Hello(
            fingerprint=self._fingerprint,  # of the plan, whatever the part: so newer ones take over from older ones
            generation=time.time_ns(),
            page_budget=self.most_pages,
            sites=tuple(sites),
            artifacts=self.artifacts,
        )

    @functools.cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.sites, self.artifacts)
