"""A worker on loopback, on one core."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_MAIN = "import sys; from hetero_jax.cli import main; sys.exit(main())"


@contextmanager
def pinned_worker(core: int, *, kv_cache_bytes: str) -> Iterator[tuple[str, int]]:
    """Its address and its process, which ends with the block."""
    flags = ["worker", "--listen=127.0.0.1:0", f"--kv_cache_bytes={kv_cache_bytes}"]
    process = subprocess.Popen(
        ["taskset", "-c", str(core), sys.executable, "-c", _MAIN, *flags], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().removeprefix("listening on ").strip(), process.pid
    finally:
        process.kill()
        process.wait()
