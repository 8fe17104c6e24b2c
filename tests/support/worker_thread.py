"""A worker in a thread of the test, which dies, hangs or drains at a chosen call."""

from __future__ import annotations

import threading
from collections.abc import Callable

from hetero_jax.worker import TierHandler
from transport import Attend, Hello, Query, Result, WorkerServer


class FaultyHandler(TierHandler):
    """Calls `fault` before it serves attend number `at`, counted over all sessions."""

    def __init__(self, at: int, fault: Callable[[], None], *, kv_cache_bytes: int) -> None:
        super().__init__(kv_cache_bytes=kv_cache_bytes)
        self.at, self.fault, self.served, self.queries, self.sessions = at, fault, 0, 0, 0

    def hello(self, hello: Hello) -> Hello:
        self.sessions += 1
        return super().hello(hello)

    def query(self, query: Query) -> None:
        self.queries += 1
        super().query(query)

    def attend(self, attend: Attend) -> Result:
        if self.served == self.at:
            self.fault()
        self.served += 1
        return super().attend(attend)


class ThreadWorker:
    """A server of a FaultyHandler; `fault` gets this object."""

    def __init__(
        self,
        at: int = -1,
        fault: Callable[[ThreadWorker], None] = lambda worker: None,
        *,
        port: int = 0,
        kv_cache_bytes: int = 1 << 20,
    ) -> None:
        self.handler = FaultyHandler(at, lambda: fault(self), kv_cache_bytes=kv_cache_bytes)
        self.server = WorkerServer(self.handler, port=port)
        self.address = "{}:{}".format(*self.server.address)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def die(self) -> None:
        """Its connections break and nobody listens; the call that is being served gets no answer."""
        stopper = threading.Thread(target=self.server.stop)  # which waits for the thread that calls here
        stopper.start()
        self.thread.join()

    def restart(self) -> ThreadWorker:
        """Another one, healthy, at the same address."""
        return ThreadWorker(port=int(self.address.rpartition(":")[2]))

    def __enter__(self) -> ThreadWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()
        self.thread.join()
