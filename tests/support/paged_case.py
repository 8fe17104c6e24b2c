"""Sequences over a paged pool for tests of the attention kernels, and what attention over them should give."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hetero_jax import native_attention as native
from hetero_jax.attention_layout import AttentionLayout, slots_of
from partition import AttentionSpec


class Sequence(NamedTuple):
    """`old` positions come in a call of their own, `new` rows in the call under test."""

    old: int
    new: int


class PagedCase:
    """Keys, values and queries of sequences in shuffled pages; `padding` rows belong to none.

    prefixes: per sequence, an earlier one and how many of its first positions this one begins with, in both `old`.
    share: begin with that one's pages (whole ones) instead of pages of its own that hold the same.
    page_seed: of the page numbers only. order: of the sequences in the call.
    """

    def __init__(
        self,
        sequences: list[Sequence],
        spec: AttentionSpec,
        *,
        prefixes: dict[int, tuple[int, int]] | None = None,
        share: bool = True,
        page_size: int = 16,
        seed: int = 0,
        page_seed: int = 0,
        padding: int = 3,
        order: list[int] | None = None,
        dtype: Any = np.float32,
    ) -> None:
        self.sequences, self.spec, self.page_size, self.padding, self.dtype = sequences, spec, page_size, padding, dtype
        self.order = list(range(len(sequences))) if order is None else order
        draw = np.random.default_rng(seed)

        def rows(count: int, heads: int, dim: int) -> np.ndarray:
            return draw.normal(size=(count, heads, dim)).astype(dtype)

        lengths = [old + new for old, new in sequences]
        self.q = [rows(length, spec.num_heads, spec.head_dim) for length in lengths]
        self.k = [rows(length, spec.num_kv_heads, spec.head_dim) for length in lengths]
        self.v = [rows(length, spec.num_kv_heads, spec.v_head_dim) for length in lengths]
        counts = [-(-length // page_size) for length in lengths]
        self.num_pages = sum(counts) + 2
        pages = np.random.default_rng(page_seed).permutation(self.num_pages).astype(np.int32)
        self.pages = np.split(pages, np.cumsum(counts))[: len(counts)]
        self.held = [0] * len(sequences)  # positions in shared pages
        for index, (parent, length) in (prefixes or {}).items():
            for array in (self.q, self.k, self.v):
                array[index][:length] = array[parent][:length]
            if share:
                whole = length // page_size
                self.pages[index][:whole] = self.pages[parent][:whole]
                self.held[index] = whole * page_size

    def rows(self, *, old: bool) -> tuple[AttentionLayout, np.ndarray, np.ndarray, np.ndarray]:
        """Layout, q, k, v of the first call (old positions) or of the one under test."""
        spec, count = self.spec, len(self.sequences)
        spans = [(h, s.old - h) if old else (s.old, s.new) for s, h in zip(self.sequences, self.held, strict=True)]
        table = np.zeros((count + 1, max([len(p) for p in self.pages], default=0) + 1), np.int32)
        first, num, context = (np.zeros(count + 1, np.int32) for _ in range(3))
        slots, parts = [], []
        for index in self.order:
            start, length = spans[index]
            table[index, : len(self.pages[index])] = self.pages[index]
            first[index], num[index] = sum(len(s) for s in slots), length
            context[index] = start + length
            slots.append(slots_of(self.pages[index][None], np.arange(start, start + length), self.page_size))
            parts.append([a[index][start : start + length] for a in (self.q, self.k, self.v)])
        padding = np.full(self.padding, self.num_pages * self.page_size)
        shapes = [
            (spec.num_heads, spec.head_dim),
            (spec.num_kv_heads, spec.head_dim),
            (spec.num_kv_heads, spec.v_head_dim),
        ]
        filler = [np.ones((self.padding, *shape), self.dtype) for shape in shapes]
        q, k, v = (np.concatenate([*column, fill]) for *column, fill in zip(*parts, filler, strict=True))
        none = np.zeros(0, np.int32)
        layout = AttentionLayout(
            page_table=table, first_row=first, num_rows=num, context=context,
            row_slot=np.concatenate([*slots, padding]).astype(np.int32),
            decode=none, tile_sequence=none, tile_offset=none,
        )  # fmt: skip
        return layout, q, k, v

    def run(
        self, device: Any, *, dtype: Any = "float32", sinks: Any = None, ahead: bool = False, **options: Any
    ) -> tuple[list[np.ndarray], np.ndarray, Any]:
        """Per sequence the output of its new rows in f32; the padding's output; log-sum-exp per sequence.

        ahead: q comes before k and v in the call under test.
        """
        pool = native.make_pool(
            self.spec, num_pages=self.num_pages, page_size=self.page_size, dtype=dtype, device=device
        )
        lse = None
        for old in (True, False):
            layout, q, k, v = self.rows(old=old)
            begun = native.attend_behind(pool, q, layout, self.spec, **options) if ahead and not old else None
            pool, out, lse = native.paged_attention_with_lse(
                pool, q, k, v, layout, self.spec, sinks=sinks, begun=begun, **options
            )
        out, lse = np.asarray(out, np.float32), np.asarray(lse)
        spans = [slice(first, first + new) for first, new in zip(layout.first_row, layout.num_rows, strict=True)][:-1]
        return [out[span] for span in spans], out[out.shape[0] - self.padding :], [lse[span] for span in spans]

    def expected(self, *, sinks: Any = None, round_kv: Any = None) -> list[np.ndarray]:
        """The definition in float64, per sequence: [new, heads, v_dim]."""
        return [self._expected(index, sinks, round_kv)[0] for index in range(len(self.sequences))]

    def expected_lse(self) -> list[np.ndarray]:
        """[new, heads] per sequence in float64."""
        return [self._expected(index, None, None)[1] for index in range(len(self.sequences))]

    def _expected(self, index: int, sinks: Any, round_kv: Any) -> tuple[np.ndarray, np.ndarray]:
        spec, (old, new) = self.spec, self.sequences[index]
        held = round_kv or (lambda rows: rows)
        group = spec.num_heads // spec.num_kv_heads
        q = self.q[index][old:].astype(np.float64)
        k = np.repeat(held(self.k[index]).astype(np.float64), group, axis=1)
        v = np.repeat(held(self.v[index]).astype(np.float64), group, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * np.tanh(scores / spec.softcap)
        distance = np.arange(old, old + new)[:, None] - np.arange(old + new)[None, :]
        if spec.alibi_slopes is not None:
            scores = scores - np.asarray(spec.alibi_slopes)[:, None, None] * distance
        visible = (distance >= 0) & (distance < (spec.window or np.inf))
        scores = np.where(visible, scores, -np.inf)
        if sinks is not None:
            column = np.broadcast_to(np.asarray(sinks, np.float64)[:, None, None], (*scores.shape[:2], 1))
            scores = np.concatenate([scores, column], axis=-1)
        top = scores.max(axis=-1, keepdims=True, initial=-1e300)
        weights = np.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        out = np.einsum("hqk,khd->qhd", (weights / total)[..., : old + new], v)
        return out, (top + np.log(total))[..., 0].T
