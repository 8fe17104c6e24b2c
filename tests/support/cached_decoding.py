"""Cached decoding by a plan through the engine's own tiers: ragged sequences, prefilled in chunks, then row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hetero_jax.attention_tier import AttentionTier
from hetero_jax.dense_tier import DenseTier
from hetero_jax.page_groups import group_pages
from hetero_jax.pages import pages_for
from hetero_jax.rows import pack
from hetero_jax.scheduler_types import Batch, Chunk
from hetero_jax.walk import Tiers, Timings, run_stages
from partition import Plan, prepare_site_weights

PAGE_SIZE = 4


class CachedDecoder:
    """Runs chunks of sequences with shuffled pages; keeps the logits of every row."""

    def __init__(self, plan: Plan, params: Any, sequences: Sequence[np.ndarray]) -> None:
        device = jax.devices()[0]
        dense = DenseTier(plan, params, device=device)
        groups = group_pages(plan.sites, max_model_len=plan.max_rows)
        attention = AttentionTier(
            plan.sites,
            prepare_site_weights(plan, params, device),
            pages=groups.sites,
            kv_cache_bytes=1 << 20,
            page_size=PAGE_SIZE,
            dtype=jnp.float32,
            device=device,
        )
        self.sequences = sequences
        self.tiers = Tiers(plan, dense, attention, Timings())
        self.logits = [np.zeros((len(tokens), plan.vocab_size), np.float32) for tokens in sequences]
        counts = [pages_for(len(tokens), PAGE_SIZE) for tokens in sequences]
        num_groups = len(groups.windows)
        pages = np.random.default_rng(5).permutation(sum(counts) * num_groups).reshape(num_groups, -1)
        self.pages = np.split(pages, np.cumsum(counts)[:-1], axis=1)  # of each sequence, [groups, pages]

    def run(self, spans: dict[int, tuple[int, int]]) -> None:
        """One microbatch: for each sequence its rows [start, stop)."""
        chunks = tuple(
            Chunk(seq, start, stop - start, True, tuple(map(tuple, self.pages[seq][:, : pages_for(stop, PAGE_SIZE)])))
            for seq, (start, stop) in spans.items()
        )
        rows = pack(
            Batch(0, chunks),
            lambda seq, start, length: self.sequences[seq][start : start + length],
            page_size=PAGE_SIZE,
        )
        dense, values = self.tiers.dense, {}
        tokens, positions = dense.place(rows.tokens, rows.positions)
        for _ in run_stages(self.tiers, rows, tokens, positions, values):
            pass
        reads = [values[value] for value in self.tiers.plan.stages[-1].reads]
        logits = np.asarray(dense.logits(tokens, positions, reads, jnp.arange(len(rows.tokens))))
        first = 0
        for seq, (start, stop) in spans.items():
            self.logits[seq][start:stop] = logits[first : first + stop - start]
            first += stop - start


def decode(plan: Plan, params: Any, sequences: Sequence[np.ndarray], seed: int = 0) -> list[np.ndarray]:
    """Logits [length, vocab] of each sequence, by random chunks, and the last rows one at a time."""
    random = np.random.default_rng(seed)
    decoder = CachedDecoder(plan, params, sequences)
    done = [0] * len(sequences)
    while any(at < len(tokens) for at, tokens in zip(done, sequences, strict=True)):
        spans = {}
        for seq, tokens in enumerate(sequences):
            left = len(tokens) - done[seq]
            length = 1 if left <= 3 else min(int(random.integers(1, 12)), left - 3)
            if left and random.random() < 0.8:
                spans[seq] = (done[seq], done[seq] + length)
                done[seq] += length
        if spans:
            decoder.run(spans)
    return decoder.logits
