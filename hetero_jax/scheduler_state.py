"""What the scheduler remembers: pools, sequences, and the microbatch that it is putting together."""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from hetero_jax.pages import PageAllocator
from hetero_jax.scheduler_types import Chunk, Move


@dataclass(slots=True, eq=False)
class Pool:
    """Pages of one worker."""

    number: int
    pages: PageAllocator
    page_format: str = ""
    num_running: int = 0
    promised: int = 0  # sum over its running sequences
    load: int = 0  # KV positions that one decode row of each of its running sequences attends to
    speed: float | None = None  # KV positions that its worker attends to in a second; None: not measured
    draining: bool = False
    lost: bool = False

    @property
    def room(self) -> int:
        """Pages for another sequence: each running one may open one more before a preemption."""
        return self.pages.num_free - self.promised - max(self.num_running, self.pages.num_pages // 100)


@dataclass(slots=True, eq=False)
class ScheduledSequence:
    """A sequence that is not finished."""

    seq_id: int
    arrival: int  # order of add(); the smaller, the stronger the claim on pages
    known: int  # prompt + generated tokens
    max_known: int
    sees: int  # most positions that a row attends to
    pool: Pool | None = None  # of its pages, while it runs
    computed: int = 0  # positions whose KV is written
    pages: tuple[int, ...] = ()
    num_freed: int = 0  # first entries of `pages` that are behind the window and no longer its own
    promised: int = 0  # pages that the tokens known at admission still need
    moved_at: int | None = None  # what it knew when it last went from one pool to another
    aborted: bool = False  # ended while in flight; its pages are freed when the microbatch is back

    @property
    def home(self) -> Pool:
        """Its pool; it runs."""
        assert self.pool is not None, f"sequence {self.seq_id} does not run"
        return self.pool

    @property
    def held(self) -> tuple[int, ...]:
        """Pages that are its own."""
        return self.pages[self.num_freed :]

    @property
    def reads(self) -> int:
        """Positions that its next decode row attends to."""
        return min(self.known, self.sees)

    @property
    def tokens_left(self) -> int:
        """At most so many tokens are still to be generated."""
        return self.max_known - self.known

    def learn(self, num_tokens: int) -> None:
        """Tokens that were generated while it runs."""
        before = self.reads
        self.known += num_tokens
        self.home.load += self.reads - before

    def enter(self, pool: Pool, promised: int) -> None:
        """Begins to run in a pool, without pages yet."""
        self.pool, self.promised = pool, promised
        pool.promised += promised
        pool.load += self.reads
        pool.num_running += 1

    def leave(self) -> None:
        """Ends to run in its pool, which gets its pages back."""
        self.home.pages.free(self.held)
        self.home.promised -= self.promised
        self.home.load -= self.reads
        self.home.num_running -= 1
        self.pool, self.pages, self.num_freed, self.promised = None, (), 0, 0

    def move(self, pool: Pool) -> Move:
        """Goes on in another pool, which has room; entries of `pages` behind the window stay stand-ins."""
        source, old, num_freed, promised = self.home.number, self.held, self.num_freed, self.promised
        self.leave()
        self.enter(pool, promised)
        new = pool.pages.allocate(len(old))
        assert new is not None, f"pool {pool.number} lacks pages for sequence {self.seq_id}"
        self.pages, self.num_freed = (*new[-1:] * num_freed, *new), num_freed
        self.moved_at = self.known
        return Move(self.seq_id, source, old, pool.number, tuple(new))


@dataclass(slots=True)
class Draft:
    """The microbatch being put together."""

    rows_left: int
    num_flying: int  # sequences of the other microbatches
    chunks: list[Chunk] = field(default_factory=list[Chunk])
    short_of_pages: bool = False  # a running sequence went without, or was preempted


class WaitingLine:
    """Sequences that do not run: those that ran before, then those that never did, each in order of arrival."""

    def __init__(self) -> None:
        self._new: OrderedDict[int, ScheduledSequence] = OrderedDict()
        self._back: list[ScheduledSequence] = []  # all of them arrived before all of _new
        self._aside: list[ScheduledSequence] = []  # for which no pool is large enough

    def __len__(self) -> int:
        return len(self._new) + len(self._back)

    @property
    def num_aside(self) -> int:
        """Sequences that have no turn."""
        return len(self._aside)

    @property
    def first(self) -> ScheduledSequence:
        """Whose turn it is; there is one."""
        return self._back[0] if self._back else next(iter(self._new.values()))

    def append(self, seq: ScheduledSequence) -> None:
        """One that has arrived last."""
        self._new[seq.seq_id] = seq

    def put_back(self, seq: ScheduledSequence) -> None:
        """One that ran."""
        insort(self._back, seq, key=arrival)

    def pop_first(self) -> ScheduledSequence:
        """Take out whose turn it is."""
        return self._back.pop(0) if self._back else self._new.popitem(last=False)[1]

    def set_first_aside(self) -> None:
        """No pool is large enough for it: those behind it have their turn."""
        self._aside.append(self.pop_first())

    def take_up(self, fits: Callable[[ScheduledSequence], bool]) -> None:
        """Those set aside that fit now have their turn again."""
        self._back = sorted((*self._back, *filter(fits, self._aside)), key=arrival)
        self._aside = [seq for seq in self._aside if not fits(seq)]

    def remove(self, seq: ScheduledSequence) -> bool:
        """Take one out wherever it is; False where it does not wait."""
        if self._new.pop(seq.seq_id, None) is not None:
            return True
        for line in (self._back, self._aside):
            if seq in line:
                line.remove(seq)
                return True
        return False


def arrival(seq: ScheduledSequence) -> int:
    """What sequences are sorted by."""
    return seq.arrival
