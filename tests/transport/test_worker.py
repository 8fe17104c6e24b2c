"""Client and worker over sockets, the worker in a process of its own."""

from __future__ import annotations

import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import echo_worker
from experiments.certificate import loopback_certificate
from transport import MAX_PAGES_BYTES, Hello, Timing, WorkerClient, WorkerServer, connect
from transport.errors import (
    AuthenticationError,
    ConnectionLostError,
    HandshakeError,
    InsecureAddressError,
    RefusedError,
    RemoteError,
)

SECRET = b"a secret of this job"
WAIT_S = 60  # for what must happen; nothing here is timed


class Worker:
    """An echo worker's process."""

    def __init__(self, secret: bytes | None) -> None:
        command = [sys.executable, echo_worker.__file__, (secret or b"").hex()]
        self.secret = secret
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def connect(self, generation: int = 1, fingerprint: str = "plan", **options) -> WorkerClient:
        hello = Hello(fingerprint=fingerprint, generation=generation, page_budget=10)
        return connect("127.0.0.1", self.port, hello, **({"secret": self.secret} | options))


@pytest.fixture(params=[None, SECRET], ids=["plain", "authenticated"])
def worker(request) -> Iterator[Worker]:
    worker = Worker(request.param)
    yield worker
    worker.process.kill()
    worker.process.wait()


def test_requests_of_many_sizes_in_flight_are_answered_in_kind(worker):
    client = worker.connect()
    assert client.welcome.page_budget == 5
    chance = np.random.default_rng(0)
    queries = [
        chance.standard_normal((rows, 4, 64)).astype(dtype)
        for rows in (1, 0, 300, 5000, 7, 2000)
        for dtype in (np.float32, ml_dtypes.bfloat16, np.int8)
    ]
    futures = [client.attend(site=0, layout=0, q=q) for q in queries]
    for q, future in zip(queries, futures, strict=True):
        out = future.result(WAIT_S).out
        assert out.dtype == q.dtype and out.shape == q.shape and out.tobytes() == q.tobytes()
    client.close()


def test_layouts_are_kept_by_slot_until_replaced(worker):
    client = worker.connect()
    rows = [np.arange(n, dtype=np.int32) for n in range(5)]

    def kept(slot: int) -> list[int]:
        return client.attend(site=3, layout=slot, q=rows[0]).result(WAIT_S).out.tolist()

    client.layout(slot=0, arrays={"rows": rows[3]})
    client.layout(slot=63, arrays={"rows": rows[4]})
    assert (kept(0), kept(63), kept(0)) == ([0, 1, 2], [0, 1, 2, 3], [0, 1, 2])
    client.layout(slot=0, arrays={"rows": rows[2]})
    assert (kept(0), kept(63)) == ([0, 1], [0, 1, 2, 3])
    client.layout(slot=64, arrays={})
    with pytest.raises(ConnectionLostError, match="a layout for slot 64; allowed: below 64"):
        kept(0)
    client.close()


def test_pages_are_fetched_and_stored_in_turn(worker):
    client = worker.connect()
    contents = np.random.default_rng(0).integers(0, 256, (3, 100_000)).astype(np.uint8)
    client.store_pages(np.arange(3), (contents,))
    client.store_pages(np.array([1]), (contents[:1],))
    for pages, rows in (([2, 0], [2, 0]), ([1], [0])):
        (array,) = client.fetch_pages(np.array(pages)).result(WAIT_S).arrays
        np.testing.assert_array_equal(array, contents[rows])
    with pytest.raises(RemoteError, match="KeyError: 7"):
        client.fetch_pages(np.array([7])).result(WAIT_S)
    client.store_pages(np.arange(1), (np.zeros((1, MAX_PAGES_BYTES + 1), np.uint8),))
    with pytest.raises(ConnectionLostError, match="134217729 bytes of pages in a message; allowed: at most 134217728"):
        client.stats().result(WAIT_S)
    client.close()


