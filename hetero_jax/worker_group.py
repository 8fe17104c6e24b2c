"""Several workers as one pool: each has some KV heads of every site, and the same pages of every sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from hetero_jax.attention_layout import GroupedLayout
from hetero_jax.depth import CallTimes
from hetero_jax.head_slices import HeadSlice
from hetero_jax.pool_session import PlacedRows
from hetero_jax.tracing import Trace
from hetero_jax.worker_session import Call, Share, WorkerSession


class WorkerGroup:
    """A PoolSession over those of its members, until one of them is lost or `end` is called.

    Args:
      members: what each serves are its heads alone.
      heads: of each member, of each site.
    """

    def __init__(self, members: Sequence[WorkerSession], heads: Sequence[Sequence[HeadSlice]]) -> None:
        self.members, self._heads = tuple(members), heads
        self.address = " + ".join(member.address for member in members)
        self.num_pages = min(member.num_pages for member in members)
        self.pool_bytes = sum(member.pool_bytes for member in members)
        self._ended = False

    @property
    def times(self) -> CallTimes:
        """As PoolSession: of the slowest member, which all wait for."""
        return max((member.times for member in self.members), key=lambda times: times.wire_s + times.tier2_s)

    def end(self) -> None:
        """Nothing more is sent: the members are about to serve other pools."""
        self._ended = True

    def place(self, rows: np.ndarray, layout: GroupedLayout) -> GroupShare:
        """As PoolSession."""
        parts = [member.place(rows, layout) for member in self.members]
        return GroupShare(group=self, rows=rows, num_rows=layout.call_rows, parts=parts)

    def attend(
        self, site: int, parts: Sequence[Share], inputs: Sequence[np.ndarray], row_shape: tuple[int, ...]
    ) -> GroupCall:
        """As PlacedRows; every member gets the rows of its heads."""
        if self._ended:
            return GroupCall(())
        calls: list[Call] = []
        for part, heads in zip(parts, (of_sites[site] for of_sites in self._heads), strict=True):
            cuts = (heads.q, heads.kv, heads.kv)  # of q, k, v
            own = [np.ascontiguousarray(array[:, cut]) for array, cut in zip(inputs, cuts, strict=False)]
            calls.append(part.attend(site, own, (own[0].shape[1], *row_shape[1:])))
        return GroupCall(calls)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GroupShare(PlacedRows):
    """A group's part of the calls of a microbatch. parts: of the members, all with the same rows."""

    group: WorkerGroup
    parts: Sequence[Share]

    def attend(self, site: int, inputs: Sequence[np.ndarray], row_shape: tuple[int, ...]) -> GroupCall:
        """As PlacedRows."""
        return self.group.attend(site, self.parts, inputs, row_shape)


class GroupCall:
    """A PendingCall of the members' calls; none where the group has ended."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = calls

    def traced_by(self, trace: Trace, name: str) -> None:
        """As PendingCall, as what follows."""
        for call in self._calls:
            call.traced_by(trace, name)

    def is_ready(self) -> bool:
        return all(call.is_ready() for call in self._calls)

    def rows(self) -> np.ndarray | None:
        found = [rows for call in self._calls if (rows := call.rows()) is not None]
        return np.concatenate(found, axis=1) if found and len(found) == len(self._calls) else None
