"""A TCP proxy that holds every byte back for a while, as a long wire would: latency without a loss of bandwidth."""

from __future__ import annotations

import queue
import socket
import threading
import time

_CHUNK_BYTES = 1 << 18


def serve_delayed(listener: socket.socket, target: tuple[str, int], one_way_s: float) -> None:
    """Forward every connection of `listener`, for ever."""
    while True:
        near, _ = listener.accept()
        far = socket.create_connection(target)
        for sock in (near, far):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for source, sink in ((near, far), (far, near)):
            threading.Thread(target=_forward, args=(source, sink, one_way_s), daemon=True).start()


def _forward(source: socket.socket, sink: socket.socket, one_way_s: float) -> None:
    underway: queue.Queue[tuple[float, bytes]] = queue.Queue()
    threading.Thread(target=_deliver, args=(underway, sink), daemon=True).start()
    data = b"begin"
    while data:
        try:
            data = source.recv(_CHUNK_BYTES)
        except OSError:
            data = b""
        underway.put((time.monotonic() + one_way_s, data))


def _deliver(underway: queue.Queue[tuple[float, bytes]], sink: socket.socket) -> None:
    while True:
        due_s, data = underway.get()
        time.sleep(max(due_s - time.monotonic(), 0))
        try:
            if not data:
                return sink.shutdown(socket.SHUT_WR)
            sink.sendall(data)
        except OSError:
            return None
