"""What the pods themselves say, asked apart from the decisions: a pod that does not answer holds up nobody, and one
that answers with rubbish, or without end, costs no more than one that answers well."""

import asyncio
import io
import logging
import re
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from typing import Any

from opd_core.ports import in_url

from opd_operator import names
from opd_operator.cache import Cache, Key, Object
from opd_operator.observe import PodView, Requests, observe
from opd_operator.words import Progress, progress

log = logging.getLogger("opd_operator")

_SECONDS = 3.0  # for an answer
_PERIOD = 10.0  # seconds between two questions to one pod
_LARGEST = 128 << 10  # bytes of an answer, with all that HTTP adds
_AT_ONCE, _OF_A_NAMESPACE = 64, 8  # questions; one namespace's silent pods leave room for the others'
_CANARIES = 16  # pods of a canary that are asked
_TRAINERS = 16

Get = Callable[[str, int, str], Awaitable[str | None]]


@dataclass(frozen=True)
class Answers:
    """Of the pods of one distillation; None where nobody answered."""

    progress: Progress | None = None
    taught: Mapping[str, Progress] = field(default_factory=dict)  # by teacher that is trained
    requests: Requests | None = None


@dataclass
class Peers:
    """The last answers, by distillation."""

    answers: dict[Key, Answers] = field(default_factory=dict)
    _told: set[Key] = field(default_factory=set)  # whose defect is in the log

    async def keep_asking(self, cache: Cache, wake: Callable[[Key], None]) -> None:
        """Until cancelled; whoever has something new to say is woken. Every namespace is asked at its own pace."""
        limit = asyncio.Semaphore(_AT_ONCE)
        rounds: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                keys = cache.inhabited()
                self._forget(keys)
                rounds = {namespace: task for namespace, task in rounds.items() if not task.done()}
                homes = defaultdict(list)
                for key in keys:
                    homes[key[0]].append(key)
                for namespace in homes.keys() - rounds.keys():
                    rounds[namespace] = asyncio.create_task(self._round(homes[namespace], cache, wake, limit))
                await asyncio.sleep(_PERIOD)
        finally:
            for task in rounds.values():
                task.cancel()
            await asyncio.gather(*rounds.values(), return_exceptions=True)

    async def _round(
        self, keys: Iterable[Key], cache: Cache, wake: Callable[[Key], None], limit: asyncio.Semaphore
    ) -> None:
        own = asyncio.Semaphore(_OF_A_NAMESPACE)

        async def get(host: str, port: int, path: str) -> str | None:
            async with own, limit:
                return await fetch(host, port, path)

        async def one(key: Key) -> None:
            try:
                answer = await _ask(get, key, cache)
                self._told.discard(key)
            except Exception:  # whatever it is, it is this object's alone
                answer = Answers()
                if key not in self._told:
                    self._told.add(key)
                    log.exception("%s/%s: a defect of the operator: what its pods say is left out", *key)
            if answer != self.answers.get(key, Answers()):
                self.answers[key] = answer
                wake(key)

        await asyncio.gather(*(one(key) for key in keys))

    def _forget(self, present: Iterable[Key]) -> None:
        """Whatever has no pods any more."""
        for gone in self.answers.keys() - set(present):
            del self.answers[gone]
        self._told.intersection_update(present)


async def _ask(get: Get, key: Key, cache: Cache) -> Answers:
    obj = cache.get(key)
    trainers, canaries = _questions(obj, cache) if obj else ([], [])
    pages = await asyncio.gather(*(get(pod.ip, names.TRAINER_METRICS, "/progress") for pod in trainers))
    metrics = await asyncio.gather(*(get(pod.ip, names.ENDPOINT_METRICS, "/metrics") for pod in canaries))
    told = {pod.teacher: said for pod, page in zip(trainers, pages, strict=True) if (said := progress(page))}
    return Answers(told.pop("", None), told, requests_in(page for page in metrics if page))


def _questions(obj: Object, cache: Cache) -> tuple[list[PodView], list[PodView]]:
    """The first pods of the trainer, or of the teachers that are trained, and the canary's pods."""
    status = obj.get("status") or {}
    canary = (status.get("endpoint") or {}).get("canary")
    working = status.get("workers") or any("digest" not in row for row in status.get("teaching") or [])
    if not canary and (status.get("student") or not working):
        return [], []
    pods = [pod for pod in observe(cache.children(obj)).pods if pod.ready and pod.ip]
    first = {pod.teacher: pod for pod in pods if pod.role in (names.TEACH, names.TRAINER) and pod.index == 0}
    canaries = [pod for pod in pods if canary and pod.revision == canary["revision"]]
    return list(first.values())[:_TRAINERS], canaries[:_CANARIES]


# ------------------------------------------------------------------------------------------------------- one question


async def fetch(host: str, port: int, path: str) -> str | None:
    """The page of a pod, None if there is none in time and of a sensible size. What is read is bounded on the wire, all
    of HTTP included: a client that parses as it reads lets a pod send headers, or compressed zeros, without end."""
    try:
        async with asyncio.timeout(_SECONDS):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                head = f"GET {path} HTTP/1.1\r\nHost: {in_url(host)}:{port}\r\nAccept-Encoding: identity\r\n"
                writer.write(f"{head}Connection: close\r\n\r\n".encode())
                answer = bytearray()
                while len(answer) <= _LARGEST and (part := await reader.read(_LARGEST)):
                    answer += part
            finally:
                writer.transport.abort()
    except (OSError, TimeoutError):
        return None  # not up yet, or busy; the next round asks again
    return page(bytes(answer)) if len(answer) <= _LARGEST else None


class _Read(io.BytesIO):
    """What HTTPResponse takes for a socket: all that has come."""

    def makefile(self, *_: Any) -> io.BytesIO:
        return self


def page(answer: bytes) -> str | None:
    """The body of an HTTP answer that is there as a whole and says 200."""
    try:
        response = HTTPResponse(_Read(answer))  # type: ignore[arg-type]
        response.begin()
        if response.status != 200 or response.getheader("Content-Encoding", "identity") != "identity":
            return None
        return response.read().decode(errors="replace")
    except (HTTPException, ValueError):
        return None


_COUNTER = re.compile(
    r"^opd_endpoint_(?P<what>images|failures)_total(?:\{[^\n}]{0,256}\})? "
    r"(?P<value>[0-9]{1,15}(?:\.[0-9]{1,15})?(?:e\+[0-9]{2})?)$",
    re.MULTILINE,
)
_MOST = 10_000  # requests that a rate is judged by: more say no more, and cost more


def requests_in(pages: Iterable[str]) -> Requests | None:
    """What an endpoint's pods have finished or failed at since they started; None if no page says so. All else that
    clients see, refusals and their own deadlines, says nothing about a student.

    Only these lines are read, instead of the page: the general parser takes minutes for a page that is made for it.
    """
    counts: defaultdict[str, int] = defaultdict(int)
    for text in pages:
        for line in _COUNTER.finditer(text):
            counts[line["what"]] += int(float(line["value"]))
    total = sum(counts.values())
    if total > _MOST:
        return Requests(counts["failures"] * _MOST // total, _MOST)
    return Requests(counts["failures"], total) if counts else None