def test_several_threads_wait_for_answers_of_one_connection(worker):
    client, failures = worker.connect(), []

    def ask(seed: int) -> None:
        chance = np.random.default_rng(seed)
        for _ in range(60):
            queries = [chance.integers(0, 9, chance.integers(1, 3000)).astype(np.int8) for _ in range(3)]
            answers = [client.attend(site=0, layout=0, q=q) for q in queries]
            for index in chance.permutation(3):
                if answers[index].result(WAIT_S).out.tobytes() != queries[index].tobytes():
                    failures.append(seed)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert not failures and not any(thread.is_alive() for thread in threads)
    client.close()


def test_large_requests_and_answers_at_once_do_not_block_each_other(worker):
    client, large = worker.connect(), np.arange(1 << 25, dtype=np.uint8)  # more than sockets hold
    answers = [client.attend(site=0, layout=0, q=large) for _ in range(4)]  # nobody waits yet
    for answer in answers:
        np.testing.assert_array_equal(answer.result(WAIT_S).out, large)
    client.close()


def test_requests_are_served_in_order_and_results_stay_valid(worker):
    client = worker.connect()
    chance, total, answers = np.random.default_rng(1), 0.0, []
    for _ in range(40):
        q, k, v = (chance.integers(-8, 8, (300, 2, 64)).astype(np.float32) for _ in range(3))
        total += k.sum() + v.sum()
        answers.append((q + total, client.attend(site=1, layout=0, q=q, k=k, v=v)))
    results = [(expected, future.result(WAIT_S).out) for expected, future in answers]
    for expected, out in results:  # all are held at once: no receive buffer was used twice
        np.testing.assert_array_equal(out, expected)
    client.release(np.arange(3))
    client.release(np.arange(4))
    assert client.stats().result(WAIT_S).values == {"released": 7, "sessions": 1}
    client.close()


def test_a_failed_request_is_reported_and_the_worker_goes_on(worker):
    client = worker.connect()
    with pytest.raises(RemoteError, match="ValueError: no site 7"):
        client.attend(site=7, layout=0, q=np.zeros(1, np.float32)).result(WAIT_S)
    assert client.attend(site=0, layout=0, q=np.ones(2, np.int8)).result(WAIT_S).out.tolist() == [1, 1]
    client.close()


def test_other_plans_and_stale_generations_are_refused_and_newer_ones_take_over(worker):
    older = worker.connect(generation=5)
    with pytest.raises(RefusedError, match="plan is 'other', that of this side 'plan'"):
        worker.connect(generation=9, fingerprint="other")
    for generation in (4, 5):
        with pytest.raises(RefusedError, match=f"generation {generation} of the engine; allowed: above 5"):
            worker.connect(generation=generation)
    newer = worker.connect(generation=6)
    assert newer.stats().result(WAIT_S).values["sessions"] == 2
    with pytest.raises(ConnectionLostError):
        older.stats().result(WAIT_S)
    newer.close()


def test_an_engine_may_begin_anew_on_its_connection_in_turn_and_of_its_own_plan(worker):
    client = worker.connect(generation=5)
    one = np.ones((1, 1, 1), np.float32)

    def again(generation: int, fingerprint: str = "plan"):
        return client.hello(Hello(fingerprint=fingerprint, generation=generation, page_budget=generation * 10))

    before, welcome, after = (
        client.attend(site=1, layout=0, q=one, k=one, v=one),
        again(6),
        client.attend(site=1, layout=0, q=one, k=one, v=one),
    )
    assert before.result(WAIT_S).out == after.result(WAIT_S).out == 3  # the sums began again
    assert welcome.result(WAIT_S).page_budget == client.welcome.page_budget == 30
    assert client.stats().result(WAIT_S).values["sessions"] == 2
    with pytest.raises(ConnectionLostError, match="generation 6 of the engine; allowed: above 6"):
        again(6).result(WAIT_S)
    client = worker.connect(generation=7)
    with pytest.raises(ConnectionLostError, match="plan is 'other', that of this side 'plan'"):
        again(8, "other").result(WAIT_S)
    client = worker.connect(generation=9)
    with pytest.raises(ConnectionLostError, match="5000 pages; allowed: at most 1000"):
        again(500).result(WAIT_S)
    client.close()


def test_the_handlers_own_refusal_reaches_the_engine(worker):
    with pytest.raises(RefusedError, match="5000 pages; allowed: at most 1000"):
        connect("127.0.0.1", worker.port, Hello(fingerprint="", generation=1, page_budget=5000), secret=worker.secret)


