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

There may be several pools, one of each worker. A sequence lives in one of them, which `hetero_jax/pools.py` chooses by
pages and speed. Rules 3 and 4 then hold within its pool. Pools come and go (`apply`):

- A lost pool takes all that was computed in it: its sequences wait again with the tokens that they have, before all
  that never ran. Those in flight do so when their microbatch is back, which gives them nothing (`lost_in`); the other
  sequences of the microbatch are not touched, as no row depends on another's.
- A draining pool takes no new sequences. Those that it has leave it once they are not in flight, as soon as another
  pool could hold them (`migrate`): they move, with what is computed, to one of the same page format that has room now,
  and otherwise wait again.
- Pools out of balance exchange running sequences (`migrate` too), one at a time, where no sequence waits that could
  start and balance them.
- A sequence that no pool can hold is set aside until one joins that can.

Pages that are full of prompt are shared (`hetero_jax/prefixes.py`): a sequence begins behind those that others have
computed in its pool. While another one is about to compute what it begins with, it lets those behind it go first.
Nobody writes to a full page. One that has no user left is free, and known until it is given away, the last of all.

Sites come in groups that see equally far, each with page tables of its own (`hetero_jax/page_groups.py`); a sequence
takes as many pages of all. Where a group has a sliding window, pages that no later row sees are free as soon as their
microbatch is back, so a sequence never holds more there than the window and one chunk.

Nothing deadlocks: with no microbatch in flight the oldest sequence of a pool can take the pages of all others there,
which was chosen because it holds the whole sequence. Nothing starves: while a sequence lacks pages nobody is admitted,
so those who hold them come to their end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from hetero_jax.errors import CapacityError, RequestError
from hetero_jax.page_tables import PageTables
from hetero_jax.pages import pages_for
from hetero_jax.pools import Pools
from hetero_jax.scheduler_state import Draft, ScheduledSequence, WaitingLine, arrival
from hetero_jax.scheduler_types import (
    Batch,
    Chunk,
    Move,
    PoolDraining,
    PoolEvent,
    PoolJoined,
    PoolLost,
    PoolMeasured,
    SchedulerConfig,
)


