"""What engine and worker say to each other, and each message's number on the wire."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from transport.buffers import Tensor
from transport.errors import RefusedError, VersionError
from transport.header import Scalar

PROTOCOL_VERSION = 4
MAX_LAYOUTS = 64
MAX_PAGES_BYTES = 128 << 20  # of pages in one message


@dataclass(frozen=True, kw_only=True, eq=False)
class Hello:
    """First message of both sides. The engine offers; the worker answers with what it grants.

    Later ones of the engine, of the same plan, ask for something else in place of that; the worker's answer takes its
    turn among those to Attends.

    protocol_version: of these messages.
    fingerprint: of the plan; a worker serves one plan at a time and echoes it.
    generation: grows with every connection of a job, also across restarts of the engine (a clock will do); a worker
      refuses one that is not larger than the last of the same plan, and echoes the others.
    page_budget: pages per site that the engine wants, or that the worker grants.
    sites: per attention site, its description by name (heads, head_dim, scale, ...).
    artifacts: programs (uint8) and weights that descriptions refer to by index.
    """

    protocol_version: int = PROTOCOL_VERSION
    fingerprint: str
    generation: int
    page_budget: int
    sites: tuple[Mapping[str, Scalar], ...] = ()
    artifacts: tuple[Tensor, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """Which rows of the Attends to come belong to which sequence, positions and pages; has no answer.

    slot: below MAX_LAYOUTS; takes the place of what the slot had, so a worker keeps no more than so many.
    arrays: by name.
    """

    slot: int
    arrays: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Query:
    """q of the Attend that comes next, so that attention over what is cached begins before k and v are there."""

    site: int
    layout: int
    q: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Attend:
    """Append k and v to the cache of `site`, then attend with q; answered by a Result.

    layout: slot of the call's Layout, which all sites of a microbatch share.
    q: [rows, heads, head_dim]; k: [rows, kv_heads, head_dim]; v: [rows, kv_heads, v_head_dim], in the wire's dtype.
      Without q, that of the Query right before. Without k and v, attend over what is cached; or, for a site that came
      as a program, [rows, bytes] uint8 of all that it takes.
    """

    request_id: int
    site: int
    layout: int
    q: Tensor | None
    k: Tensor | None = None
    v: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """Answer to an Attend.

    out: [rows, heads, v_head_dim], or [rows, bytes] uint8 of a program.
    log_sum_exp: [rows, heads], where parts will be merged.
    began_ns, ended_ns: of the worker's work, by its own clock; that on a Query counts as if done right before.
    """

    request_id: int
    out: Tensor
    log_sum_exp: Tensor | None = None
    began_ns: int = 0
    ended_ns: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Release:
    """Pages that no sequence uses any more: [n] int64; takes its turn among the Attends and has no answer."""

    pages: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class FetchPages:
    """Ask for what is in pages, [n] int64, of all sites, after the requests so far; answered by Pages.

    What it asks for may have MAX_PAGES_BYTES at most.
    """

    request_id: int
    pages: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Pages:
    """Answer to a FetchPages. arrays: [n, bytes] uint8 of each array of the pools, as it is in memory."""

    request_id: int
    arrays: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class StorePages:
    """Put the arrays of a Pages into pages, [n] int64; takes its turn among the Attends and has no answer."""

    pages: Tensor
    arrays: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class StatsRequest:
    """Ask for Stats."""

    request_id: int


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Figures of the worker by name (free pages, seconds busy, ...)."""

    request_id: int
    values: Mapping[str, Scalar] = field(default_factory=dict[str, Scalar])


@dataclass(frozen=True, kw_only=True)
class Ping:
    """Sign of life; answered by a Pong with the same token."""

    token: int


@dataclass(frozen=True, kw_only=True)
class Pong:
    """Answer to a Ping."""

    token: int


@dataclass(frozen=True, kw_only=True)
class Drain:
    """The worker is about to leave: send it no new sequences, and move those it has."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Error:
    """A request failed; request_id 0: the connection, which closes. kind: a name in `transport.errors`."""

    request_id: int
    kind: str
    text: str


Message: TypeAlias = (
    Hello
    | Attend
    | Result
    | Release
    | StatsRequest
    | Stats
    | Ping
    | Pong
    | Drain
    | Error
    | Layout
    | FetchPages
    | Pages
    | StorePages
    | Query
)

# By number on the wire, from 1; append only.
MESSAGE_TYPES: tuple[type[Message], ...] = (
    Hello,
    Attend,
    Result,
    Release,
    StatsRequest,
    Stats,
    Ping,
    Pong,
    Drain,
    Error,
    Layout,
    FetchPages,
    Pages,
    StorePages,
    Query,
)


def check_hello(*, theirs: Hello, protocol_version: int, fingerprint: str | None) -> None:
    """Both sides must mean the same.

    Raises:
      VersionError: other messages.
      RefusedError: another plan; fingerprint None takes any.
    """
    if theirs.protocol_version != protocol_version:
        raise VersionError(f"the peer speaks protocol version {theirs.protocol_version}, this side {protocol_version}")
    if fingerprint is not None and theirs.fingerprint != fingerprint:
        raise RefusedError(f"the peer's plan is {theirs.fingerprint!r}, that of this side {fingerprint!r}")
