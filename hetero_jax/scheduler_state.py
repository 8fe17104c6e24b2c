"""What the scheduler remembers: pools, sequences, and the microbatch that it is putting together."""

from __future__ import annotations

import itertools
from bisect import insort
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from hetero_jax.pages import PageAllocator
from hetero_jax.prefixes import Prefixes
from hetero_jax.scheduler_types import Chunk, Move


@dataclass(slots=True, eq=False)
class Pool:
    """Pages of one worker."""

    number: int
    pages: PageAllocator
    prefixes: Prefixes
    page_format: str = ""
    num_whole: int = 1  # groups without a window, in which a sequence grows and grows
    num_running: int = 0
    promised: int = 0  # sum over its running sequences
    load: int = 0  # KV positions that one decode row of each of its running sequences attends to
    speed: float | None = None  # KV positions that its worker attends to in a second; None: not measured
    draining: bool = False
    lost: bool = False

    @property
    def room(self) -> int:
        """Pages for another sequence: each running one may open one more of each group before a preemption.

        Those of groups with a window are promised.
        """
        opened = self.num_running * self.num_whole
        return self.pages.num_free - self.promised - max(opened, self.pages.num_pages // 100)

    def exchanges_with(self, other: Pool) -> bool:
        """Whether pages of the one may move to the other."""
        return self.page_format != "" and self.page_format == other.page_format

    def allocate(self, count: int) -> list[int] | None:
        """So many pages to write to; None where fewer are free."""
        pages = self.pages.allocate(count)
        self.prefixes.forget(pages or ())
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Take pages back from one of their users; what is known of them stays as long as nobody else needs them."""
        self.pages.free(pages, keep=self.prefixes)

    def freed_by(self, leaving: Iterable[ScheduledSequence]) -> int:
        """Pages that would be free if these sequences left."""
        users = Counter(page for seq in leaving for page in seq.held)
        return sum(count == self.pages.num_users(page) for page, count in users.items())


@dataclass(slots=True, kw_only=True)
class GroupPages:
    """Pages of a running sequence for one group of sites."""

    pages: tuple[int, ...] = ()
    num_freed: int = 0  # first entries of `pages` that are behind the window and no longer its own
    promised: int = 0  # pages that the tokens known at admission still need, or one that the next ones may

    @property
    def held(self) -> tuple[int, ...]:
        """Pages that it has, shared or alone."""
        return self.pages[self.num_freed :]

    def replace(self, num_freed: int, held: tuple[int, ...]) -> None:
        """Has these pages; the last one stands in for those behind the window."""
        self.pages, self.num_freed = held[-1:] * num_freed + held, num_freed


@dataclass(slots=True, eq=False)
class ScheduledSequence:
    """A sequence that is not finished."""

    seq_id: int
    arrival: int  # order of add(); the smaller, the stronger the claim on pages
    known: int  # prompt + generated tokens
    max_known: int
    sees: int  # most positions that a row attends to
    keys: tuple[bytes, ...] = ()  # of the pages that its prompt fills, as of `prefixes.page_keys`
    pool: Pool | None = None  # of its pages, while it runs
    computed: int = 0  # positions whose KV is written
    groups: tuple[GroupPages, ...] = ()  # while it runs; their tables are equally long
    moved_at: int | None = None  # what it knew when it last went from one pool to another
    aborted: bool = False  # ended while in flight; its pages are freed when the microbatch is back

    @property
    def home(self) -> Pool:
        """Its pool; it runs."""
        assert self.pool is not None, f"sequence {self.seq_id} does not run"
        return self.pool

    @property
    def page_tables(self) -> tuple[tuple[int, ...], ...]:
        """Of each group."""
        return tuple(group.pages for group in self.groups)

    @property
    def num_pages(self) -> int:
        """Of each page table."""
        return len(self.groups[0].pages)

    @property
    def held(self) -> tuple[int, ...]:
        """Pages that it has, shared or alone, of all groups."""
        return tuple(page for group in self.groups for page in group.held)

    @property
    def promised(self) -> int:
        """Pages of all groups that nobody else is admitted to."""
        return sum(group.promised for group in self.groups)

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

    def enter(self, pool: Pool, promised: Iterable[int]) -> None:
        """Begins to run in a pool, without pages yet. promised: of each group."""
        self.pool, self.groups = pool, tuple(GroupPages(promised=count) for count in promised)
        pool.promised += self.promised
        pool.load += self.reads
        pool.num_running += 1

    def promise(self, group: GroupPages, more: int) -> None:
        """A group is promised so many pages more, or fewer."""
        group.promised += more
        self.home.promised += more

    def grow(self, pages: Sequence[int]) -> None:
        """Gets pages behind those that it has, as many for each group."""
        each = len(pages) // len(self.groups)
        for number, group in enumerate(self.groups):
            group.pages += tuple(pages[number * each : (number + 1) * each])
            self.promise(group, -min(each, group.promised))

    def leave(self) -> None:
        """Ends to run in its pool, which gets its pages back."""
        self.home.free(self.held)
        self.home.prefixes.give_up(self.keys, self.seq_id)
        self.home.promised -= self.promised
        self.home.load -= self.reads
        self.home.num_running -= 1
        self.pool, self.groups = None, ()

    def move(self, pool: Pool) -> Move:
        """Goes on in another pool, which has room; entries of `pages` behind the window stay stand-ins."""
        source, old, before = self.home.number, self.held, self.groups
        self.leave()
        self.enter(pool, [group.promised for group in before])
        new = pool.allocate(len(old))
        assert new is not None, f"pool {pool.number} lacks pages for sequence {self.seq_id}"
        pages = iter(new)
        for group, was in zip(self.groups, before, strict=True):
            group.replace(was.num_freed, tuple(itertools.islice(pages, len(was.held))))
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
        self._behind: dict[tuple[Pool, bytes], list[ScheduledSequence]] = {}  # others, which compute a page there

    def __len__(self) -> int:
        return len(self._new) + len(self._back)

    @property
    def num_aside(self) -> int:
        """Sequences that have no turn."""
        return len(self._aside) + sum(map(len, self._behind.values()))

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

    def set_first_behind(self, pool: Pool, key: bytes) -> None:
        """Another sequence is about to compute there what it begins with: those behind it have their turn."""
        self._behind.setdefault((pool, key), []).append(self.pop_first())

    def resume(self) -> None:
        """Those have their turn again for whom the other sequence has computed it, or does not any more."""
        over = [each for each in self._behind if each[0].lost or not each[0].prefixes.is_awaited(each[1])]
        if over:
            self._back = sorted((*self._back, *(seq for each in over for seq in self._behind.pop(each))), key=arrival)

    def take_up(self, fits: Callable[[ScheduledSequence], bool]) -> None:
        """Those set aside that fit now have their turn again."""
        self._back = sorted((*self._back, *filter(fits, self._aside)), key=arrival)
        self._aside = [seq for seq in self._aside if not fits(seq)]

    def remove(self, seq: ScheduledSequence) -> bool:
        """Take one out wherever it is; False where it does not wait."""
        if self._new.pop(seq.seq_id, None) is not None:
            return True
        for line in (self._back, self._aside, *self._behind.values()):
            if seq in line:
                line.remove(seq)
                return True
        return False


def arrival(seq: ScheduledSequence) -> int:
    """What sequences are sorted by."""
    return seq.arrival
