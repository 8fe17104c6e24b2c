"""Which pages a sequence has while it runs: those that others computed, those that it fills, none behind a window.

Each group of sites (`hetero_jax/page_groups.py`) has a page table of its own. All of a sequence's are equally long.
"""

from __future__ import annotations

from functools import partial

from hetero_jax.pages import pages_for
from hetero_jax.scheduler_state import GroupPages, Pool, ScheduledSequence
from hetero_jax.scheduler_types import SchedulerConfig


class PageTables:
    """Rules of one scheduler for `ScheduledSequence.groups`."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._first_needed = [partial(self._num_unneeded, window) for window in config.windows]

    def needed(self, seq: ScheduledSequence, pool: Pool) -> int:
        """Free pages that a waiting sequence would take until it has computed all that it knows."""
        count = self._num_shared(seq, pool)
        return sum(
            self._missing(seq, window, count - sum(pool.pages.num_users(page) == 0 for page in shared))
            for window, shared in zip(self._config.windows, self._shared(seq, pool, count), strict=True)
        )

    def last_awaited(self, seq: ScheduledSequence, pool: Pool) -> bytes | None:
        """The key of the last page that others are about to compute there, of those that it could begin behind."""
        return pool.prefixes.last_awaited(self._shareable(seq)[self._num_shared(seq, pool) :])

    def enter(self, seq: ScheduledSequence, pool: Pool) -> None:
        """A waiting sequence begins to run in a pool, behind what others have computed of it there."""
        count = self._num_shared(seq, pool)
        seq.enter(pool, [self._missing(seq, window, count) for window in self._config.windows])
        seq.computed = count * self._config.page_size
        for group, pages in zip(seq.groups, self._shared(seq, pool, count), strict=True):
            pool.pages.share(pages)
            group.replace(count - len(pages), tuple(pages))
        pool.prefixes.expect(seq.keys[count:], seq.seq_id)

    def advance(self, seq: ScheduledSequence, num_rows: int) -> None:
        """Rows are computed; pages of the prompt that they fill are known from here on."""
        first, seq.computed = seq.computed // self._config.page_size, seq.computed + num_rows
        for index in range(first, min(seq.computed // self._config.page_size, len(seq.keys))):
            seq.home.prefixes.learn(seq.keys[index], [group.pages[index] for group in seq.groups])

    def free_behind_windows(self, seq: ScheduledSequence) -> None:
        """Gives back the pages that no row from `computed` on sees; the last page stays, to stand in for them."""
        for group, window in zip(seq.groups, self._config.windows, strict=True):
            if window is not None:
                self._free_behind(window, seq, group)

    def _free_behind(self, window: int, seq: ScheduledSequence, group: GroupPages) -> None:
        unseen = max(group.num_freed, self._num_unseen(window, len(group.pages), seq.computed))
        behind = group.pages[group.num_freed : unseen]
        if behind:
            seq.home.free(behind)
            group.replace(unseen, group.pages[unseen:])
        if seq.known - seq.computed > 1:  # the rest of the prompt will want them again
            owed = pages_for(seq.known, self._config.page_size) - len(group.pages)
            seq.promise(group, min(len(behind), owed - group.promised))
        else:  # it may open one page more, unless it has as many as a row can see
            most = pages_for(window - 1, self._config.page_size) + 1
            seq.promise(group, int(len(group.held) < most) - group.promised)

    def _shareable(self, seq: ScheduledSequence) -> tuple[bytes, ...]:
        """Keys of what a waiting sequence may take from others; not its last token, as one is sampled from that."""
        return seq.keys[: (seq.known - 1) // self._config.page_size]

    def _num_shared(self, seq: ScheduledSequence, pool: Pool) -> int:
        """Pages that a waiting sequence may begin behind."""
        return pool.prefixes.num_found(self._shareable(seq), self._first_needed)

    def _shared(self, seq: ScheduledSequence, pool: Pool, count: int) -> list[list[int]]:
        """Of each group, those that it needs of the first `count`."""
        return [
            pool.prefixes.pages(group, seq.keys[first(count) : count]) for group, first in enumerate(self._first_needed)
        ]

    def _missing(self, seq: ScheduledSequence, window: int | None, num_pages: int) -> int:
        """Pages that it needs for a group besides so many that are there."""
        whole = pages_for(seq.known, self._config.page_size)
        return min(whole - num_pages, self._config.most_pages_of(window, seq.known))

    def _num_unneeded(self, window: int | None, num_pages: int) -> int:
        """First pages of so many that no row behind them sees."""
        return 0 if window is None else self._num_unseen(window, num_pages, num_pages * self._config.page_size)

    def _num_unseen(self, window: int, num_pages: int, computed: int) -> int:
        """First pages of a table of so many that no row from `computed` on sees; never the last one."""
        oldest = max(0, computed - window + 1)
        return max(0, min(oldest // self._config.page_size, num_pages - 1))
