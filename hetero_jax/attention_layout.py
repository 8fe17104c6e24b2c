"""Which rows of a call belong to which sequence, and where its pages are: what every form of attention takes.

A microbatch has a `GroupedLayout`; each site takes the part of the group that it belongs to.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partition import AttentionSpec

# Rows of one prefill tile; a longer chunk is several tiles, so that a call's shapes stay few.
TILE_ROWS = 64

NOWHERE = np.iinfo(np.int32).max  # a slot past any pool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionLayout:
    """Which rows of a call belong to which sequence, and where its pages are. All int32; the same for a group's sites.

    page_table: [S, P] pages of each sequence in order; padded with page 0.
    first_row: [S] its first row in the call; its rows are consecutive.
    num_rows: [S] its rows in the call; 0 for padding.
    context: [S] positions cached once this call's rows are appended; the last row is at position context - 1.
    row_slot: [R] where each row's key and value go, page * page_size + offset; NOWHERE for padding.
    decode: [A] sequences with one row; padded with S - 1, which is always a padding sequence.
    tile_sequence, tile_offset: [B] sequences with several rows, cut into tiles of TILE_ROWS from row `offset` on.
    """

    page_table: Any
    first_row: Any
    num_rows: Any
    context: Any
    row_slot: Any
    decode: Any
    tile_sequence: Any
    tile_offset: Any


def appending_nothing(
    layout: AttentionLayout, q: jax.Array, spec: AttentionSpec
) -> tuple[AttentionLayout, jax.Array, jax.Array]:
    """The layout of a call of these queries that appends no rows, and its k and v: the pool has them, or will."""
    k, v = (jnp.zeros((0, spec.num_kv_heads, dim), q.dtype) for dim in (spec.head_dim, spec.v_head_dim))
    return dataclasses.replace(layout, row_slot=layout.row_slot[:0]), k, v


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupedLayout:
    """The layouts of all G groups of sites, which differ in pages alone. All int32, in the memory of the host.

    page_tables: [G, S, P], row_slots: [G, R]: of each group, as of AttentionLayout. The others: as there.
    """

    page_tables: np.ndarray
    first_row: np.ndarray
    num_rows: np.ndarray
    context: np.ndarray
    row_slots: np.ndarray
    decode: np.ndarray
    tile_sequence: np.ndarray
    tile_offset: np.ndarray

    @property
    def call_rows(self) -> int:
        """Rows of a call, padding included."""
        return self.row_slots.shape[1]

    def of_group(self, group: int) -> AttentionLayout:
        """What the sites of a group take."""
        return AttentionLayout(
            page_table=self.page_tables[group],
            first_row=self.first_row,
            num_rows=self.num_rows,
            context=self.context,
            row_slot=self.row_slots[group],
            decode=self.decode,
            tile_sequence=self.tile_sequence,
            tile_offset=self.tile_offset,
        )


def slots_of(pages: np.ndarray, positions: np.ndarray, page_size: int, sequences: np.ndarray | int = 0) -> np.ndarray:
    """[..., n] slots of positions [n] of sequences [n], or of one, with page tables `pages` [..., S, P]."""
    return pages[..., sequences, positions // page_size] * page_size + positions % page_size
