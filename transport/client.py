"""The engine's end of a connection to a worker: requests out, answers back."""

from __future__ import annotations

import itertools
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from typing import Any

from transport.answers import Answer, Reader
from transport.buffers import Tensor
from transport.errors import (
    ConnectionLostError,
    FrameError,
    IntegrityError,
    RefusedError,
    RemoteError,
    TransportError,
    VersionError,
)
from transport.frames import FrameLimits
from transport.handshake import Role
from transport.messages import (
    Attend,
    Drain,
    Error,
    FetchPages,
    Hello,
    Layout,
    Message,
    Pages,
    Ping,
    Pong,
    Query,
    Release,
    Result,
    Stats,
    StatsRequest,
    StorePages,
    check_hello,
)
from transport.peer import Peer, Timing
from transport.protocol import Connection
from transport.streams import check_address, open_stream


class WorkerClient:
    """A worker, seen from the engine. Any thread may call it; requests are served in the order of the calls.

    welcome: the worker's last Hello, with what it grants.
    draining: set once the worker is about to leave.
    failure: why the worker is lost; None while it is there.

    A lost worker fails all answers, and every later call, with ConnectionLostError.
    """

    def __init__(self, peer: Peer, hello: Hello) -> None:
        """Agree with a peer that has shaken hands; `connect` does it all."""
        self.welcome = _agree(peer, hello)
        self.draining = threading.Event()
        self.round_trip_s: float | None = None  # of the last heartbeat
        self._peer = peer
        self._ids = itertools.count(1)
        self._pending: dict[int, Answer[Any]] = {}
        self.failure: str | None = None
        self._progress_s = 0.0  # of the last answer, or of the first request after it
        peer.start(lambda: Ping(token=time.monotonic_ns()))
        self._reader = Reader(peer.receive, peer.has_data, self._take, self._end)

    @property
    def waiting_since_s(self) -> float | None:
        """When it last answered, or was asked first since then, by the monotonic clock; None where all is answered."""
        return self._progress_s if self._pending else None

    def hello(self, hello: Hello) -> Answer[Hello]:
        """Begin anew, of the same plan, after the requests so far; where the worker refuses, it is lost."""
        return self._ask(hello.generation, hello)  # a clock's, so it is not the number of any request

    def layout(self, *, slot: int, arrays: Mapping[str, Tensor]) -> None:
        """Send a Layout for the Attends to come."""
        self._check()
        self._send(Layout(slot=slot, arrays=arrays))

    def attend(
        self,
        *,
        site: int,
        layout: int,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        ahead: bool = False,
    ) -> Answer[Result]:
        """Send an Attend; blocks only while the worker takes no more bytes. ahead: q goes in a Query of its own before.

        The answer raises RemoteError where the worker's handler failed.
        """
        if ahead:
            self._check()
            self._send(Query(site=site, layout=layout, q=q))
        request_id = next(self._ids)
        left = None if ahead else q
        return self._ask(request_id, Attend(request_id=request_id, site=site, layout=layout, q=left, k=k, v=v))

    def stats(self) -> Answer[Stats]:
        """Ask for the worker's figures."""
        request_id = next(self._ids)
        return self._ask(request_id, StatsRequest(request_id=request_id))

    def fetch_pages(self, pages: Tensor) -> Answer[Pages]:
        """Ask for what is in pages [n] int64, after the requests so far."""
        request_id = next(self._ids)
        return self._ask(request_id, FetchPages(request_id=request_id, pages=pages))

    def store_pages(self, pages: Tensor, arrays: tuple[Tensor, ...]) -> None:
        """Put the arrays of a Pages into pages [n] int64, before the requests to come."""
        self._check()
        self._send(StorePages(pages=pages, arrays=arrays))

    def read_ready(self) -> None:
        """Take the answers that have come, without waiting."""
        self._reader.read_ready()

    def release(self, pages: Tensor) -> None:
        """Give pages back, [n] int64, after the requests so far."""
        self._check()
        self._send(Release(pages=pages))

    def close(self) -> None:
        """End the connection; what is pending fails."""
        self._peer.interrupt()
        self._reader.join()

    def _ask(self, request_id: int, request: Message) -> Answer[Any]:
        answer: Answer[Any] = Answer(self._reader)
        if not self._pending:
            self._progress_s = time.monotonic()
        self._pending[request_id] = answer
        try:
            self._check()  # after the line above: the end of the connection fails what it finds there
            self._send(request)
        except TransportError:
            self._pending.pop(request_id, None)
            raise
        return answer

    def _send(self, message: Message) -> None:
        self._peer.send(message, self._reader.while_stuck)

    def _check(self) -> None:
        if self.failure is not None:
            raise ConnectionLostError(f"the worker is lost: {self.failure}")

    def _end(self, error: TransportError) -> None:
        self.failure = str(error)  # the error itself would keep the frames of whoever was reading
        self._peer.close()
        while self._pending:
            _, answer = self._pending.popitem()
            answer.set_exception(ConnectionLostError(f"the worker is lost: {error}"))

    def _take(self, message: Message) -> None:
        match message:
            case Result() | Stats() | Pages():
                self._answered(message.request_id).set_result(message)
            case Hello():
                self._welcomed(message)
            case Error(request_id=0):
                raise _as_exception(message)
            case Error():
                self._answered(message.request_id).set_exception(_as_exception(message))
            case Pong(token=token):
                if token:
                    self.round_trip_s = (time.monotonic_ns() - token) / 1e9
            case Drain():
                self.draining.set()
            case _:
                raise FrameError(f"a worker sent {type(message).__name__}; allowed: answers, Hello, Pong, Drain, Error")

    def _welcomed(self, welcome: Hello) -> None:
        ours = self.welcome
        check_hello(theirs=welcome, protocol_version=ours.protocol_version, fingerprint=ours.fingerprint)
        answer = self._answered(welcome.generation)
        self.welcome = welcome
        answer.set_result(welcome)

    def _answered(self, request_id: int) -> Answer[Any]:
        answer = self._pending.pop(request_id, None)
        if answer is None:
            raise FrameError(f"an answer to request {request_id}, which is not pending")
        self._progress_s = time.monotonic()
        return answer


