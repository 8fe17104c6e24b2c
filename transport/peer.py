"""The other end of a socket, message by message: one thread receives, any number send."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass

from transport.errors import ConnectionLostError, HandshakeError, TransportError
from transport.messages import Error, Message
from transport.protocol import Connection
from transport.streams import Stream, WhileStuck


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds.

    handshake_s: from the connection to the engine's Hello.
    welcome_s: from there to the worker's; it makes room for the cache meanwhile.
    heartbeat_s: between signs of life of this side.
    silence_s: without any byte of the peer, it counts as lost.
    stall_s: without any byte taken by the peer, while there is something to send, it counts as lost.
    """

    handshake_s: float = 5.0
    welcome_s: float = 300.0
    heartbeat_s: float = 2.0
    silence_s: float = 8.0
    stall_s: float = 8.0


class Peer:
    """A connection over a stream. Sending blocks while the peer is slow: nothing is queued, so memory stays bounded."""

    def __init__(self, stream: Stream, connection: Connection, timing: Timing) -> None:
        self._stream, self._connection, self._timing = stream, connection, timing
        self._sending = threading.Lock()
        self._closing = threading.Event()
        self._received: list[Message] = []
        self._deadline_s: float | None = time.monotonic() + timing.handshake_s

    def shake_hands(self) -> None:
        """Prove who this side is, and see who the other one is.

        Raises:
          HandshakeError: not one to talk to, or not in time.
          ConnectionLostError: the peer closed.
        """
        if self._deadline_s is not None:
            self._stream.shake_hands(self._deadline_s)
        try:
            while not self._connection.established:
                self._send_handshake()
                self._receive_some()
        finally:
            self._send_handshake()

    def await_welcome(self) -> None:
        """The peer has shaken hands, and now takes `welcome_s` at most for its next message."""
        self._deadline_s = time.monotonic() + self._timing.welcome_s

    def receive(self) -> Message:
        """The next message; for one thread.

        Raises:
          ConnectionLostError: there will be none.
          HandshakeError: none came in time, before `start`.
          FrameError: the peer sent something else.
        """
        while not self._received:
            self._receive_some()
        return self._received.pop(0)

    def has_data(self) -> bool:
        """Whether a message, or some of one, is there; for the thread that receives."""
        return bool(self._received) or self._stream.has_data()

    def messages(self) -> Iterator[Message]:
        """What `receive` gives, until it raises."""
        while True:
            yield self.receive()

    def send(self, message: Message, while_stuck: WhileStuck = nullcontext) -> None:
        """Send a message, after those of other threads; its tensors may be changed once this returns.

        Args:
          while_stuck: entered where the peer does not take it all at once.
        Raises:
          ConnectionLostError: the peer is gone, or took nothing for `stall_s`.
          FrameError: the message does not fit a frame.
        """
        with self._sending:
            if self._closing.is_set():
                raise ConnectionLostError("this side closed the connection")
            try:
                parts, num_bytes = self._connection.encode(message)
                self._stream.send(parts, num_bytes, while_stuck)
            except ConnectionLostError:
                self.interrupt()  # a frame was cut: nothing may follow it
                raise

    def start(self, sign_of_life: Callable[[], Message]) -> None:
        """Both sides have agreed: from now on the peer may take its time, but must give signs of life, as we do."""
        self._deadline_s = None
        self._stream.set_timeouts(self._timing.silence_s, self._timing.stall_s)
        threading.Thread(target=self._beat, args=(sign_of_life,), name="heartbeat", daemon=True).start()

    def refuse(self, error: TransportError) -> None:
        """Tell the peer why the connection closes, if it still listens."""
        if self._connection.established and not isinstance(error, ConnectionLostError):
            with suppress(ConnectionLostError):
                self.send(Error(request_id=0, kind=type(error).__name__, text=str(error)[:1000]))

    def interrupt(self) -> None:
        """End the connection from any thread; who receives or sends gets ConnectionLostError."""
        self._closing.set()
        self._stream.interrupt()

    def close(self) -> None:
        """End the connection; for the thread that receives."""
        self.interrupt()
        with self._sending:
            self._stream.close()

    def _receive_some(self) -> None:
        if self._deadline_s is not None:
            self._await_deadline(self._deadline_s)
        count = self._stream.receive_into(self._connection.receive_buffer())
        if not count:
            raise ConnectionLostError(f"the peer closed the connection {self._where()}")
        self._received += self._connection.received(count)

    def _where(self) -> str:
        if not self._connection.established:
            return "during the handshake, as it does where its secret is another one"
        return "between two messages" if self._connection.may_end else "in the middle of something"

    def _await_deadline(self, deadline_s: float) -> None:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise HandshakeError(f"no handshake within {self._timing.handshake_s} s")
        self._stream.set_timeouts(left_s, left_s)

    def _send_handshake(self) -> None:
        if output := self._connection.take_output():
            self._stream.send([output], len(output))

    def _beat(self, sign_of_life: Callable[[], Message]) -> None:
        try:
            while not self._closing.wait(self._timing.heartbeat_s):
                self.send(sign_of_life())
        except ConnectionLostError:
            pass  # who receives hears of it too
