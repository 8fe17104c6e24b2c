"""What an engine counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Counters since the engine was made. The *_s fields but total_s count while `engine.profile` is set.

    num_microbatches: in flight at most, at present.
    prefix_cache_hits: tokens of prompts that were not computed again, as pages of other sequences had them.
    sequences_moved: to another worker with their pages.
    """

    sequences_done: int = 0
    sequences_total: int = 0
    tokens_generated: int = 0
    rows_computed: int = 0
    steps: int = 0
    preemptions: int = 0
    prefix_cache_hits: int = 0
    workers_lost: int = 0
    sequences_moved: int = 0
    num_microbatches: int = 0
    pages_used: int = 0
    pages_total: int = 0
    total_s: float = 0.0
    dense_s: float = 0.0
    attention_s: float = 0.0
    sample_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second while generating."""
        return self.tokens_generated / self.total_s if self.total_s else 0.0

    @property
    def host_s(self) -> float:
        """Python, scheduler and dispatch: what is left of the total (if `engine.profile` was set all along)."""
        return self.total_s - self.dense_s - self.attention_s - self.sample_s
