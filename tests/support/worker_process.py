"""`hetero-jax worker` in a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

_MAIN = "import sys; from hetero_jax.cli import main; sys.exit(main())"


@contextlib.contextmanager
def worker_process(*flags: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Address and process of a worker on a free port, killed at the end."""
    command = [sys.executable, "-c", _MAIN, "worker", "--listen=127.0.0.1:0", *flags]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().removeprefix("listening on ").strip(), process
    finally:
        process.kill()
        process.wait()
