"""How fast a worker is: KV positions that it attends to in a second, of any one site.

Only microbatches count that say something of it: decode rows alone, which memory binds (prefill is bound by
arithmetic, and would make a worker seem fast that has much of it), of shapes that came before (the first ones compile),
and calls long enough that what each of them costs anyway is the smaller part. Where no call is, positions alone decide.
A worker whose calls cost much besides looks slower the less it has to do; but as loads follow speeds, they come to rest
where all workers take equally long, which is what is wanted.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass

import numpy as np

from hetero_jax.attention_layout import GroupedLayout

_LEAST_CALL_S = 1e-3
_LEAST_MICROBATCHES, _MICROBATCHES = 3, 16  # that are needed, and looked back at


@dataclass(slots=True)
class Work:
    """A worker's part of a microbatch: the KV positions that each of its calls attends to, and the calls so far."""

    positions: int
    num_calls: int = 0
    total_s: float = 0.0


class SpeedMeter:
    """Of one worker.

    Args:
      num_sites: that a microbatch passes.
      window: that all of them have: most positions that a row attends to; None: any number.
    """

    def __init__(self, *, num_sites: int, window: int | None) -> None:
        self._num_sites, self._window = num_sites, window
        self._shapes: set[tuple[tuple[int, ...], ...]] = set()  # of layouts that came before
        self._speeds: deque[float] = deque(maxlen=_MICROBATCHES)
        self.speed: float | None = None  # the median; None: not known yet

    def begin(self, layout: GroupedLayout) -> Work | None:
        """The work of a microbatch whose calls have this layout; None where they say nothing of the speed."""
        shape = (layout.row_slots.shape, layout.page_tables.shape, layout.decode.shape)
        decodes_alone = len(layout.tile_sequence) == 0
        came_before = shape in self._shapes
        if decodes_alone:
            self._shapes.add(shape)
        context = np.minimum(layout.context, self._window or np.iinfo(np.int32).max)
        return Work(int(context.sum())) if decodes_alone and came_before else None

    def observe(self, work: Work, *, began_ns: int, ended_ns: int) -> None:
        """A call of it is back, which took so long by the worker's clock."""
        work.num_calls += 1
        work.total_s += (ended_ns - began_ns) / 1e9
        if work.num_calls < self._num_sites or work.total_s < work.num_calls * _LEAST_CALL_S:
            return
        self._speeds.append(work.positions * work.num_calls / work.total_s)
        if len(self._speeds) >= _LEAST_MICROBATCHES:
            self.speed = statistics.median(self._speeds)
