"""Which sites share a page table and which an array of pages, so that those with a window give back what is behind it.

A page of a sequence is free when no row to come sees it. One table for all sites would keep it for the site that sees
farthest. So sites come in *groups* of equal size: those of a group see equally far and share a page table. The pool has
as many arrays as a group has sites, and array j has the pages of the j-th site of every group. A page number, which
stands for that page of all arrays, belongs to one group of one sequence at a time: one allocator serves all groups, and
memory goes where sequences need it. (vLLM's hybrid KV cache manager, `vllm/v1/core/kv_cache_utils.py`.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from partition import PlannedSite

_TABLE_COST = 0.01  # that of one page table more, for the host and on the wire, in parts of all memory


class SitePages(NamedTuple):
    """Where a site keeps its pages; sites that keep the same values have the same place.

    group: whose page table says which pages. pool: number of the array that they are in.
    """

    group: int
    pool: int


@dataclass(frozen=True, kw_only=True)
class PageGroups:
    """windows: positions, its own included, that a row sees at the sites of each group; None: all. sites: of each."""

    windows: tuple[int | None, ...]
    sites: tuple[SitePages, ...]


def group_pages(sites: Sequence[PlannedSite], *, max_model_len: int) -> PageGroups:
    """The groups of a plan's sites.

    Where pages of several sites differ in shape, or a site has no kernel, there is one group, which sees as far as the
    site that sees farthest.

    Args:
      max_model_len: most positions of a sequence.
    """
    sees = _positions_seen(sites, max_model_len)
    if len({_page_shape(site) for site in sites}) > 1:
        sees = dict.fromkeys(sees, max(sees.values()))
    size = _group_size(Counter(sees.values()))
    windows: list[int] = []
    places: dict[Any, SitePages] = {}
    for seen in dict.fromkeys(sees.values()):
        for number, key in enumerate(key for key in sees if sees[key] == seen):
            if number % size == 0:
                windows.append(seen)
            places[key] = SitePages(len(windows) - 1, number % size)
    return PageGroups(
        windows=tuple(seen if seen < max_model_len else None for seen in windows),
        sites=tuple(places[site.cache_key] for site in sites),
    )


def _positions_seen(sites: Sequence[PlannedSite], most: int) -> dict[Any, int]:
    """How far rows see into what is kept, by its key: as far as at any of the sites that share it."""
    found: dict[Any, int] = {}
    for site in sites:
        window = None if site.spec is None else site.spec.window
        found[site.cache_key] = max(found.get(site.cache_key, 0), min(window or most, most))
    return found


def _page_shape(site: PlannedSite) -> Any:
    """Equal for sites that can share an array."""
    return site.cache_key if site.spec is None else site.spec.kept_shape


def _group_size(counts: Mapping[int, int]) -> int:
    """Of so many sites that see so far: with which the longest sequence takes least, page tables included."""

    def cost(size: int) -> float:
        groups = {seen: -(-count // size) for seen, count in counts.items()}
        return sum(seen * size * groups[seen] for seen in groups) * (1 + _TABLE_COST * sum(groups.values()))

    return min(range(1, max(counts.values()) + 1), key=cost)
