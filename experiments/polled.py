"""Looking at something every now and then while a block of code runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def polled(look: Callable[[], None], every_s: float) -> Iterator[None]:
    """Call `look` from a thread of its own until the block ends."""
    over = threading.Event()

    def poll() -> None:
        while not over.wait(every_s):
            look()

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
