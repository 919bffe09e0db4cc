"""What the pods themselves say, asked apart from the decisions: a pod that does not answer holds up nobody."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from opd_operator import names
from opd_operator.cache import Cache, Key, Object
from opd_operator.observe import PodView, Requests, observe
from opd_operator.words import Progress, progress

_TIMEOUT = aiohttp.ClientTimeout(total=3.0)
_PERIOD = 10.0  # seconds between two questions to one pod
_AT_ONCE = 64
_LARGEST = 4 << 20  # bytes of an answer

Ask = Callable[[str], Any]


@dataclass(frozen=True)
class Answers:
    """Of the pods of one distillation; None where nobody answered."""

    progress: Progress | None = None
    requests: Requests | None = None


@dataclass
class Peers:
    """The last answers, by distillation."""

    session: aiohttp.ClientSession
    answers: dict[Key, Answers] = field(default_factory=dict)

    async def keep_asking(self, cache: Cache, wake: Callable[[Key], None]) -> None:
        """Until cancelled; whoever has something new to say is woken."""
        limit = asyncio.Semaphore(_AT_ONCE)

        async def get(url: str) -> str | None:
            async with limit:
                return await self._get(url)

        while True:
            asked = {}
            for key in cache.inhabited():
                if (obj := cache.get(key)) and (found := _questions(obj, cache)):
                    asked[key] = found
            for gone in self.answers.keys() - asked.keys():
                del self.answers[gone]
            said = await asyncio.gather(*(ask(get, *found) for found in asked.values()))
            for key, answer in zip(asked, said, strict=True):
                if answer != self.answers.get(key):
                    self.answers[key] = answer
                    wake(key)
            await asyncio.sleep(_PERIOD)

    async def _get(self, url: str) -> str | None:
        try:
            async with self.session.get(url, timeout=_TIMEOUT, allow_redirects=False) as response:
                body = await response.content.read(_LARGEST)
                return body.decode(errors="replace") if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None  # not up yet, or busy; the next round asks again


def _questions(obj: Object, cache: Cache) -> tuple[list[PodView], list[PodView]] | None:
    """The trainer's first pod and the canary's pods of a distillation that has any."""
    status = obj.get("status") or {}
    canary = (status.get("endpoint") or {}).get("canary")
    if not canary and (status.get("student") or not status.get("workers")):
        return None
    pods = [pod for pod in observe(cache.children(obj)).pods if pod.ready and pod.ip]
    trainers = [pod for pod in pods if pod.role == names.TRAINER and pod.index == 0]
    canaries = [pod for pod in pods if canary and pod.revision == canary["revision"]]
    return (trainers[:1], canaries) if trainers or canaries else None


async def ask(get: Ask, trainers: Iterable[PodView], canaries: Iterable[PodView]) -> Answers:
    """The trainer's progress and the canary's requests."""
    pages = await asyncio.gather(
        *(get(f"http://{_host(pod.ip)}:{names.TRAINER_METRICS}/progress") for pod in trainers),
    )
    metrics = await asyncio.gather(*(get(f"http://{_host(pod.ip)}:{names.ENDPOINT_HTTP}/metrics") for pod in canaries))
    return Answers(progress(next(iter(pages), None)), requests_in(page for page in metrics if page))


def requests_in(pages: Iterable[str]) -> Requests | None:
    """Requests since these pods started, and those that ended with a 5xx status; None without requests.

    429 is the client's pace, not the student's fault.
    """
    total = failed = 0
    for page in pages:
        try:
            families = list(text_string_to_metric_families(page))
        except ValueError:
            continue  # not an endpoint's page
        for family in families:
            for sample in family.samples:
                if sample.name == "opd_endpoint_requests_total":
                    total += int(sample.value)
                    failed += int(sample.value) if sample.labels.get("code", "").startswith("5") else 0
    return Requests(failed, total) if total else None


def _host(ip: str) -> str:
    return f"[{ip}]" if ":" in ip else ip
