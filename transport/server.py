"""The worker's end: any number of connections, of which one has the worker's ear."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from typing import Protocol

from transport.errors import ConnectionLostError, FrameError, HandshakeError, RefusedError, RemoteError, TransportError
from transport.frames import FrameLimits
from transport.handshake import MIN_SECRET_BYTES, Role
from transport.header import Scalar
from transport.messages import (
    MAX_LAYOUTS,
    MAX_PAGES_BYTES,
    PROTOCOL_VERSION,
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

_logger = logging.getLogger(__name__)
_BACKLOG = 256
_TICK_S = 1.0  # a signal that comes right before the wait for a connection does not interrupt it
_MAX_CONNECTIONS = 2048  # threads; most of them wait for bytes


class Handler(Protocol):
    """What a worker does with messages. One thread at a time calls it.

    What `attend`, `fetch_pages` and `stats` raise goes to the engine as a RemoteError, and the session goes on; what
    `hello`, `layout`, `query`, `release` and `store_pages` raise ends it. Arrays in messages are views of receive
    buffers: they stay valid as long as they are held.
    """

    def hello(self, hello: Hello) -> Hello:
        """Begin a session with a new engine, or begin anew with the same, forgetting all that was.

        Returns:
          What is granted, with the engine's fingerprint.

        Raises:
          RefusedError: it cannot be served.
        """
        ...

    def layout(self, layout: Layout) -> None:
        """Keep the layout of Attends to come in its slot."""
        ...

    def query(self, query: Query) -> None:
        """Begin with q of the Attend to come, or keep it."""
        ...

    def attend(self, attend: Attend) -> Result:
        """Serve one call; the Result has its request id."""
        ...

    def release(self, release: Release) -> None:
        """Forget pages."""
        ...

    def fetch_pages(self, fetch: FetchPages) -> Pages:
        """What is in pages; MAX_PAGES_BYTES at most. The Pages have the request's id."""
        ...

    def store_pages(self, store: StorePages) -> None:
        """Put what `fetch_pages` of another worker gave into pages."""
        ...

    def stats(self) -> Mapping[str, Scalar]:
        """Figures by name."""
        ...


