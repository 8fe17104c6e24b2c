"""A worker for tests, in a process of its own: argv is the secret in hexadecimal ("" for none). Prints its port.

Site 0 gives back q, or that of the Query before. Site 1 keeps running sums of k and v in float64, as a cache would, and
answers q + sum(k) + sum(v). Site 2 sleeps for ever. Site 3 answers the array "rows" of the layout. Other sites fail.
Pages of one array are kept, and those that were never stored fail. SIGTERM drains it.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Mapping

import numpy as np

from transport import Attend, FetchPages, Hello, Layout, Pages, Query, Release, Result, StorePages, WorkerServer
from transport.errors import RefusedError


class EchoHandler:
    def __init__(self) -> None:
        self.total, self.released, self.sessions = np.zeros(()), 0, 0
        self.layouts: dict[int, Mapping[str, np.ndarray]] = {}
        self.pages: dict[int, np.ndarray] = {}
        self.queries: list[Query] = []

    def hello(self, hello: Hello) -> Hello:
        if hello.page_budget > 1000:
            raise RefusedError(f"{hello.page_budget} pages; allowed: at most 1000")
        self.sessions += 1
        self.total = np.zeros(())
        return Hello(fingerprint=hello.fingerprint, generation=hello.generation, page_budget=hello.page_budget // 2)

    def layout(self, layout: Layout) -> None:
        self.layouts[layout.slot] = layout.arrays

    def query(self, query: Query) -> None:
        self.queries.append(query)

    def attend(self, attend: Attend) -> Result:
        if attend.site == 0:
            return Result(request_id=attend.request_id, out=self.queries.pop().q if attend.q is None else attend.q)
        if attend.site == 1:
            assert attend.k is not None and attend.v is not None
            self.total = self.total + attend.k.astype(np.float64).sum() + attend.v.astype(np.float64).sum()
            return Result(request_id=attend.request_id, out=(attend.q + self.total).astype(np.float32))
        if attend.site == 3:
            return Result(request_id=attend.request_id, out=self.layouts[attend.layout]["rows"])
        if attend.site == 2:
            threading.Event().wait()
        raise ValueError(f"no site {attend.site}")

    def release(self, release: Release) -> None:
        self.released += len(release.pages)

    def fetch_pages(self, fetch: FetchPages) -> Pages:
        return Pages(request_id=fetch.request_id, arrays=(np.stack([self.pages[int(page)] for page in fetch.pages]),))

    def store_pages(self, store: StorePages) -> None:
        (array,) = store.arrays
        self.pages |= dict(zip(store.pages.tolist(), array, strict=True))

    def stats(self) -> Mapping[str, int]:
        return {"released": self.released, "sessions": self.sessions}


def main() -> None:
    server = WorkerServer(EchoHandler(), secret=bytes.fromhex(sys.argv[1]) or None)
    signal.signal(signal.SIGTERM, lambda *_: server.drain("SIGTERM"))
    print(server.address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
