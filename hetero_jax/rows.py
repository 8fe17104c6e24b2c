"""Packs the chunks of a microbatch into the arrays that both tiers take. Shapes come from small sets of buckets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hetero_jax.attention_layout import NOWHERE, TILE_ROWS, GroupedLayout, slots_of
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
    layout: GroupedLayout
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
    lengths, begins = np.array([(chunk.length, chunk.start) for chunk in chunks], np.int32).T
    firsts = np.cumsum(lengths, dtype=np.int32) - lengths
    tokens = [token for chunk in chunks for token in known_tokens(chunk.seq_id, chunk.start, chunk.length)]
    positions = np.arange(len(tokens), dtype=np.int32) + np.repeat(begins - firsts, lengths)
    samplers = [index for index, chunk in enumerate(chunks) if chunk.samples]
    rows = bucket(len(tokens), _SMALLEST_BUCKET)
    return PackedRows(
        tokens=_filled(tokens, rows, 0),
        positions=_filled(positions, rows, 0),
        layout=_layout(chunks, firsts, lengths, positions, page_size),
        sampled=_filled((firsts + lengths - 1)[samplers], bucket(len(samplers), _SMALLEST_BUCKET), 0),
        samplers=tuple(chunks[index].seq_id for index in samplers),
        pools=tuple(chunk.pool for chunk in chunks),
        num_rows=batch.num_rows,
    )


def _layout(
    chunks: Sequence[Chunk], firsts: np.ndarray, lengths: np.ndarray, positions: np.ndarray, page_size: int
) -> GroupedLayout:
    # One more than needed, so that the last sequence is padding for `decode` and the tiles to point at.
    count = bucket(len(chunks) + 1, 8)
    tables = [np.array(chunk.page_tables, np.int32) for chunk in chunks]  # each [G, P] of its own
    page_tables = np.zeros((len(tables[0]), count, bucket(max(table.shape[1] for table in tables), 4)), np.int32)
    for index, table in enumerate(tables):
        page_tables[:, index, : table.shape[1]] = table
    slots = slots_of(page_tables, positions, page_size, np.repeat(np.arange(len(chunks)), lengths))
    return _with_tiles(
        page_tables,
        _filled(firsts, count, 0),
        _filled(lengths, count, 0),
        _filled(positions[firsts + lengths - 1] + 1, count, 0),
        _padded_slots(slots),
    )


def select(layout: GroupedLayout, chosen: np.ndarray) -> tuple[np.ndarray, GroupedLayout]:
    """Rows of some sequences, and a layout of these alone.

    Args:
      chosen: [m] sequences of the layout, all in one pool.
    Returns:
      [n] rows of the call, and the layout of a call of bucket(n) rows.
    """
    count = bucket(len(chosen) + 1, 8)
    groups, _, width = layout.page_tables.shape
    page_tables = np.zeros((groups, count, width), np.int32)
    page_tables[:, : len(chosen)] = layout.page_tables[:, chosen]
    lengths = layout.num_rows[chosen]
    firsts = np.cumsum(lengths, dtype=np.int32) - lengths
    rows = np.arange(lengths.sum()) + np.repeat(layout.first_row[chosen] - firsts, lengths)
    return rows, _with_tiles(
        page_tables,
        _filled(firsts, count, 0),
        _filled(lengths, count, 0),
        _filled(layout.context[chosen], count, 0),
        _padded_slots(layout.row_slots[:, rows]),
    )


def _with_tiles(
    page_tables: np.ndarray, first_row: np.ndarray, num_rows: np.ndarray, context: np.ndarray, slots: np.ndarray
) -> GroupedLayout:
    several, decode = np.flatnonzero(num_rows > 1).tolist(), np.flatnonzero(num_rows == 1)
    tiles = [(index, offset) for index in several for offset in range(0, num_rows[index], TILE_ROWS)]
    return GroupedLayout(
        page_tables=page_tables,
        first_row=first_row,
        num_rows=num_rows,
        context=context,
        row_slots=slots,
        decode=_filled(decode, bucket(len(decode)), len(num_rows) - 1),
        tile_sequence=_filled([index for index, _ in tiles], bucket(len(tiles)), len(num_rows) - 1),
        tile_offset=_filled([offset for _, offset in tiles], bucket(len(tiles)), 0),
    )


def _padded_slots(slots: np.ndarray) -> np.ndarray:
    """[G, R] of slots [G, n]."""
    return np.stack([_filled(each, bucket(len(each), _SMALLEST_BUCKET), NOWHERE) for each in slots])


def _filled(values: Sequence[int] | np.ndarray, size: int, filler: int) -> np.ndarray:
    """[size] int32: these, and then `filler`."""
    found = np.full(size, filler, np.int32)
    found[: len(values)] = values
    return found