def test_a_killed_worker_fails_what_is_pending_and_every_later_call(worker):
    client = worker.connect()
    pending = [client.attend(site=2, layout=0, q=np.zeros(5, np.float32)) for _ in range(3)]
    worker.process.kill()
    for future in pending:
        with pytest.raises(ConnectionLostError, match="the worker is lost"):
            future.result(WAIT_S)
    with pytest.raises(ConnectionLostError, match="the worker is lost"):
        client.stats()
    client.close()


def test_a_stopped_worker_counts_as_lost_also_for_who_is_sending(worker):
    client = worker.connect(timing=Timing(heartbeat_s=0.1, silence_s=0.5, stall_s=0.5))
    pending = client.stats()
    pending.result(WAIT_S)
    worker.process.send_signal(signal.SIGSTOP)
    large = np.zeros(1 << 24, np.int8)
    with pytest.raises(ConnectionLostError):
        _send_for_ever(client, large)
    with pytest.raises(ConnectionLostError):
        client.stats()
    client.close()


def test_a_busy_worker_gives_signs_of_life():
    handler, busy = echo_worker.EchoHandler(), threading.Event()
    handler.release = lambda release: busy.wait() and None
    timing = Timing(heartbeat_s=0.05, silence_s=1.0)
    with serving(WorkerServer(handler, timing=timing)) as server:
        client = connect(*server.address, Hello(fingerprint="", generation=1, page_budget=1), timing=timing)
        client.release(np.arange(1))
        future = client.stats()
        with pytest.raises(TimeoutError):
            future.result(2.0)  # twice what silence may last
        busy.set()
        assert future.result(WAIT_S).values["sessions"] == 1
        client.close()


def test_a_worker_may_take_longer_for_its_welcome_than_for_its_handshake():
    handler, timing = echo_worker.EchoHandler(), Timing(handshake_s=0.5)
    hello, waited = handler.hello, threading.Event()
    handler.hello = lambda message: (waited.wait(1.5), hello(message))[1]
    with serving(WorkerServer(handler)) as server:
        client = connect(*server.address, Hello(fingerprint="", generation=1, page_budget=4), timing=timing)
        assert client.welcome.page_budget == 2
        client.close()
        impatient = Timing(handshake_s=0.5, welcome_s=0.1)
        with pytest.raises(ConnectionLostError, match="fell silent"):
            connect(*server.address, Hello(fingerprint="", generation=2, page_budget=4), timing=impatient)


def test_what_a_release_raises_ends_the_session_and_is_told():
    handler = echo_worker.EchoHandler()
    with serving(WorkerServer(handler)) as server:
        client = connect(*server.address, Hello(fingerprint="", generation=1, page_budget=1))
        handler.released = "no number"  # type: ignore[assignment]
        client.release(np.arange(1))
        with pytest.raises(ConnectionLostError, match="the worker says: TypeError"):
            client.stats().result(WAIT_S)
        client.close()
        connect(*server.address, Hello(fingerprint="", generation=2, page_budget=1)).close()


def test_who_is_asked_and_does_not_answer_can_be_told_from_who_is_idle(worker):
    client = worker.connect()
    assert client.waiting_since_s is None
    answers = [client.attend(site=0, layout=0, q=np.ones(1, np.int8)) for _ in range(2)]
    asked_s = client.waiting_since_s
    for answer in answers:
        answer.result(WAIT_S)
    assert asked_s is not None and client.waiting_since_s is None
    client.attend(site=2, layout=0, q=np.ones(1, np.int8))  # which it never answers
    stuck_s = client.waiting_since_s
    assert stuck_s is not None and stuck_s > asked_s
    client.attend(site=0, layout=0, q=np.ones(1, np.int8))
    assert client.waiting_since_s == stuck_s
    client.close()


def test_sigterm_tells_the_engine_to_drain(worker):
    client = worker.connect()
    assert not client.draining.is_set()
    worker.process.send_signal(signal.SIGTERM)
    assert client.draining.wait(WAIT_S)
    assert client.attend(site=0, layout=0, q=np.ones(1, np.int8)).result(WAIT_S).out.tolist() == [1]
    with pytest.raises(RefusedError, match="about to leave: SIGTERM"):
        worker.connect(generation=2)
    client.close()
    assert worker.process.wait(WAIT_S) == 0


