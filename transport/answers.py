"""Answers to requests: whoever waits for one reads the socket itself.

A thread that only reads would cost every answer a handoff, which takes longer than a small message. So the first who
waits leads: it reads until its own answer is there, and keeps what comes for others. Who waits meanwhile follows. A
thread of its own leads where followers are left, where a send is stuck (the peer may be stuck in one as well, until
somebody reads), and where nobody has waited for a while, as heartbeats come all the time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from transport.errors import TransportError
from transport.messages import Message

T = TypeVar("T")

_TICK_S = 0.02  # without anybody reading


class Answer(Generic[T]):
    """The answer to one request, or why there is none.

    done_at_s: when it came, by the monotonic clock.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._value: T | None = None
        self._error: TransportError | None = None
        self.done, self.done_at_s = False, 0.0

    def result(self, timeout_s: float | None = None) -> T:
        """Wait for it.

        Raises:
          TimeoutError: it took longer; looked at whenever the peer gives a sign of life.
          TransportError: the request failed, or the connection is lost.
        """
        if not self.done:
            self._reader.wait_for(self, timeout_s)
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]

    def set_result(self, value: T) -> None:
        """For the reader's receiver of messages."""
        self._value, self.done_at_s, self.done = value, time.monotonic(), True

    def set_exception(self, error: TransportError) -> None:
        """As set_result."""
        self._error, self.done_at_s, self.done = error, time.monotonic(), True


class Reader:
    """Reads a connection's messages in whichever thread waits for one.

    Args:
      receive: the next message; raises TransportError at the end.
      has_data: whether some of it is there.
      take: what to do with one.
      end: called once, with what `receive` or `take` raised; every Answer must be done then.
    """

    def __init__(
        self,
        receive: Callable[[], Message],
        has_data: Callable[[], bool],
        take: Callable[[Message], None],
        end: Callable[[TransportError], None],
    ) -> None:
        self._receive, self._has_data, self._take, self._end = receive, has_data, take, end
        self._leading = threading.Lock()
        self._led = False  # by somebody who waits, since the last tick
        self._wanted = threading.Event()  # somebody needs the thread to lead
        self._stuck = 0  # sends
        self._news = threading.Condition()  # around the set, notified of every message while it is not empty
        self._followed: set[Answer[Any]] = set()
        self._ended = False
        self._thread = threading.Thread(target=self._stand_by, name="worker client", daemon=True)
        self._thread.start()

    def wait_for(self, answer: Answer[Any], timeout_s: float | None) -> None:
        """Until it is done."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        if not self._leading.acquire(blocking=False):
            return self._follow(answer, timeout_s)
        try:
            self._led = True
            while not answer.done:
                if deadline_s is not None and time.monotonic() > deadline_s:
                    raise TimeoutError(f"no answer within {timeout_s} s")
                self._read_one()
        finally:
            self._leading.release()

    def read_ready(self) -> None:
        """Take what has come, without waiting for more."""
        if self._leading.acquire(blocking=False):
            try:
                while not self._ended and self._has_data():
                    self._read_one()
            finally:
                self._leading.release()

    @contextmanager
    def while_stuck(self) -> Generator[None]:
        """Around a send that the peer does not take now."""
        self._stuck += 1
        self._wanted.set()
        try:
            yield
        finally:
            self._stuck -= 1

    def join(self) -> None:
        """Wait for the thread, once the connection is interrupted."""
        self._wanted.set()
        self._thread.join()

    def _follow(self, answer: Answer[Any], timeout_s: float | None) -> None:
        with self._news:
            self._followed.add(answer)
            self._wanted.set()
            if not self._news.wait_for(lambda: answer.done, timeout_s):
                self._followed.discard(answer)
                raise TimeoutError(f"no answer within {timeout_s} s")

    def _stand_by(self) -> None:
        while not self._ended:
            wanted = self._wanted.wait(_TICK_S)
            if not self._leading.acquire(blocking=wanted):
                continue
            try:
                # What follows once the lock is free finds no leader, and needs none.
                self._wanted.clear()
                if not self._ended and (self._followed or self._stuck or not self._led):
                    self._lead()
                self._led = False
            finally:
                self._leading.release()

    def _lead(self) -> None:
        self._read_one()
        while (self._followed or self._stuck) and not self._ended:
            self._read_one()
        self._wanted.clear()

    def _read_one(self) -> None:
        try:
            self._take(self._receive())
        except TransportError as error:
            self._ended = True
            self._end(error)
        if self._followed:
            with self._news:
                self._followed = {answer for answer in self._followed if not answer.done}
                self._news.notify_all()
