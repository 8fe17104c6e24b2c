"""Which pages a sequence has while it runs: those that others computed, those that it fills, none behind the window."""

from __future__ import annotations

from hetero_jax.pages import pages_for
from hetero_jax.scheduler_state import Pool, ScheduledSequence
from hetero_jax.scheduler_types import SchedulerConfig


class PageTables:
    """Rules of one scheduler for `ScheduledSequence.pages`."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config

    def shareable(self, seq: ScheduledSequence) -> tuple[bytes, ...]:
        """Keys of what a waiting sequence may take from others; not its last token, as one is sampled from that."""
        return seq.keys[: (seq.known - 1) // self._config.page_size]

    def needed(self, seq: ScheduledSequence, pool: Pool) -> int:
        """Free pages that a waiting sequence would take until it has computed all that it knows."""
        shared = pool.prefixes.find(self.shareable(seq))
        return self._missing(seq, sum(pool.pages.num_users(page) > 0 for page in shared))

    def enter(self, seq: ScheduledSequence, pool: Pool) -> None:
        """A waiting sequence begins to run in a pool, behind what others have computed of it there."""
        shared = pool.prefixes.find(self.shareable(seq))
        seq.enter(pool, self._missing(seq, len(shared)))
        seq.computed = len(shared) * self._config.page_size
        seq.share(shared, self._num_unseen(seq, len(shared)))
        pool.prefixes.expect(seq.keys[len(shared) :], seq.seq_id)

    def advance(self, seq: ScheduledSequence, num_rows: int) -> None:
        """Rows are computed; pages of the prompt that they fill are known from here on."""
        first, seq.computed = seq.computed // self._config.page_size, seq.computed + num_rows
        for index in range(first, min(seq.computed // self._config.page_size, len(seq.keys))):
            seq.home.prefixes.learn(seq.keys[index], seq.pages[index])

    def free_behind_window(self, seq: ScheduledSequence) -> None:
        """Gives back the pages that no row from `computed` on sees; the last page stays, to stand in for them."""
        unseen = self._num_unseen(seq, len(seq.pages))
        if unseen <= seq.num_freed:
            return
        behind = seq.pages[seq.num_freed : unseen]
        seq.home.free(behind)
        seq.pages = (seq.pages[-1],) * unseen + seq.pages[unseen:]
        seq.num_freed = unseen
        if seq.known - seq.computed > 1:  # the rest of the prompt will want them again
            owed = pages_for(seq.known, self._config.page_size) - len(seq.pages)
            again = min(len(behind), owed - seq.promised)
            seq.promised += again
            seq.home.promised += again

    def _missing(self, seq: ScheduledSequence, num_pages: int) -> int:
        """Pages that it needs besides so many that are there."""
        whole = pages_for(seq.known, self._config.page_size)
        return min(whole - num_pages, self._config.most_pages(seq.known))

    def _num_unseen(self, seq: ScheduledSequence, num_pages: int) -> int:
        """First pages of a table of so many that no row from `computed` on sees; never the last one."""
        if self._config.window is None:
            return 0
        oldest = max(0, seq.computed - self._config.window + 1)
        return max(0, min(oldest // self._config.page_size, num_pages - 1))
