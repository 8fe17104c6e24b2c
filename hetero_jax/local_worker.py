"""Workers that an engine starts on its own machine and that end with it."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import BinaryIO

from hetero_jax.errors import WorkerError
from hetero_jax.worker_session import WorkerSession
from transport import Hello

_SECRET_BYTES = 32


class LocalWorker:
    """The process of one worker on loopback, a new one for every session after the first.

    The secret goes down the process's standard input, whose end tells it that this process is gone.

    Args:
      kv_cache_bytes: memory of its pools.
      cores: that it may run on; None: all.
      begin: begins a session with (address, secret, what the worker is to serve).
    """

    def __init__(
        self, *, kv_cache_bytes: int, cores: Sequence[int] | None, begin: Callable[[str, bytes, Hello], WorkerSession]
    ) -> None:
        self._kv_cache_bytes, self._cores, self._begin = kv_cache_bytes, cores, begin
        self._secret = secrets.token_bytes(_SECRET_BYTES)
        self._processes = [self._start()]  # the last one is present
        self._is_fresh = True
        weakref.finalize(self, _end, self._processes)

    def connect(self, hello: Hello) -> WorkerSession:
        """Begin a session; a process that had one before is replaced, whatever became of it.

        Raises:
          WorkerError: the process ended, or refuses.
        """
        if not self._is_fresh:
            _end(self._processes)
            self._processes[:] = [self._start()]
        self._is_fresh = False
        line = _stdout(self._processes[-1]).readline().decode()
        if not line:
            raise WorkerError(f"local worker: it ended with code {self._processes[-1].wait()} before it listened")
        return self._begin(line.removeprefix("listening on ").strip(), self._secret, hello)

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "hetero_jax", "worker", "--supervised", "--listen=127.0.0.1:0"]
        process = subprocess.Popen(
            # Nobody else has the secret, so all programs that come are those of this process.
            [*command, f"--kv_cache_bytes={self._kv_cache_bytes}", "--allow_exported_sites"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            start_new_session=True,  # Ctrl-C is for the engine
        )
        if self._cores is not None and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(process.pid, self._cores)  # at once: it has but one thread yet
        assert process.stdin is not None
        process.stdin.write(self._secret.hex().encode() + b"\n")
        process.stdin.flush()
        return process


def follow_supervisor(stdin: BinaryIO) -> bytes:
    """The secret of a worker that a LocalWorker started; the process ends as soon as its supervisor does."""
    secret = bytes.fromhex(stdin.readline().decode())

    def watch() -> None:
        stdin.read()
        os._exit(1)

    threading.Thread(target=watch, name="supervisor", daemon=True).start()
    return secret


def own_cores(workers: int) -> list[list[int] | None]:
    """Cores of each worker: an even part of those that this process may use; where they are too few, one is shared.

    None each where the system does not pin processes.
    """
    if not hasattr(os, "sched_getaffinity"):
        return [None] * workers
    cores = sorted(os.sched_getaffinity(0))
    share = max(len(cores) // workers, 1)
    return [[cores[(index * share + offset) % len(cores)] for offset in range(share)] for index in range(workers)]


def _stdout(process: subprocess.Popen[bytes]) -> BinaryIO:
    assert process.stdout is not None
    return process.stdout  # type: ignore[return-value]


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()  # also one that is stopped
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
