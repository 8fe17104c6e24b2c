"""Which rows go into the next microbatch: continuous batching over a bounded pool of KV pages.

Pure: no I/O, no clock, no arrays. The driver calls `schedule()` until it returns None, runs what it got, and reports
each microbatch with `complete()`; a microbatch may complete in any order. The same object runs against real tiers and
against simulated ones.

    waiting --admit--> running: ready <--schedule / complete--> in flight --finished--> gone
       ^------------preempt-----'

The rules, in the order in which `schedule()` applies them:

1. Decode rows first (one row per sequence, least recently stepped first), at most an even share of the sequences, so
   that the other microbatches have work too.
2. Then the prefill chunks of running sequences, oldest first, and then of newly admitted ones, until the token budget
   is full (Sarathi).
3. A running sequence that needs a page takes it from the free ones or from the youngest idle sequence that is younger
   than itself (which is preempted: it loses its pages, keeps its tokens, and is prefilled again later). Where there is
   none it sits this microbatch out.
4. Nobody is admitted while a running sequence lacks a page, nor when the pages left would not let every running
   sequence finish its prompt and open one more page.

There may be several pools, one of each worker, their pages numbered one after another. A sequence lives in one of them,
chosen when it is admitted: the one with most pages left. Rules 3 and 4 then hold within its pool.

Where every site has a sliding window, pages that no later row sees are free as soon as their microbatch is back, so a
sequence never holds more than its window and one chunk.

Nothing deadlocks: with no microbatch in flight the oldest sequence of a pool can take the pages of all others there,
and `add` made sure that a pool holds it. Nothing starves: while a sequence lacks pages nobody is admitted, so those who
hold them come to their end.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from hetero_jax.errors import CapacityError, ConfigError, RequestError
from hetero_jax.pages import PageAllocator, pages_for


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of the scheduler; every one is at least 1 (ConfigError otherwise)."""

    num_pages: int
    page_size: int  # positions per page
    max_num_batched_tokens: int  # rows per microbatch
    max_num_seqs: int  # running sequences over all microbatches
    num_microbatches: int  # most microbatches in flight
    max_model_len: int  # most KV positions of one sequence
    pool_pages: tuple[int, ...] = ()  # pages of each pool, num_pages in all; empty: one pool
    window: int | None = None  # a row sees its own position and window - 1 before it; None: all

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and name != "pool_pages" and value < 1:
                raise ConfigError(f"{name}={value}; allowed: >= 1")
        if self.pool_pages and (min(self.pool_pages) < 1 or sum(self.pool_pages) != self.num_pages):
            raise ConfigError(f"pool_pages={self.pool_pages}; allowed: >= 1 each and {self.num_pages} in all")

    @property
    def pools(self) -> tuple[int, ...]:
        """Pages of each pool."""
        return self.pool_pages or (self.num_pages,)

    def most_pages(self, num_positions: int) -> int:
        """Pages that a sequence holds at most at once on its way to so many positions."""
        whole = pages_for(num_positions, self.page_size)
        if self.window is None:
            return whole
        # A chunk and what its first row sees, which need not begin with a page.
        return min(whole, pages_for(self.window - 1 + self.max_num_batched_tokens, self.page_size) + 1)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of one sequence in one microbatch: its tokens [start, start + length)."""

    seq_id: int
    start: int
    length: int
    samples: bool  # the last row is the last known token, so a new token is sampled from it
    pages: tuple[int, ...]  # page table of positions [0, start + length); behind the window: some page of its own


@dataclass(frozen=True, slots=True)
class Batch:
    """One microbatch; each sequence has at most one chunk in it."""

    batch_id: int
    chunks: tuple[Chunk, ...]

    @property
    def num_rows(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


@dataclass(slots=True, eq=False)
class _Pool:
    pages: PageAllocator
    num_running: int = 0
    promised: int = 0  # sum over its running sequences

    @property
    def room(self) -> int:
        """Pages for another sequence: each running one may open one more before a preemption."""
        return self.pages.num_free - self.promised - max(self.num_running, self.pages.num_pages // 100)


@dataclass(slots=True, eq=False)
class _Sequence:
    seq_id: int
    arrival: int  # order of add(); the smaller, the stronger the claim on pages
    known: int  # prompt + generated tokens
    max_known: int
    pool: _Pool  # of its pages, while it runs
    computed: int = 0  # positions whose KV is written
    pages: tuple[int, ...] = ()
    num_freed: int = 0  # first entries of `pages` that are behind the window and no longer its own
    promised: int = 0  # pages that the tokens known at admission still need
    aborted: bool = False  # ended while in flight; its pages are freed when the microbatch is back

    @property
    def held(self) -> tuple[int, ...]:
        return self.pages[self.num_freed :]


@dataclass(slots=True)
class _Draft:
    """The microbatch being put together."""

    rows_left: int
    num_flying: int  # sequences of the other microbatches
    chunks: list[Chunk] = field(default_factory=list[Chunk])
    short_of_pages: bool = False  # a running sequence went without, or was preempted


class Scheduler:
    """Continuous batching, chunked prefill, preemption. See the module docstring for the rules."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.num_preemptions = 0
        firsts = accumulate(config.pools, initial=0)
        self._pools = [_Pool(PageAllocator(count, first)) for count, first in zip(config.pools, firsts, strict=False)]
        self._sequences: dict[int, _Sequence] = {}  # all unfinished ones
        self._waiting: OrderedDict[int, _Sequence] = OrderedDict()  # never run yet, in order of arrival
        self._preempted: list[_Sequence] = []  # sorted by arrival; all of them arrived before all of _waiting
        self._decode_ready: OrderedDict[int, _Sequence] = OrderedDict()  # least recently stepped first
        self._prefill_ready: dict[int, _Sequence] = {}
        self._in_flight: dict[int, Batch] = {}
        self._num_running = 0
        self._num_added = 0
        self._num_batches = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._preempted)

    @property
    def num_running(self) -> int:
        return self._num_running

    @property
    def pages_used(self) -> int:
        return sum(pool.pages.num_used for pool in self._pools)

    @property
    def pages_total(self) -> int:
        return self.config.num_pages

    @property
    def has_unfinished(self) -> bool:
        return bool(self._sequences)

    def check(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Refuses a sequence that could never run to its end.

        The last token is sampled but never fed back, so it needs prompt + max_tokens - 1 KV positions.

        Raises:
          CapacityError: those exceed the model or the whole pool.
          RequestError: an empty prompt, or max_tokens under 1.
        """
        if num_prompt_tokens < 1 or max_tokens < 1:
            raise RequestError(f"prompt tokens={num_prompt_tokens}, max_tokens={max_tokens}; allowed: >= 1 of each")
        config = self.config
        positions = num_prompt_tokens + max_tokens - 1
        wanted = f"{num_prompt_tokens} prompt tokens and max_tokens={max_tokens} need {positions} KV positions"
        if positions > config.max_model_len:
            raise CapacityError(f"{wanted}; allowed: <= {config.max_model_len} (max_model_len)")
        most = config.most_pages(positions)
        if most > max(config.pools):
            raise CapacityError(
                f"{wanted}, {most} pages of {config.page_size} at once; allowed: <= {max(config.pools)} pages "
                "(the whole pool)"
            )

    def add(self, seq_id: int, num_prompt_tokens: int, max_tokens: int) -> None:
        """Puts a sequence at the end of the waiting queue. Raises what `check` raises."""
        assert seq_id not in self._sequences, f"sequence {seq_id} is already scheduled"
        self.check(num_prompt_tokens, max_tokens)
        seq = _Sequence(seq_id, self._num_added, num_prompt_tokens, num_prompt_tokens + max_tokens, self._pools[0])
        self._num_added += 1
        self._sequences[seq_id] = self._waiting[seq_id] = seq

    def schedule(self) -> Batch | None:
        """The next microbatch to launch now; None where nothing can start before a `complete()` or an `add()`."""
        if len(self._in_flight) >= self.config.num_microbatches:
            return None
        num_ready = len(self._decode_ready) + len(self._prefill_ready)
        draft = _Draft(self.config.max_num_batched_tokens, self._num_running - num_ready)
        self._take_decodes(draft)
        self._take_prefills(draft)
        self._admit(draft)
        if not draft.chunks:
            return None
        batch = Batch(self._num_batches, tuple(draft.chunks))
        self._num_batches += 1
        self._in_flight[batch.batch_id] = batch
        return batch

    def complete(self, batch_id: int, finished: Mapping[int, bool]) -> None:
        """The microbatch is back: every sampling chunk got one new token, and `finished[seq_id]` ends a sequence.

        Sequences that `finished` does not name go on. Pages of a finished sequence are free at once.
        """
        for chunk in self._in_flight.pop(batch_id).chunks:
            seq = self._sequences[chunk.seq_id]
            seq.computed += chunk.length
            seq.known += chunk.samples
            if seq.aborted or (chunk.samples and finished.get(seq.seq_id, False)):
                self._release(seq)
                del self._sequences[seq.seq_id]
            else:
                assert seq.known < seq.max_known, f"sequence {seq.seq_id} has its max_tokens and is not finished"
                self._free_behind_window(seq)
                self._make_ready(seq)

    def abort(self, seq_id: int) -> None:
        """Drops a sequence wherever it is; no effect where it has ended already.

        While it is in flight its pages are still being written: they are freed with its microbatch, and the token
        that comes back for it is to be ignored.
        """
        seq = self._sequences.get(seq_id)
        if seq is None:
            return
        if self._waiting.pop(seq_id, None) is None:
            if seq in self._preempted:
                self._preempted.remove(seq)
            elif self._unready(seq):
                self._release(seq)
            else:
                seq.aborted = True
                return
        del self._sequences[seq_id]

    # --- filling a microbatch

    def _take_decodes(self, draft: _Draft) -> None:
        share = self._share(self._num_running, draft)
        for seq in list(self._decode_ready.values()):
            if len(draft.chunks) >= share or draft.rows_left == 0:
                return
            if seq.seq_id in self._decode_ready:  # not preempted for an earlier one of this loop
                self._take(seq, draft)

    def _take_prefills(self, draft: _Draft) -> None:
        for seq in sorted(self._prefill_ready.values(), key=_arrival):
            if self._is_full(draft):
                return
            if seq.seq_id in self._prefill_ready:
                self._take(seq, draft)

    def _admit(self, draft: _Draft) -> None:
        """Starts waiting sequences; the head of the line waits for pages, and all behind it with it."""
        while self.num_waiting and self._num_running < self.config.max_num_seqs:
            if draft.short_of_pages or self._is_full(draft):
                return
            seq = self._preempted[0] if self._preempted else next(iter(self._waiting.values()))
            needed = self.config.most_pages(seq.known)
            pool = self._pool_for(seq, needed)
            if pool is None:
                return
            if self._preempted:
                del self._preempted[0]
            else:
                del self._waiting[seq.seq_id]
            seq.pool, seq.promised = pool, needed
            pool.promised += needed
            pool.num_running += 1
            self._num_running += 1
            self._make_ready(seq)
            self._take(seq, draft)

    def _share(self, population: int, draft: _Draft) -> int:
        """Sequences that one microbatch may take: an even part of all, and of those that are not in flight."""
        num_idle_slots = self.config.num_microbatches - len(self._in_flight)
        of_all = -(-population // self.config.num_microbatches)
        return min(of_all, -(-(population - draft.num_flying) // num_idle_slots))

    def _is_full(self, draft: _Draft) -> bool:
        """No room for a prefill: the budget is used up, or the rest belongs to the other microbatches.

        Waiting sequences count, so that a few short prompts start in several microbatches and not all in the first.
        """
        population = min(self._num_running + self.num_waiting, self.config.max_num_seqs)
        return draft.rows_left == 0 or len(draft.chunks) >= self._share(population, draft)

    def _pool_for(self, seq: _Sequence, needed: int) -> _Pool | None:
        """The pool with most room of those that hold the whole sequence and let it start now; None where none does."""
        most = self.config.most_pages(seq.max_known - 1)
        fitting = [pool for pool in self._pools if pool.pages.num_pages >= most]
        open_now = [pool for pool in fitting if pool.num_running == 0 or needed <= pool.room]
        return max(open_now, key=lambda pool: pool.room, default=None)

    def _take(self, seq: _Sequence, draft: _Draft) -> None:
        """Moves a ready sequence into the draft, or leaves it where it is for want of pages."""
        length = min(seq.known - seq.computed, draft.rows_left)
        if not self._grow(seq, seq.computed + length, draft):
            return
        self._unready(seq)
        samples = seq.computed + length == seq.known
        draft.chunks.append(Chunk(seq.seq_id, seq.computed, length, samples, seq.pages))
        draft.rows_left -= length

    def _grow(self, seq: _Sequence, num_positions: int, draft: _Draft) -> bool:
        """Makes the page table cover the positions, at the cost of younger idle sequences; False where that fails."""
        missing = pages_for(num_positions, self.config.page_size) - len(seq.pages)
        if missing <= 0:
            return True
        pages = seq.pool.pages.allocate(missing)
        if pages is None:
            draft.short_of_pages = True
            if not self._preempt_for(seq, missing):
                return False
            pages = seq.pool.pages.allocate(missing)
            assert pages is not None
        kept = min(missing, seq.promised)
        seq.promised -= kept
        seq.pool.promised -= kept
        seq.pages += tuple(pages)
        return True

    def _preempt_for(self, seq: _Sequence, num_pages: int) -> bool:
        """Preempts idle sequences of its pool younger than `seq`, youngest first, until `num_pages` are free.

        False, and nothing is preempted, where all of them together do not hold enough.
        """
        idle = (*self._decode_ready.values(), *self._prefill_ready.values())
        younger = sorted(
            (other for other in idle if other.pool is seq.pool and other.arrival > seq.arrival), key=_arrival
        )
        free = seq.pool.pages
        if free.num_free + sum(len(other.held) for other in younger) < num_pages:
            return False
        while free.num_free < num_pages:
            victim = younger.pop()
            self._unready(victim)
            self._release(victim)
            insort(self._preempted, victim, key=_arrival)
            self.num_preemptions += 1
        return True

    def _free_behind_window(self, seq: _Sequence) -> None:
        """Gives back the pages that no row from `computed` on sees; the last page stays, to stand in for them."""
        if self.config.window is None:
            return
        oldest = max(0, seq.computed - self.config.window + 1)
        unseen = min(oldest // self.config.page_size, len(seq.pages) - 1)
        if unseen <= seq.num_freed:
            return
        behind = seq.pages[seq.num_freed : unseen]
        seq.pool.pages.free(behind)
        seq.pages = (seq.pages[-1],) * unseen + seq.pages[unseen:]
        seq.num_freed = unseen
        if seq.known - seq.computed > 1:  # the rest of the prompt will want them again
            owed = pages_for(seq.known, self.config.page_size) - len(seq.pages)
            again = min(len(behind), owed - seq.promised)
            seq.promised += again
            seq.pool.promised += again

    # --- the states of a running sequence

    def _make_ready(self, seq: _Sequence) -> None:
        ready = self._decode_ready if seq.known - seq.computed == 1 else self._prefill_ready
        ready[seq.seq_id] = seq

    def _unready(self, seq: _Sequence) -> bool:
        """Takes a sequence out of the ready ones; False where it is not among them."""
        taken = self._decode_ready.pop(seq.seq_id, None) or self._prefill_ready.pop(seq.seq_id, None)
        return taken is not None

    def _release(self, seq: _Sequence) -> None:
        """Ends the residency of a running sequence: no pages, nothing computed."""
        seq.pool.pages.free(seq.held)
        seq.pool.promised -= seq.promised
        seq.pool.num_running -= 1
        self._num_running -= 1
        seq.pages, seq.num_freed, seq.promised, seq.computed = (), 0, 0, 0


def _arrival(seq: _Sequence) -> int:
    return seq.arrival
