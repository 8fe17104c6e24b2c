"""A worker that computes nothing, in a process of its own, for measurements of the transport alone."""

from __future__ import annotations

import multiprocessing
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from transport import Attend, FetchPages, Hello, Layout, Pages, Query, Release, Result, StorePages, WorkerServer
from transport.header import Scalar

ECHO, SINK = 0, 1  # sites: what gives back q, and what swallows it


class _Worker:
    def hello(self, hello: Hello) -> Hello:
        return hello

    def layout(self, layout: Layout) -> None: ...

    def query(self, query: Query) -> None: ...

    def attend(self, attend: Attend) -> Result:
        assert attend.q is not None
        out = attend.q if attend.site == ECHO else attend.q[:0]
        return Result(request_id=attend.request_id, out=out)

    def release(self, release: Release) -> None: ...

    def fetch_pages(self, fetch: FetchPages) -> Pages:
        return Pages(request_id=fetch.request_id, arrays=())

    def store_pages(self, store: StorePages) -> None: ...

    def stats(self) -> Mapping[str, Scalar]:
        return {}


def serving_process(secret: bytes | None, certificates: tuple[str, str] | None = None) -> AbstractContextManager[int]:
    """A process with the worker; gives its port. certificates: PEM files of certificate and key, for TLS."""
    return process(_serve, secret, certificates)


@contextmanager
def process(serve: Callable, *args: object) -> Iterator[int]:
    """A process that serves, told by a pipe where to say its port; gives that."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    started = spawn.Process(target=serve, args=(theirs, *args), daemon=True)
    started.start()
    try:
        yield ours.recv()
    finally:
        started.kill()
        started.join()


def _serve(pipe, secret: bytes | None, certificates: tuple[str, str] | None) -> None:
    context = None
    if certificates:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificates)
    server = WorkerServer(_Worker(), secret=secret, tls=context)
    pipe.send(server.address[1])
    server.serve_forever()
