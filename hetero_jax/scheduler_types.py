"""What the scheduler is told and what it gives: limits, pools that come and go, microbatches."""

from __future__ import annotations

from dataclasses import dataclass

from hetero_jax.errors import ConfigError
from hetero_jax.pages import pages_for


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of the scheduler; every one is at least 1 (ConfigError otherwise)."""

    page_size: int  # positions per page
    max_num_batched_tokens: int  # rows per microbatch
    max_num_seqs: int  # running sequences over all microbatches
    num_microbatches: int  # most microbatches in flight, to begin with
    max_model_len: int  # most KV positions of one sequence
    # Of each group of sites: a row sees its own position and window - 1 before it; None: all.
    windows: tuple[int | None, ...] = (None,)

    def __post_init__(self) -> None:
        limits = {name: value for name, value in vars(self).items() if name != "windows"}
        limits |= {f"windows[{group}]": window for group, window in enumerate(self.windows) if window is not None}
        for name, value in limits.items():
            if value < 1:
                raise ConfigError(f"{name}={value}; allowed: >= 1")

    @property
    def num_groups(self) -> int:
        """Page tables of a sequence."""
        return len(self.windows)

    @property
    def sees(self) -> int:
        """Most positions that a row attends to."""
        return max(window or self.max_model_len for window in self.windows)

    def most_pages(self, num_positions: int) -> int:
        """Pages that a sequence holds at most at once on its way to so many positions."""
        return sum(self.most_pages_of(window, num_positions) for window in self.windows)

    def most_pages_of(self, window: int | None, num_positions: int) -> int:
        """Those of one group."""
        whole = pages_for(num_positions, self.page_size)
        if window is None:
            return whole
        # A chunk and what its first row sees, which need not begin with a page.
        return min(whole, pages_for(window - 1 + self.max_num_batched_tokens, self.page_size) + 1)


@dataclass(frozen=True, slots=True)
class PoolJoined:
    """A pool of free pages, under a number that no pool had before.

    page_format: pages may move to pools of the same one; "": to none.
    """

    pool: int
    num_pages: int
    page_format: str = ""


@dataclass(frozen=True, slots=True)
class PoolDraining:
    """A pool that is about to leave: it gets no new sequences, and those that it has move where another holds them."""

    pool: int


@dataclass(frozen=True, slots=True)
class PoolLost:
    """A pool that is gone with all that was written in it."""

    pool: int


@dataclass(frozen=True, slots=True)
class PoolMeasured:
    """How fast a pool's worker is: KV positions that it attends to in a second, of any one site."""

    pool: int
    speed: float


PoolEvent = PoolJoined | PoolDraining | PoolMeasured | PoolLost


@dataclass(frozen=True, slots=True)
class Move:
    """A sequence that went from one pool to another: what its old pages hold must be copied into its new ones."""

    seq_id: int
    source: int  # pool
    source_pages: tuple[int, ...]
    target: int  # pool
    target_pages: tuple[int, ...]  # as many, in the same order


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of one sequence in one microbatch: its tokens [start, start + length)."""

    seq_id: int
    start: int
    length: int
    samples: bool  # the last row is the last known token, so a new token is sampled from it
    # Of each group the page table of positions [0, start + length); behind the window: some page of the group's.
    page_tables: tuple[tuple[int, ...], ...]
    pool: int = 0  # that the pages are in


@dataclass(frozen=True, slots=True)
class Batch:
    """One microbatch; each sequence has at most one chunk in it."""

    batch_id: int
    chunks: tuple[Chunk, ...]

    @property
    def num_rows(self) -> int:
        return sum(chunk.length for chunk in self.chunks)