class Scheduler:
    """Continuous batching, chunked prefill, preemption. See the module docstring for the rules."""

    def __init__(self, config: SchedulerConfig, pools: Mapping[int, int]) -> None:
        """pools: pages of each pool that is there from the beginning, by its number."""
        self.config = config
        self.num_microbatches = config.num_microbatches  # may be changed at any time
        self.num_preemptions = 0
        self.prefix_cache_hits = 0  # positions that sequences found computed when they began to run
        self.num_replays = 0  # residencies that ended with their pool
        self._tables = PageTables(config)
        self._pools = Pools(config, self._tables)
        self._sequences: dict[int, ScheduledSequence] = {}  # all unfinished ones
        self._waiting = WaitingLine()
        self._decode_ready: OrderedDict[int, ScheduledSequence] = OrderedDict()  # least recently stepped first
        self._prefill_ready: dict[int, ScheduledSequence] = {}
        self._in_flight: dict[int, Batch] = {}
        self._num_running = 0
        self._num_added = 0
        self._num_batches = 0
        for number, num_pages in pools.items():
            self.apply(PoolJoined(number, num_pages))

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + self._waiting.num_aside

    @property
    def num_running(self) -> int:
        return self._num_running

    @property
    def pages_used(self) -> int:
        return self._pools.pages_used

    @property
    def pages_total(self) -> int:
        return self._pools.pages_total

    @property
    def has_unfinished(self) -> bool:
        return bool(self._sequences)

    @property
    def drained_pools(self) -> list[int]:
        """Draining pools that nothing is left in."""
        return self._pools.drained

    @property
    def loads(self) -> dict[int, int]:
        """KV positions that the next decode rows of each pool's sequences attend to."""
        return self._pools.loads

    def apply(self, event: PoolEvent) -> None:
        """A pool joins, is measured, begins to drain, or is gone."""
        match event:
            case PoolJoined():
                self._pools.join(event)
                self._waiting.take_up(self._pools.has_home)
            case PoolMeasured(number, speed):
                self._pools.measure(number, speed)
            case PoolDraining(number):
                self._pools.drain(number)
            case PoolLost(number):
                pool = self._pools.lose(number)
                self._replay(seq for seq in self._idle() if seq.pool is pool)

    def migrate(self) -> list[Move]:
        """Idle sequences leave draining pools, and balance the others. To be called before `schedule`.

        The driver copies pages as the moves say, before it begins anything that was scheduled later; where that fails,
        it calls `replay`.
        """
        moves = self._leave_draining_pools() if self._pools.any_draining else []
        may_start = self._waiting and self._num_running < self.config.max_num_seqs
        move = None if may_start else self._pools.rebalance(self._idle())
        return moves if move is None else [*moves, move]

    def replay(self, seq_id: int) -> None:
        """The pages of an idle sequence could not be copied: it waits again, with the tokens that it has."""
        self._replay([self._sequences[seq_id]])

    def lost_in(self, batch_id: int) -> frozenset[int]:
        """Sequences of a microbatch in flight whose pool is lost: what comes back for them means nothing."""
        chunks = self._in_flight[batch_id].chunks
        return frozenset(chunk.seq_id for chunk in chunks if self._sequences[chunk.seq_id].home.lost)

    def check(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Refuses a sequence that could never run to its end.

        The last token is sampled but never fed back, so it needs prompt + max_tokens - 1 KV positions.

        Raises:
          CapacityError: those exceed the model, or every pool that ever joined.
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
        if 0 < self._pools.largest < most:
            raise CapacityError(
                f"{wanted}, {most} pages of {config.page_size} at once; allowed: <= {self._pools.largest} pages "
                "(the whole pool)"
            )

    def add(self, seq_id: int, num_prompt_tokens: int, max_tokens: int, keys: tuple[bytes, ...] = ()) -> None:
        """Puts a sequence at the end of the waiting queue. Raises what `check` raises.

        keys: of the pages that its prompt fills (`prefixes.page_keys`); without them it shares nothing.
        """
        assert seq_id not in self._sequences, f"sequence {seq_id} is already scheduled"
        self.check(num_prompt_tokens, max_tokens)
        most = num_prompt_tokens + max_tokens
        seq = ScheduledSequence(seq_id, self._num_added, num_prompt_tokens, most, self.config.sees, keys)
        self._num_added += 1
        self._sequences[seq_id] = seq
        self._waiting.append(seq)

    def schedule(self) -> Batch | None:
        """The next microbatch to launch now; None where nothing can start before a `complete`, `add` or `apply`."""
        if len(self._in_flight) >= self.num_microbatches:
            return None
        num_ready = len(self._decode_ready) + len(self._prefill_ready)
        draft = Draft(self.config.max_num_batched_tokens, self._num_running - num_ready)
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

        Sequences that `finished` does not name go on; those that `lost_in` names got nothing, and wait again. Pages of
        a finished sequence are free at once.
        """
        for chunk in self._in_flight.pop(batch_id).chunks:
            seq = self._sequences[chunk.seq_id]
            if seq.home.lost and not seq.aborted:
                self._replay([seq])
                continue
            self._tables.advance(seq, chunk.length)
            seq.learn(chunk.samples)
            if seq.aborted or (chunk.samples and finished.get(seq.seq_id, False)):
                self._release(seq)
                del self._sequences[seq.seq_id]
            else:
                assert seq.known < seq.max_known, f"sequence {seq.seq_id} has its max_tokens and is not finished"
                self._tables.free_behind_windows(seq)
                self._make_ready(seq)

    def abort(self, seq_id: int) -> None:
        """Drops a sequence wherever it is; no effect where it has ended already.

        While it is in flight its pages are still being written: they are freed with its microbatch, and the token
        that comes back for it is to be ignored.
        """
        seq = self._sequences.get(seq_id)
        if seq is None:
            return
        if not self._waiting.remove(seq):
            if not self._unready(seq):
                seq.aborted = True
                return
            self._release(seq)
        del self._sequences[seq_id]

    # --- pools

    def _leave_draining_pools(self) -> list[Move]:
        leaving = [seq for seq in self._idle() if seq.home.draining and self._pools.has_home(seq)]
        targets = [(seq, self._pools.move(seq)) for seq in leaving]
        self._replay(seq for seq, move in targets if move is None)
        return [move for _, move in targets if move is not None]

    def _replay(self, sequences: Iterable[ScheduledSequence]) -> None:
        """Sequences leave their pools for good: they are prefilled again from what they know."""
        for seq in sequences:
            self._wait_again(seq)
            self.num_replays += 1

    def _idle(self) -> list[ScheduledSequence]:
        """Running sequences that are not in flight."""
        return [*self._decode_ready.values(), *self._prefill_ready.values()]

    # --- filling a microbatch

    def _take_decodes(self, draft: Draft) -> None:
        share = self._share(self._num_running, draft)
        for seq in list(self._decode_ready.values()):
            if len(draft.chunks) >= share or draft.rows_left == 0:
                return
            if seq.seq_id in self._decode_ready:  # not preempted for an earlier one of this loop
                self._take(seq, draft)

    def _take_prefills(self, draft: Draft) -> None:
        for seq in sorted(self._prefill_ready.values(), key=arrival):
            if self._is_full(draft):
                return
            if seq.seq_id in self._prefill_ready:
                self._take(seq, draft)

    def _admit(self, draft: Draft) -> None:
        """Starts waiting sequences; the head of the line waits for pages, and all behind it with it."""
        self._waiting.resume()
        while self._pools and self._waiting and self._num_running < self.config.max_num_seqs:
            if draft.short_of_pages or self._is_full(draft):
                return
            seq = self._waiting.first
            if not self._pools.has_home(seq):
                self._waiting.set_first_aside()
                continue
            pool = self._pools.find_room(seq)
            if pool is None:
                return
            if (key := self._tables.last_awaited(seq, pool)) is not None:
                self._waiting.set_first_behind(pool, key)
                continue
            self._waiting.pop_first()
            self._tables.enter(seq, pool)
            self.prefix_cache_hits += seq.computed
            self._num_running += 1
            self._make_ready(seq)
            self._take(seq, draft)

    def _share(self, population: int, draft: Draft) -> int:
        """Sequences that one microbatch may take: an even part of all, and of those that are not in flight."""
        num_idle_slots = self.num_microbatches - len(self._in_flight)
        of_all = -(-population // self.num_microbatches)
        return min(of_all, -(-(population - draft.num_flying) // num_idle_slots))

    def _is_full(self, draft: Draft) -> bool:
        """No room for a prefill: the budget is used up, or the rest belongs to the other microbatches.

        Waiting sequences count, so that a few short prompts start in several microbatches and not all in the first.
        """
        population = min(self._num_running + len(self._waiting), self.config.max_num_seqs)
        return draft.rows_left == 0 or len(draft.chunks) >= self._share(population, draft)

    def _take(self, seq: ScheduledSequence, draft: Draft) -> None:
        """Moves a ready sequence into the draft, or leaves it where it is for want of pages."""
        length = min(seq.known - seq.computed, draft.rows_left)
        if not self._grow(seq, seq.computed + length, draft):
            return
        self._unready(seq)
        samples = seq.computed + length == seq.known
        draft.chunks.append(Chunk(seq.seq_id, seq.computed, length, samples, seq.page_tables, seq.home.number))
        draft.rows_left -= length

    def _grow(self, seq: ScheduledSequence, num_positions: int, draft: Draft) -> bool:
        """Makes the page tables cover the positions, at the cost of younger idle sequences; False where that fails."""
        each = pages_for(num_positions, self.config.page_size) - seq.num_pages
        missing = each * self.config.num_groups
        if missing <= 0:
            return True
        pages = seq.home.allocate(missing)
        if pages is None:
            draft.short_of_pages = True
            if not self._preempt_for(seq, missing):
                return False
            pages = seq.home.allocate(missing)
            assert pages is not None
        seq.grow(pages)
        return True

    def _preempt_for(self, seq: ScheduledSequence, num_pages: int) -> bool:
        """Preempts idle sequences of its pool younger than `seq`, youngest first, until `num_pages` are free.

        False, and nothing is preempted, where all of them together do not hold enough.
        """
        younger = sorted(
            (other for other in self._idle() if other.pool is seq.pool and other.arrival > seq.arrival), key=arrival
        )
        free = seq.home.pages
        if free.num_free + seq.home.freed_by(younger) < num_pages:
            return False
        while free.num_free < num_pages:
            self._wait_again(younger.pop())
            self.num_preemptions += 1
        return True

    # --- the states of a running sequence

    def _make_ready(self, seq: ScheduledSequence) -> None:
        ready = self._decode_ready if seq.known - seq.computed == 1 else self._prefill_ready
        ready[seq.seq_id] = seq

    def _unready(self, seq: ScheduledSequence) -> bool:
        """Takes a sequence out of the ready ones; False where it is not among them."""
        taken = self._decode_ready.pop(seq.seq_id, None) or self._prefill_ready.pop(seq.seq_id, None)
        return taken is not None

    def _wait_again(self, seq: ScheduledSequence) -> None:
        """A running sequence loses its place and keeps its tokens."""
        self._unready(seq)
        self._release(seq)
        self._waiting.put_back(seq)

    def _release(self, seq: ScheduledSequence) -> None:
        """Ends the residency of a running sequence: no pages, nothing computed."""
        seq.leave()
        seq.computed = 0
        self._num_running -= 1
