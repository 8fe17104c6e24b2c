"""What strangers cost: calls to a worker alone, and beside peers that send it a byte a second.

    python -m experiments.bench_slow_peers

The worker closes each stranger when its handshake takes too long; it comes again at once. Turns with and without them
alternate; the figure is the median of the ratios of neighbours (target: under 1.05 with 500).
"""

from __future__ import annotations

import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from absl import app, flags

from experiments.echo_process import ECHO, serving_process
from transport import Hello, connect

_PEERS = flags.DEFINE_integer("peers", 500, "Strangers at a time.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Pairs of turns.", lower_bound=1)
_TURN_S = flags.DEFINE_float("turn_s", 2.0, "Seconds of a turn.", lower_bound=0.01)
_BYTES = flags.DEFINE_integer("bytes", 1 << 18, "Of a call, and of its answer.", lower_bound=1)

_SECRET = b"of the bench alone"


def main(argv: list[str]) -> None:
    """Print the median ratio, and how many strangers came."""
    del argv
    with serving_process(_SECRET) as port:
        hello = Hello(fingerprint="bench", generation=time.time_ns(), page_budget=0)
        client = connect("127.0.0.1", port, hello, secret=_SECRET)
        q = np.ones(_BYTES.value, np.int8)

        def turn() -> float:
            """Seconds per call."""
            begin_s, count = time.perf_counter(), 0
            while time.perf_counter() - begin_s < _TURN_S.value:
                client.attend(site=ECHO, layout=0, q=q).result()
                count += 1
            return (time.perf_counter() - begin_s) / count

        turn()
        ratios = []
        for _ in range(_ROUNDS.value):
            alone_s = turn()
            with _strangers(port, _PEERS.value) as came:
                ratios.append(turn() / alone_s)
        client.close()
    print(
        f"{_PEERS.value} peers of 1 byte/s: a call takes {statistics.median(ratios):.3f} of its time without them "
        f"({min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} turns); {came[0]} connections in the last turn"
    )


@contextmanager
def _strangers(port: int, count: int) -> Iterator[list[int]]:
    """So many at any time; gives how many there were in all."""
    stop, came = threading.Event(), [0]
    thread = threading.Thread(target=_send_slowly, args=(port, count, stop, came), daemon=True)
    thread.start()
    while came[0] < count:
        time.sleep(0.01)
    try:
        yield came
    finally:
        stop.set()
        thread.join()


def _send_slowly(port: int, count: int, stop: threading.Event, came: list[int]) -> None:
    peers: list[socket.socket] = []
    while not stop.wait(1.0 if len(peers) == count else 0):
        peers = [peer for peer in peers if _send_byte(peer)]
        while len(peers) < count:
            peers.append(socket.create_connection(("127.0.0.1", port)))
            came[0] += 1
    for peer in peers:
        peer.close()


def _send_byte(peer: socket.socket) -> bool:
    """False where the other side has closed."""
    try:
        peer.sendall(b"H")
    except OSError:
        peer.close()
        return False
    return True


if __name__ == "__main__":
    app.run(main)
