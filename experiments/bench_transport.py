"""What the transport costs beside the same bytes over bare sockets, in the same run.

    python -m experiments.bench_transport

A worker process echoes: bare, with `sendall` and `recv_into`; through the transport; and through the transport with
each protection. Round trip: one message at a time, there and back. Throughput: messages one way, each answered by one
byte or an empty result, so many in flight as --in_flight says. Each contender's turns alternate with bare ones; the
figure is the median of the ratios of neighbours, for the machine's speed drifts.
"""

from __future__ import annotations

import os
import socket
import ssl
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from absl import app, flags

from experiments.certificate import loopback_certificate
from experiments.echo_process import ECHO, SINK, process, serving_process
from experiments.markdown import print_header, print_row
from transport import Hello, connect

_SIZES = flags.DEFINE_list(
    "sizes", ["1024", "65536", "262144", "1048576", "4194304", "16777216"], "Bytes of a message."
)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Pairs of turns, bare and other, per figure.", lower_bound=1)
_TURN_S = flags.DEFINE_float("turn_s", 0.2, "Seconds of a turn.", lower_bound=0.01)
_IN_FLIGHT = flags.DEFINE_integer("in_flight", 4, "Messages under way when throughput is measured.", lower_bound=1)

_SECRET = b"of the bench alone"
_PROTECTIONS = {  # secret, TLS
    "authentication off": (None, False),
    "authentication": (_SECRET, False),
    "TLS": (None, True),
    "authentication and TLS": (_SECRET, True),
}


def main(argv: list[str]) -> None:
    """Print one table: a row for each protection and size."""
    del argv
    print_header(["protection", "bytes", "bare round trip", "round trip / bare", "bare GB/s", "throughput / bare"])
    with ExitStack() as stack:
        bare_port = stack.enter_context(process(_serve_bare))
        certificates = loopback_certificate(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        for name, (secret, tls) in _PROTECTIONS.items():
            port = stack.enter_context(serving_process(secret, certificates if tls else None))
            for size in map(int, _SIZES.value):
                print_row([name, size, *_compare(bare_port, port, size, secret, certificates if tls else None)])


def _compare(
    bare_port: int, port: int, size: int, secret: bytes | None, certificates: tuple[str, str] | None
) -> list[str]:
    context = ssl.create_default_context(cafile=certificates[0]) if certificates else None
    hello = Hello(fingerprint="bench", generation=time.time_ns(), page_budget=0)
    client = connect("127.0.0.1", port, hello, secret=secret, tls=context)
    q = np.ones(size, np.int8)
    ask = [lambda site=site: client.attend(site=site, layout=0, q=q) for site in (ECHO, SINK)]
    round_trips = _ratios(_bare_turn(bare_port, size, ECHO), lambda: _turn(ask[ECHO], 1))
    streams = _ratios(_bare_turn(bare_port, size, SINK), lambda: _turn(ask[SINK], _IN_FLIGHT.value))
    client.close()
    return [
        f"{round_trips[0] * 1e6:.0f} us",
        f"{round_trips[1]:.2f}",
        f"{size / streams[0] / 1e9:.2f}",
        f"{1 / streams[1]:.2f}",
    ]


def _ratios(bare: Callable[[], float], other: Callable[[], float]) -> tuple[float, float]:
    """Median seconds per message of `bare`, and median of other / bare."""
    for warm_up in (bare, other):
        warm_up()
    pairs = [(bare(), other()) for _ in range(_ROUNDS.value)]
    return statistics.median(a for a, _ in pairs), statistics.median(b / a for a, b in pairs)


def _turn(ask: Callable, in_flight: int) -> float:
    """Seconds per message."""
    start_s, count, pending = time.perf_counter(), 0, deque()
    while time.perf_counter() - start_s < _TURN_S.value:
        pending.append(ask())
        if len(pending) == in_flight:
            pending.popleft().result()
        count += 1
    while pending:
        pending.popleft().result()
    return (time.perf_counter() - start_s) / count


def _bare_turn(port: int, size: int, site: int) -> Callable[[], float]:
    """The same by `sendall` and `recv_into`, both sides knowing the size."""
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(bytes([site]) + size.to_bytes(8, "little"))
    message, answer = bytearray(size), memoryview(bytearray(size if site == ECHO else 1))
    in_flight = 1 if site == ECHO else _IN_FLIGHT.value

    def turn() -> float:
        start_s, count, pending = time.perf_counter(), 0, 0
        while time.perf_counter() - start_s < _TURN_S.value:
            sock.sendall(message)
            count, pending = count + 1, pending + 1
            if pending == in_flight:
                _receive(sock, answer)
                pending -= 1
        for _ in range(pending):
            _receive(sock, answer)
        return (time.perf_counter() - start_s) / count

    return turn


def _receive(sock: socket.socket, buffer: memoryview) -> bool:
    filled = 0
    while filled < len(buffer):
        count = sock.recv_into(buffer[filled:])
        if not count:
            return False
        filled += count
    return True


def _serve_bare(pipe) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    pipe.send(listener.getsockname()[1])
    while True:
        sock, _ = listener.accept()
        if os.fork() == 0:
            _echo_bare(sock)
            os._exit(0)
        sock.close()


def _echo_bare(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    header = memoryview(bytearray(9))
    _receive(sock, header)
    buffer = memoryview(bytearray(int.from_bytes(header[1:], "little")))
    while _receive(sock, buffer):
        sock.sendall(buffer if header[0] == ECHO else b"\0")


if __name__ == "__main__":
    app.run(main)
