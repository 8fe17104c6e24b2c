"""A process made slow from outside: signals stop it for part of every 0.6 ms."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_PERIOD_S = 0.0006


@contextmanager
def throttled(pid: int, running: float) -> Iterator[None]:
    """While the block lasts, the process may run for a part of the time only: 0 < running < 1."""
    process = subprocess.Popen([sys.executable, "-m", "experiments.throttle", str(pid), str(running)])
    try:
        yield
    finally:
        process.kill()
        process.wait()
        os.kill(pid, signal.SIGCONT)


def _throttle(pid: int, running: float) -> None:
    with contextlib.suppress(PermissionError):  # else it waits for a core now and then
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(20))
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    while True:
        os.kill(pid, signal.SIGCONT)
        time.sleep(running * _PERIOD_S)
        os.kill(pid, signal.SIGSTOP)
        time.sleep((1 - running) * _PERIOD_S)


if __name__ == "__main__":
    _throttle(int(sys.argv[1]), float(sys.argv[2]))
