"""Several HTTP servers that answer alike: who is asked, how long it may take, and who is asked when one fails."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from socket import SHUT_RDWR, socket
from typing import TypeVar
from urllib.parse import urlsplit

from opd_core.errors import RefusedError, UnavailableError

from opd_trainer.rewards.wire import printable, read_error

TRIES = 10  # of one question: three minutes of servers that refuse
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0  # seconds that a server rests after a failure, twice as long after the next
_LISTEN_SECONDS = 0.5  # between two looks at `hurry`
_LARGEST_ANSWER = 2**20  # bytes
_AGAIN = (408, 425, 429)  # statuses below 500 that say "later"

Answer = TypeVar("Answer")


class StoppedError(Exception):
    """Another question of the same batch has failed."""


@dataclass
class _Replica:
    url: str
    asked: int = 0  # questions that it has not answered yet
    failures: int = 0  # since its last answer
    rests_until: float = 0.0  # by time.monotonic


class Replicas:
    """Asked from any thread. A server that fails rests, longer each time; meanwhile the others are asked.

    `hurry`: once it is set, what fails is not asked again, and nobody waits for a server that rests.
    """

    def __init__(self, urls: Sequence[str], seconds: float, hurry: threading.Event) -> None:
        first = os.getpid() % len(urls)  # not all ranks begin with the same one
        self._replicas = [_Replica(url) for url in (*urls[first:], *urls[:first])]
        self._seconds, self._hurry = seconds, hurry
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._replicas)

    def ask(
        self,
        path: str,
        question: bytes,
        read: Callable[[bytes], Answer],
        about: str,
        *,
        headers: Mapping[str, str] | None = None,
        stop: threading.Event,
        tries: int,
    ) -> Answer:
        """What `read` makes of an answer to `question`, which is JSON.

        Args:
            read: raises ValueError for what is no answer. about: what is asked, for messages.

        Raises:
            UnavailableError: nobody answers. RefusedError: an answer that is wrong, or a refusal. StoppedError: `stop`.
        """
        times = 0
        while times < tries and not (times and self._hurry.is_set()):
            replica, failures = self._take(stop, about)
            times += 1
            try:
                status, content = post(f"{replica.url.rstrip('/')}{path}", question, headers or {}, self._seconds)
            except (OSError, HTTPException, ValueError) as error:
                why = f"could not be asked: {printable(str(error) or type(error).__name__)}"
                self._give_back(replica, failures, failed=True)
                continue
            if status == 200:
                self._give_back(replica, failures, failed=False)
                try:
                    return read(content)
                except ValueError as error:
                    raise RefusedError(f"{about}: the answer of {replica.url} is wrong: {error}") from error
            why = f"answered {status}: {read_error(content)}"
            again = status >= 500 or status in _AGAIN
            self._give_back(replica, failures, failed=again)
            if not again:
                raise RefusedError(f"{about}: {replica.url} {why}")
        often = "once" if times == 1 else f"{times} times"
        raise UnavailableError(f"{about}: no answer, asked {often}; the last time {replica.url} {why}")

    def _take(self, stop: threading.Event, about: str) -> tuple[_Replica, int]:
        """The least busy server that does not rest, waiting for one if need be."""
        while not stop.is_set():
            with self._changed:
                now = time.monotonic()
                awake = [replica for replica in self._replicas if replica.rests_until <= now]
                if awake:
                    chosen = min(awake, key=lambda replica: (replica.asked, replica.failures))
                    chosen.asked += 1
                    return chosen, chosen.failures
                pause = min(replica.rests_until for replica in self._replicas) - now
            if self._hurry.is_set():
                raise UnavailableError(f"{about}: all servers have failed and rest")
            stop.wait(min(pause, _LISTEN_SECONDS))
        raise StoppedError

    def _give_back(self, replica: _Replica, failures: int, *, failed: bool) -> None:
        """`failures`: when it was taken; questions that fail side by side are one failure."""
        with self._changed:
            replica.asked -= 1
            if not failed:
                replica.failures, replica.rests_until = 0, 0.0
            elif replica.failures == failures:
                pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**failures)
                replica.failures, replica.rests_until = failures + 1, time.monotonic() + pause


def post(url: str, body: bytes, headers: Mapping[str, str], seconds: float) -> tuple[int, bytes]:
    """Status and content of the answer. No proxy is asked, and no redirect is followed.

    Raises:
        TimeoutError: the whole of it is not here within `seconds`. OSError, HTTPException: nobody is there, or no HTTP.
        ValueError: more than a megabyte.
    """
    parts = urlsplit(url)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    began = time.monotonic()
    connection = kind(parts.hostname or "", parts.port, timeout=seconds)
    try:
        connection.connect()
        with cut_after(connection.sock, seconds - (time.monotonic() - began)):
            connection.request("POST", parts.path, body, {"Content-Type": "application/json", **headers})
            answer = connection.getresponse()
            content = answer.read(_LARGEST_ANSWER + 1)
            if len(content) > _LARGEST_ANSWER:
                raise ValueError(f"its answer has more than {_LARGEST_ANSWER} bytes")
            if answer.length:  # `read` with a number does not say so
                raise HTTPException(f"the connection ended {answer.length} bytes before the answer did")
            return answer.status, content
    finally:
        connection.close()


def cut(connection: socket) -> None:
    """Ends a connection that another thread reads or writes."""
    with suppress(OSError):  # it has ended by itself
        socket.shutdown(connection, SHUT_RDWR)  # of the socket below TLS, which knows no other thread


@contextmanager
def cut_after(connection: socket, seconds: float) -> Iterator[None]:
    """Ends the connection after `seconds`, whatever it is doing then: a timeout of sockets is of one read, and somebody
    who sends a byte now and then is never late.

    Raises:
        TimeoutError: it was cut.
    """
    late = threading.Event()

    def end() -> None:
        late.set()
        cut(connection)

    timer = threading.Timer(max(0.0, seconds), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (OSError, HTTPException, ValueError) as error:
        if late.is_set():
            raise TimeoutError(f"no answer within {seconds:.0f} s") from error
        raise
    finally:
        timer.cancel()
    if late.is_set():
        raise TimeoutError(f"no answer within {seconds:.0f} s")
