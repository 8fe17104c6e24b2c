"""Blocking byte streams: a TCP socket, bare or under TLS. One thread receives while another one sends."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeAlias, cast

import numpy as np

from transport.errors import ConnectionLostError, HandshakeError, InsecureAddressError
from transport.frames import Buffer

_MAX_PARTS = os.sysconf("SC_IOV_MAX")
_TLS_CHUNK_BYTES = 1 << 18
_SPIN_S = 1e-4  # more than a small message takes to go round where nobody sleeps
_SHORT_WAIT_S = 2 * _SPIN_S  # more than it takes where both ends go to sleep and are woken
_FADING = 0.9

WhileStuck: TypeAlias = Callable[[], AbstractContextManager[None]]


class Stream(Protocol):
    """What a peer needs of a socket. Errors of the network are raised as ConnectionLostError."""

    def shake_hands(self, deadline_s: float) -> None:
        """What must be said before anything is received or sent, by this moment of the monotonic clock.

        Raises:
          HandshakeError: it fails, or takes longer.
        """
        ...

    def set_timeouts(self, receive_s: float, send_s: float) -> None:
        """How long to wait for the next byte to come or to go."""
        ...

    def receive_into(self, buffer: memoryview) -> int:
        """Bytes received, 0 at the end of the stream."""
        ...

    def has_data(self) -> bool:
        """Whether `receive_into` has something to give, be it the end."""
        ...

    def send(self, parts: Sequence[Buffer], num_bytes: int, while_stuck: WhileStuck = nullcontext) -> None:
        """Send all of it, so many bytes; blocks while the peer is slow, and that within `while_stuck()`."""
        ...

    def interrupt(self) -> None:
        """End the stream; whoever waits on it wakes up."""
        ...

    def close(self) -> None:
        """Give the socket back, once nobody uses it."""
        ...


class SocketStream:
    """A connected TCP socket.

    A core that slept takes longer to wake than a small message to go round. So where all of the last waits were short,
    as the next will be, it looks for bytes again and again before it sleeps. A longer one, as for attention, ends that
    for the next dozen: others may want the core meanwhile.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(None)
        self._socket = sock
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self._recent_wait_s = _SHORT_WAIT_S  # the longest, each fading with those that follow

    def shake_hands(self, deadline_s: float) -> None:
        """As Stream: nothing."""

    def set_timeouts(self, receive_s: float, send_s: float) -> None:
        """As Stream."""
        # The kernel's own timeouts: Python's would poll before every call.
        for option, seconds in ((socket.SO_RCVTIMEO, receive_s), (socket.SO_SNDTIMEO, send_s)):
            whole, part = divmod(max(seconds, 1e-3), 1)  # 0 would mean for ever
            self._socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(whole), int(part * 1e6)))

    def receive_into(self, buffer: memoryview) -> int:
        """As Stream."""
        try:
            return self._socket.recv_into(buffer, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return self._await_and_receive(buffer)
        except OSError as error:
            raise _broken(error) from None

    def _await_and_receive(self, buffer: memoryview) -> int:
        begin_s = time.monotonic()
        if self._recent_wait_s < _SHORT_WAIT_S:
            while not self.has_data() and time.monotonic() - begin_s < _SPIN_S:
                pass
        try:
            count = self._socket.recv_into(buffer)
        except BlockingIOError:
            raise ConnectionLostError("the peer fell silent") from None
        except OSError as error:
            raise _broken(error) from None
        self._recent_wait_s = max(time.monotonic() - begin_s, _FADING * self._recent_wait_s)
        return count

    def has_data(self) -> bool:
        """As Stream."""
        return bool(self._readable.poll(0))

    def send(self, parts: Sequence[Buffer], num_bytes: int, while_stuck: WhileStuck = nullcontext) -> None:
        """As Stream."""
        try:
            sent = self._send_now(parts)
            if sent < num_bytes:
                with while_stuck():
                    self._send_rest(_unsent([_as_bytes(part) for part in parts], sent))
        except BlockingIOError:
            raise ConnectionLostError("the peer takes nothing any more") from None
        except OSError as error:
            raise _broken(error) from None

    def _send_now(self, parts: Sequence[Buffer]) -> int:
        try:
            return self._socket.sendmsg(parts[:_MAX_PARTS], (), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0

    def _send_rest(self, left: list[memoryview]) -> None:
        while left:
            left = _unsent(left, self._socket.sendmsg(left[:_MAX_PARTS]))

    def interrupt(self) -> None:
        """As Stream."""
        with contextlib.suppress(OSError):  # the peer was faster
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """As Stream."""
        self._socket.close()


def _broken(error: OSError) -> ConnectionLostError:
    return ConnectionLostError(f"the connection broke: {error}")


def _as_bytes(part: Buffer) -> memoryview:
    # Arrays of several axes, and of types that Python has not, can be sent but not sliced as bytes.
    return part.reshape(-1).view(np.uint8).data if isinstance(part, np.ndarray) else memoryview(part)


def _unsent(parts: list[memoryview], sent: int) -> list[memoryview]:
    for index, part in enumerate(parts):
        if sent < len(part):
            return [part[sent:], *parts[index + 1 :]]
        sent -= len(part)
    return []


class TlsStream:
    """TLS over a SocketStream, encrypted in memory: OpenSSL's own sockets may not be read and written at once."""

    def __init__(self, stream: SocketStream, context: ssl.SSLContext, server_hostname: str | None) -> None:
        self._stream = stream
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_hostname is None, server_hostname=server_hostname
        )
        self._lock = threading.Lock()  # around the two above
        self._encrypted = memoryview(bytearray(_TLS_CHUNK_BYTES))

    def shake_hands(self, deadline_s: float) -> None:
        """As Stream: TLS's own handshake."""
        while True:
            try:
                self._tls.do_handshake()
                return self._flush()
            except ssl.SSLWantReadError:
                self._flush()
            except ssl.SSLError as error:
                self._flush()
                raise HandshakeError(f"TLS failed: {error}") from None
            left_s = deadline_s - time.monotonic()
            self._stream.set_timeouts(left_s, left_s)
            if left_s <= 0 or not self._fill():
                raise HandshakeError("no TLS handshake, or not in time")

    def set_timeouts(self, receive_s: float, send_s: float) -> None:
        """As Stream."""
        self._stream.set_timeouts(receive_s, send_s)

    def receive_into(self, buffer: memoryview) -> int:
        """As Stream."""
        while True:
            try:
                with self._lock:
                    return cast("int", self._tls.read(len(buffer), buffer))  # bytes without a buffer only
            except ssl.SSLWantReadError:
                if not self._fill():
                    return 0
            except ssl.SSLZeroReturnError:
                return 0
            except ssl.SSLError as error:
                raise ConnectionLostError(f"TLS failed: {error}") from None

    def has_data(self) -> bool:
        """As Stream."""
        return bool(self._tls.pending() or self._incoming.pending) or self._stream.has_data()

    def send(self, parts: Sequence[Buffer], num_bytes: int, while_stuck: WhileStuck = nullcontext) -> None:
        """As Stream."""
        del num_bytes  # more of them will be sent
        for part in map(_as_bytes, parts):
            for start in range(0, len(part), _TLS_CHUNK_BYTES):
                with self._lock:
                    self._tls.write(part[start : start + _TLS_CHUNK_BYTES])
                if self._outgoing.pending >= _TLS_CHUNK_BYTES:
                    self._flush(while_stuck)
        self._flush(while_stuck)

    def interrupt(self) -> None:
        """As Stream."""
        self._stream.interrupt()

    def close(self) -> None:
        """As Stream."""
        self._stream.close()

    def _flush(self, while_stuck: WhileStuck = nullcontext) -> None:
        with self._lock:
            encrypted = self._outgoing.read()
        self._stream.send([encrypted], len(encrypted), while_stuck)

    def _fill(self) -> bool:
        count = self._stream.receive_into(self._encrypted)
        with self._lock:
            self._incoming.write(self._encrypted[:count])
        return count > 0


def open_stream(sock: socket.socket, tls: ssl.SSLContext | None, server_hostname: str | None) -> Stream:
    """A connected socket's stream. server_hostname: what the certificate must name; None on the server's side."""
    stream = SocketStream(sock)
    return stream if tls is None else TlsStream(stream, tls, server_hostname)


def check_address(host: str, secret: bytes | None) -> None:
    """Only loopback may go without a secret.

    Raises:
      InsecureAddressError: `host`, an address in numbers, is not loopback and there is no secret.
    """
    if secret is None and not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        raise InsecureAddressError(f"address {host} without a secret; allowed without one: loopback, 127.0.0.1 or ::1")
