from __future__ import annotations

import socket
from types import SimpleNamespace

from transport import streams
from transport.streams import SocketStream


class ScriptedSocket:
    """Nothing is there at first; the next byte comes after `wait_s` of a clock of its own."""

    def __init__(self, sock: socket.socket) -> None:
        self.now_s = self.wait_s = self.comes_s = 0.0
        self.fileno, self.settimeout = sock.fileno, sock.settimeout

    def setsockopt(self, *option: object) -> None: ...

    def recv_into(self, buffer: memoryview, size: int = 0, flags: int = 0) -> int:
        if flags & socket.MSG_DONTWAIT:
            self.comes_s = self.now_s + self.wait_s
            raise BlockingIOError
        self.now_s = max(self.now_s, self.comes_s)
        return 1


class CountingStream(SocketStream):
    """Counts how often it looks for bytes, which takes 10 us."""

    def __init__(self, sock: ScriptedSocket) -> None:
        super().__init__(sock)  # type: ignore[arg-type]
        self.sock, self.looks = sock, 0

    def has_data(self) -> bool:
        self.looks += 1
        self.sock.now_s += 10e-6
        return self.sock.now_s >= self.sock.comes_s

    def looks_in(self, wait_s: float) -> int:
        self.sock.wait_s, before = wait_s, self.looks
        assert self.receive_into(memoryview(bytearray(1))) == 1
        return self.looks - before


def test_only_many_short_waits_in_a_row_let_it_spin(monkeypatch):
    with socket.socketpair()[0] as sock:
        scripted = ScriptedSocket(sock)
        monkeypatch.setattr(streams, "time", SimpleNamespace(monotonic=lambda: scripted.now_s))
        stream = CountingStream(scripted)
        assert stream.looks_in(1.0) == 0  # of a peer of whom nothing is known
        assert sum(stream.looks_in(50e-6) for _ in range(20)) == 0
        assert sum(stream.looks_in(50e-6) for _ in range(200)) > 500
        assert 9 <= stream.looks_in(1e-3) <= 11  # then it sleeps
        assert sum(stream.looks_in(50e-6) for _ in range(10)) == 0
        calls_of_attention = [stream.looks_in(wait_s) for _ in range(50) for wait_s in (50e-6, 150e-6, 500e-6)]
        assert sum(calls_of_attention[30:]) == 0
