"""How many microbatches to keep in flight: enough to hide the wire and tier 2 behind tier 1.

While one microbatch travels and is attended to, tier 1 computes a stage of each of the others, so it never waits with
1 + ceil((wire + tier-2 time) / tier-1 time) of them (Glinthawk). The times are measured while the job runs. More
microbatches are smaller ones, which changes the times: so the rule is applied again and again.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

SMALLEST_DEPTH = 2  # one on each tier
LARGEST_DEPTH = 32
_CALLS, _WALKS = 64, LARGEST_DEPTH  # that are looked back at


class CallTimes:
    """Of the last calls of one worker. Its clock may show another time, but runs as fast as ours.

    wire_s: there and back, the least seen; tier2_s: of the worker's own work, the median.
    """

    def __init__(self) -> None:
        self._wire_s: deque[float] = deque(maxlen=_CALLS)
        self._tier2_s: deque[float] = deque(maxlen=_CALLS)
        self._byte_s: deque[float] = deque(maxlen=_CALLS)
        self._last_ended_ns = 0

    def observe(self, *, trip_s: float, began_ns: int, ended_ns: int, num_bytes: int = 0, latency_s: float = 0) -> None:
        """A call that took `trip_s` from its sending to its answer, and the worker from `began_ns` to `ended_ns`.

        Args:
          num_bytes: that travelled, there and back, before and after the worker's work; 0: during it as well.
          latency_s: of a message without any, there and back.
        """
        tier2_s = (ended_ns - began_ns) / 1e9
        # One that found the worker busy has waited there, nobody knows for how long.
        was_idle = (began_ns - self._last_ended_ns) / 1e9 > tier2_s / 2
        if was_idle:
            wire_s = max(trip_s - tier2_s, 0.0)
            self._wire_s.append(wire_s)
            if num_bytes:
                self._byte_s.append(max(wire_s - latency_s, 0.0) / num_bytes)
        self._tier2_s.append(tier2_s)
        self._last_ended_ns = ended_ns

    @property
    def wire_s(self) -> float:
        return min(self._wire_s, default=0.0)

    def transfer_s(self, num_bytes: int) -> float:
        """Of so many bytes, besides the latency: at the fastest pace seen."""
        return min(self._byte_s, default=0.0) * num_bytes

    @property
    def tier2_s(self) -> float:
        return statistics.median(self._tier2_s) if self._tier2_s else 0.0


class DepthRule:
    """Keeps the depth of a pipeline at what the rule says; `depth` follows at once upwards, by one step downwards."""

    def __init__(self) -> None:
        self.depth = SMALLEST_DEPTH
        self._tier1_s: deque[float] = deque(maxlen=_WALKS)
        self._walks_left = SMALLEST_DEPTH

    def observe(self, *, tier1_s: float, away_s: float) -> None:
        """A microbatch is back: tier-1 seconds of one of its stages, and those that one is away from tier 1."""
        self._tier1_s.append(tier1_s)
        self._walks_left -= 1
        if self._walks_left <= 0:
            # The mean: who waits for tier 1 may wait for what another began, so that only the sum of all is right.
            needed = depth_for(tier1_s=statistics.fmean(self._tier1_s), away_s=away_s)
            self.depth = needed if needed > self.depth else max(needed, self.depth - 1)
            self._walks_left = self.depth  # all that were there before the change


def depth_for(*, tier1_s: float, away_s: float) -> int:
    """The rule, within its limits."""
    needed = 1 + math.ceil(away_s / max(tier1_s, 1e-9)) if away_s > 0 else SMALLEST_DEPTH
    return min(max(needed, SMALLEST_DEPTH), LARGEST_DEPTH)
