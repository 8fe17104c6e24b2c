"""KV heads to workers: which heads of each site a worker gets, and what describes them to it.

The heads of a site are independent of each other, so several workers compute parts of it with the bits of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hetero_jax.description import Description, natural


class HeadSlice(NamedTuple):
    """KV heads of a site, and the query heads that read them."""

    kv: slice
    q: slice


def slice_heads(site: Description, index: int, count: int) -> HeadSlice:
    """The part of a described site that worker `index` of `count` gets: no two parts differ by more than one KV head.

    Where they do not divide evenly, pools take turns at who has one more, so that all pools together are even. Sites
    that share a pool are cut alike.
    """
    kv_heads, pool = natural(site, "num_kv_heads"), natural(site, "pool", least=0)
    each, over = divmod(kv_heads, count)
    sizes = [each + ((worker - pool * over) % count < over) for worker in range(count)]
    first = sum(sizes[:index])
    group = natural(site, "num_heads") // kv_heads
    stop = first + sizes[index]
    return HeadSlice(kv=slice(first, stop), q=slice(first * group, stop * group))


def describe_slice(site: Description, heads: HeadSlice) -> Description:
    """What describes some heads of a site alone."""
    of_each_head = {name: site.get(name) for name in ("alibi_slopes", "sink_scores")}
    return {
        **site,
        "num_kv_heads": heads.kv.stop - heads.kv.start,
        "num_heads": heads.q.stop - heads.q.start,
        **{name: " ".join(text.split()[heads.q]) for name, text in of_each_head.items() if isinstance(text, str)},
    }


def most_slices(sites: Sequence[Description]) -> int:
    """Workers that can have some KV heads of every site."""
    return min(natural(site, "num_kv_heads") for site in sites)