def test_sigterm_ends_a_worker_that_nobody_uses(worker):
    worker.connect().close()
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.wait(WAIT_S) == 0


def test_wrong_secrets_and_strangers_are_closed_without_an_answer():
    worker = Worker(SECRET)
    try:
        for secret in (b"another secret, long enough", None):
            with pytest.raises((AuthenticationError, ConnectionLostError)):
                worker.connect(secret=secret)
        with socket.create_connection(("127.0.0.1", worker.port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)
            assert _until_closed(stranger) == b""
        worker.connect().close()  # it still serves
    finally:
        worker.process.kill()
        worker.process.wait()


def test_slow_strangers_are_closed_and_others_served_meanwhile():
    timing = Timing(handshake_s=2.0)
    with serving(WorkerServer(echo_worker.EchoHandler(), secret=SECRET, timing=timing)) as server:
        strangers = [socket.create_connection(server.address) for _ in range(100)]
        for stranger in strangers:
            stranger.sendall(b"H")
        client = connect(*server.address, Hello(fingerprint="", generation=1, page_budget=1), secret=SECRET)
        for stranger in strangers[:50]:
            stranger.sendall(b"J")  # a byte now and then gives no more time
        for _ in range(20):
            client.attend(site=0, layout=0, q=np.ones(1000, np.float32)).result(WAIT_S)
        assert [_until_closed(stranger) for stranger in strangers] == [b""] * 100
        client.close()
        for stranger in strangers:
            stranger.close()


def test_without_a_secret_only_loopback_is_used():
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        with pytest.raises(InsecureAddressError, match="without a secret; allowed without one: loopback"):
            WorkerServer(echo_worker.EchoHandler(), host)
    with pytest.raises(HandshakeError, match="3 bytes; allowed: at least 16"):
        WorkerServer(echo_worker.EchoHandler(), secret=b"abc")
    with pytest.raises(ConnectionLostError, match=r"no worker at 127\.0\.0\.1:1"):
        connect("127.0.0.1", 1, Hello(fingerprint="", generation=1, page_budget=1))


@pytest.mark.parametrize("secret", [None, SECRET])
def test_tls_carries_the_same(tmp_path, secret):
    server_context, client_context = _tls_contexts(tmp_path)
    with serving(WorkerServer(echo_worker.EchoHandler(), secret=secret, tls=server_context)) as server:
        hello = Hello(fingerprint="", generation=1, page_budget=1)
        client = connect(*server.address, hello, secret=secret, tls=client_context)
        queries = [np.arange(n, dtype=np.float32) for n in (1, 100_000, 1_000_000)]
        futures = [client.attend(site=0, layout=0, q=q) for q in queries]
        for q, future in zip(queries, futures, strict=True):
            np.testing.assert_array_equal(future.result(WAIT_S).out, q)
        client.close()
        with socket.create_connection(server.address) as stranger:
            stranger.sendall(b"no TLS at all" * 10)
            assert b"HJXC" not in _until_closed(stranger)
        with pytest.raises((HandshakeError, ConnectionLostError)):  # a certificate that the client does not know
            connect(*server.address, hello, secret=secret, tls=ssl.create_default_context())


class serving:
    """The server in a thread, stopped at the end."""

    def __init__(self, server: WorkerServer) -> None:
        self.server, self.thread = server, threading.Thread(target=server.serve_forever)

    def __enter__(self) -> WorkerServer:
        self.thread.start()
        return self.server

    def __exit__(self, *_: object) -> None:
        self.server.stop()
        self.thread.join()


def _send_for_ever(client: WorkerClient, q: np.ndarray) -> None:
    while True:  # blocks when the sockets' buffers are full: nothing is queued
        client.attend(site=0, layout=0, q=q)


def _until_closed(sock: socket.socket) -> bytes:
    sock.settimeout(WAIT_S)
    received = b""
    try:
        while data := sock.recv(1000):
            received += data
    except ConnectionResetError:
        pass
    return received


def _tls_contexts(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    certificate, key = loopback_certificate(folder)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    return server, ssl.create_default_context(cafile=certificate)
