"""A TCP proxy as long or as thin as a wire may be: bytes arrive late, or one after the other at some pace."""

from __future__ import annotations

import math
import os
import queue
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from experiments.echo_process import process

_CHUNK_BYTES = 1 << 18
_PACED_BYTES = 1 << 14  # of a thin wire: small enough to come evenly


@contextmanager
def wire(address: str, *, one_way_s: float = 0.0, bytes_per_s: float = math.inf) -> Iterator[str]:
    """The address of a proxy to a server, in a process of its own on any core."""
    host, _, port = address.rpartition(":")
    with process(_serve, (host, int(port)), one_way_s, bytes_per_s) as own_port:
        yield f"127.0.0.1:{own_port}"


def _serve(pipe: Connection, target: tuple[str, int], one_way_s: float, bytes_per_s: float) -> None:
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    listener = socket.create_server(("127.0.0.1", 0))
    pipe.send(listener.getsockname()[1])
    while True:
        near, _ = listener.accept()
        far = socket.create_connection(target)
        for sock in (near, far):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for source, sink in ((near, far), (far, near)):
            args = (source, sink, one_way_s, bytes_per_s)
            threading.Thread(target=_forward, args=args, daemon=True).start()


def _forward(source: socket.socket, sink: socket.socket, one_way_s: float, bytes_per_s: float) -> None:
    underway: queue.Queue[tuple[float, bytes]] = queue.Queue()
    threading.Thread(target=_deliver, args=(underway, sink), daemon=True).start()
    data, free_s = b"begin", 0.0
    while data:
        try:
            data = source.recv(_CHUNK_BYTES if math.isinf(bytes_per_s) else _PACED_BYTES)
        except OSError:
            data = b""
        free_s = max(free_s, time.monotonic()) + len(data) / bytes_per_s  # the wire, of what came before
        underway.put((free_s + one_way_s, data))


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