def connect(
    host: str,
    port: int,
    hello: Hello,
    *,
    secret: bytes | None = None,
    tls: ssl.SSLContext | None = None,
    timing: Timing | None = None,
    limits: FrameLimits | None = None,
) -> WorkerClient:
    """Connect to a worker and agree on a plan.

    Raises:
      InsecureAddressError: no secret, and an address that is not loopback.
      HandshakeError: VersionError, AuthenticationError or RefusedError, with both sides' values.
      ConnectionLostError: nobody there.
    """
    timing = timing or Timing()
    try:
        sock = socket.create_connection((host, port), timing.handshake_s)
    except OSError as error:
        raise ConnectionLostError(f"no worker at {host}:{port}: {error}") from None
    try:
        check_address(sock.getpeername()[0], secret)
        peer = Peer(open_stream(sock, tls, host), Connection(Role.CLIENT, secret, limits), timing)
        peer.shake_hands()
        return WorkerClient(peer, hello)
    except BaseException:
        sock.close()
        raise


def _agree(peer: Peer, hello: Hello) -> Hello:
    peer.send(hello)
    peer.await_welcome()
    welcome = peer.receive()
    if isinstance(welcome, Error):
        raise _as_exception(welcome)
    if not isinstance(welcome, Hello):
        raise FrameError(f"a worker began with {type(welcome).__name__}; allowed: Hello, Error")
    check_hello(theirs=welcome, protocol_version=hello.protocol_version, fingerprint=hello.fingerprint)
    return welcome


def _as_exception(message: Error) -> TransportError:
    return _KINDS.get(message.kind, RemoteError)(f"the worker says: {message.text}")


_KINDS: dict[str, type[TransportError]] = {
    kind.__name__: kind for kind in (FrameError, IntegrityError, RefusedError, VersionError)
}