class WorkerServer:
    """Serves a handler to one engine at a time; whoever else connects costs a waiting thread until it is refused.

    Of one plan, a newer generation takes over from an older one (an engine that lost its connection or was started
    again); another plan is refused as long as the present one has a session, and everyone once it drains.
    """

    def __init__(
        self,
        handler: Handler,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        secret: bytes | None = None,
        tls: ssl.SSLContext | None = None,
        timing: Timing | None = None,
        limits: FrameLimits | None = None,
    ) -> None:
        """Listen, but do not serve yet. host: an address in numbers; port 0: any free one, see `address`.

        Raises:
          InsecureAddressError: no secret, and an address that is not loopback.
          HandshakeError: the secret is too short.
        """
        check_address(host, secret)
        if secret is not None and len(secret) < MIN_SECRET_BYTES:
            raise HandshakeError(f"a secret of {len(secret)} bytes; allowed: at least {MIN_SECRET_BYTES}")
        self._handler, self._secret, self._tls = handler, secret, tls
        self._timing, self._limits = timing or Timing(), limits
        self._listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=_BACKLOG
        )
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._sessions = _Sessions(handler, self._timing.handshake_s, self._stop_accepting)
        self._stopping = False

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that it listens on."""
        return self._listener.getsockname()[:2]

    def serve_forever(self) -> None:
        """Accept and serve until `stop` is called, or `drain` has come to its end."""
        self._listener.settimeout(_TICK_S)
        while not self._stopping:
            try:
                sock, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                if self._stopping:
                    return
                raise
            if len(self._connections) >= _MAX_CONNECTIONS:
                sock.close()
                continue
            thread = threading.Thread(target=self._serve, args=(sock,), name="connection", daemon=True)
            self._connections[sock] = thread
            thread.start()

    def drain(self, reason: str) -> None:
        """Leave once the engine lets go, which it does when it has moved its sequences; at once where there is none.

        `serve_forever` then returns. May be called by another thread or by a signal's handler.
        """
        self._sessions.drain(reason)

    def stop(self) -> None:
        """End all connections and `serve_forever`; waits for the handler."""
        self._stop_accepting()
        self._listener.close()
        for sock, thread in list(self._connections.items()):
            _shutdown(sock)
            thread.join()

    def _stop_accepting(self) -> None:
        self._stopping = True
        _shutdown(self._listener)

    def _serve(self, sock: socket.socket) -> None:
        try:
            stream = open_stream(sock, self._tls, None)
            peer = Peer(stream, Connection(Role.SERVER, self._secret, self._limits), self._timing)
            self._converse(peer)
        except ConnectionLostError as error:
            _logger.info("a connection ended: %s", error)
        except TransportError as error:
            _logger.warning("a connection was refused: %s", error)
        finally:
            sock.close()
            del self._connections[sock]

    def _converse(self, peer: Peer) -> None:
        try:
            peer.shake_hands()
            welcome = self._sessions.begin(peer, peer.receive())
            peer.send(welcome)
            peer.start(lambda: Pong(token=0))
            for message in peer.messages():
                is_hello = isinstance(message, Hello)
                answer = self._sessions.renew(message) if is_hello else _answer(self._handler, message)
                if answer is not None:
                    peer.send(answer)
        except TransportError as error:
            peer.refuse(error)
            raise
        except Exception as error:  # of the handler, where no request can be answered with it
            failure = RemoteError(f"{type(error).__name__}: {error}")
            peer.refuse(failure)
            raise failure from error
        finally:
            self._sessions.end(peer)
            peer.close()


class _Sessions:
    """Which peer has the handler's ear."""

    def __init__(self, handler: Handler, patience_s: float, left: Callable[[], None]) -> None:
        """left: called once it drains and there is no session."""
        self._handler, self._patience_s, self._left = handler, patience_s, left
        self._draining = ""  # why
        self._lock = threading.Lock()  # around beginnings
        self._peer: Peer | None = None
        self._ended = threading.Event()
        self._fingerprint, self._generation = "", 0

    def begin(self, peer: Peer, hello: Message) -> Hello:
        if not isinstance(hello, Hello):
            raise FrameError(f"an engine began with {type(hello).__name__}; allowed: Hello")
        with self._lock:
            self._check(hello)
            self._take_over()
            welcome = self._handler.hello(hello)
            self._peer, self._ended = peer, threading.Event()
            self._fingerprint, self._generation = hello.fingerprint, hello.generation
            return welcome

    def renew(self, hello: Hello) -> Hello:
        """The one that has the handler's ear begins anew, also while the worker drains."""
        self._check_generation(hello, self._fingerprint)
        welcome = self._handler.hello(hello)
        self._generation = hello.generation
        return welcome

    def end(self, peer: Peer) -> None:
        if self._peer is peer:
            self._peer = None
            self._ended.set()
            if self._draining:
                self._left()

    def drain(self, reason: str) -> None:
        self._draining = reason
        if (peer := self._peer) is None:
            self._left()
            return
        with contextlib.suppress(ConnectionLostError):  # the session ends by itself
            peer.send(Drain(reason=reason))

    def _check(self, hello: Hello) -> None:
        if self._draining:
            raise RefusedError(f"the worker is about to leave: {self._draining}")
        self._check_generation(hello, self._fingerprint if self._peer is not None else None)

    def _check_generation(self, hello: Hello, fingerprint: str | None) -> None:
        check_hello(theirs=hello, protocol_version=PROTOCOL_VERSION, fingerprint=fingerprint)
        if hello.fingerprint == self._fingerprint and hello.generation <= self._generation:
            raise RefusedError(f"generation {hello.generation} of the engine; allowed: above {self._generation}")

    def _take_over(self) -> None:
        if (older := self._peer) is not None:
            older.interrupt()
            if not self._ended.wait(self._patience_s):
                raise RefusedError("the worker is still busy with a call of an older generation; try again")


def _answer(handler: Handler, message: Message) -> Message | None:
    match message:
        case Attend():
            return _guarded(message.request_id, lambda: handler.attend(message))
        case StatsRequest():
            return _guarded(message.request_id, lambda: Stats(request_id=message.request_id, values=handler.stats()))
        case Layout(slot=slot):
            if slot >= MAX_LAYOUTS:
                raise FrameError(f"a layout for slot {slot}; allowed: below {MAX_LAYOUTS}")
            return handler.layout(message)
        case Query():
            return handler.query(message)
        case Release():
            return handler.release(message)
        case FetchPages():
            return _guarded(message.request_id, lambda: handler.fetch_pages(message))
        case StorePages(arrays=arrays):
            if (size := sum(array.nbytes for array in arrays)) > MAX_PAGES_BYTES:
                raise FrameError(f"{size} bytes of pages in a message; allowed: at most {MAX_PAGES_BYTES}")
            return handler.store_pages(message)
        case Ping():
            return Pong(token=message.token)
        case Error():
            raise ConnectionLostError(f"the engine ended the connection: {message.text}")
        case _:
            raise FrameError(
                f"an engine sent {type(message).__name__}; allowed: Hello, Attend, Layout, Query, Release, "
                "FetchPages, StorePages, StatsRequest, Ping"
            )


def _guarded(request_id: int, call: Callable[[], Message]) -> Message:
    try:
        return call()
    except Exception as error:
        _logger.exception("request %d failed", request_id)
        return Error(request_id=request_id, kind="RemoteError", text=f"{type(error).__name__}: {error}"[:1000])


def _shutdown(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is not connected any more
        sock.shutdown(socket.SHUT_RDWR)
