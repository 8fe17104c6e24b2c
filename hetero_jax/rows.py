"""Packs the chunks of a microbatch into the arrays that both tiers take. Shapes come from small sets of buckets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hetero_jax.attention_layout import NOWHERE, TILE_ROWS, AttentionLayout, slots_of
from hetero_jax.scheduler_types import Batch, Chunk

# XLA CPU multiplies a single row by another routine, with other bits; from 2 rows on a row's bits do not depend on
# how many there are (measured for 2 to 512).
_SMALLEST_BUCKET = 8


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """A microbatch as arrays.

    tokens, positions: [R] int32. layout: rows to sequences and pages.
    sampled: [S] int32 rows whose logits are wanted, padded with row 0; sequence i of `samplers` owns sampled[i].
    samplers: sequences that sample, in order.
    pools: of each sequence of the layout, without padding.
    num_rows: rows before padding.
    """

    tokens: np.ndarray
    positions: np.ndarray
    layout: AttentionLayout
    sampled: np.ndarray
    samplers: tuple[int, ...]
    pools: tuple[int, ...]
    num_rows: int


def bucket(count: int, smallest: int = 1) -> int:
    """The least power of two that is at least `count` and `smallest`; 0 stays 0."""
    return 0 if count == 0 else max(smallest, 1 << (count - 1).bit_length())


def pack(batch: Batch, known_tokens: Callable[[int, int, int], Sequence[int]], *, page_size: int) -> PackedRows:
    """Arrays of a microbatch.

    Args:
      known_tokens: (seq_id, start, length) -> the sequence's tokens there.
    """
    chunks = batch.chunks
    rows = bucket(batch.num_rows, _SMALLEST_BUCKET)
    tokens = np.zeros(rows, np.int32)
    positions = np.zeros(rows, np.int32)
    slots = np.full(rows, NOWHERE, np.int32)
    starts = np.cumsum([0, *(chunk.length for chunk in chunks)])
    for chunk, first in zip(chunks, starts, strict=False):
        span = slice(first, first + chunk.length)
        tokens[span] = known_tokens(chunk.seq_id, chunk.start, chunk.length)
        positions[span] = np.arange(chunk.start, chunk.start + chunk.length)
        slots[span] = slots_of(np.asarray(chunk.pages), chunk.start, chunk.length, page_size)
    samplers = [index for index, chunk in enumerate(chunks) if chunk.samples]
    sampled = np.zeros(bucket(len(samplers), _SMALLEST_BUCKET), np.int32)
    sampled[: len(samplers)] = [starts[index + 1] - 1 for index in samplers]
    return PackedRows(
        tokens=tokens,
        positions=positions,
        layout=_layout(chunks, starts, slots),
        sampled=sampled,
        samplers=tuple(chunks[index].seq_id for index in samplers),
        pools=tuple(chunk.pool for chunk in chunks),
        num_rows=batch.num_rows,
    )


def _layout(chunks: Sequence[Chunk], starts: np.ndarray, slots: np.ndarray) -> AttentionLayout:
    # One more than needed, so that the last sequence is padding for `decode` and the tiles to point at.
    count = bucket(len(chunks) + 1, 8)
    page_table = np.zeros((count, bucket(max(len(chunk.pages) for chunk in chunks), 4)), np.int32)
    first_row, num_rows, context = (np.zeros(count, np.int32) for _ in range(3))
    for index, chunk in enumerate(chunks):
        page_table[index, : len(chunk.pages)] = chunk.pages
        first_row[index], num_rows[index] = starts[index], chunk.length
        context[index] = chunk.start + chunk.length
    return _with_tiles(page_table, first_row, num_rows, context, slots)


def select(layout: AttentionLayout, chosen: np.ndarray) -> tuple[np.ndarray, AttentionLayout]:
    """Rows of some sequences, and a layout of these alone.

    Args:
      chosen: [m] sequences of the layout, all in one pool.
    Returns:
      [n] rows of the call, and the layout of a call of bucket(n) rows.
    """
    count = bucket(len(chosen) + 1, 8)
    page_table = np.zeros((count, layout.page_table.shape[1]), np.int32)
    first_row, num_rows, context = (np.zeros(count, np.int32) for _ in range(3))
    here = slice(0, len(chosen))
    page_table[here] = layout.page_table[chosen]
    num_rows[here], context[here] = layout.num_rows[chosen], layout.context[chosen]
    first_row[here] = np.cumsum(num_rows[here]) - num_rows[here]
    rows = np.concatenate([np.arange(0), *(layout.first_row[i] + np.arange(layout.num_rows[i]) for i in chosen)])
    slots = np.full(bucket(len(rows), _SMALLEST_BUCKET), NOWHERE, np.int32)
    slots[: len(rows)] = layout.row_slot[rows]
    return rows, _with_tiles(page_table, first_row, num_rows, context, slots)


def _with_tiles(
    page_table: np.ndarray, first_row: np.ndarray, num_rows: np.ndarray, context: np.ndarray, slots: np.ndarray
) -> AttentionLayout:
    several = np.flatnonzero(num_rows > 1).tolist()
    tiles = [(index, offset) for index in several for offset in range(0, num_rows[index], TILE_ROWS)]
    return AttentionLayout(
        page_table=page_table,
        first_row=first_row,
        num_rows=num_rows,
        context=context,
        row_slot=slots,
        decode=_padded(np.flatnonzero(num_rows == 1), len(num_rows) - 1),
        tile_sequence=_padded([index for index, _ in tiles], len(num_rows) - 1),
        tile_offset=_padded([offset for _, offset in tiles], 0),
    )


def _padded(values: Sequence[int] | np.ndarray, filler: int) -> np.ndarray:
    found = np.full(bucket(len(values)), filler, np.int32)
    found[: len(values)] = values
    return found
