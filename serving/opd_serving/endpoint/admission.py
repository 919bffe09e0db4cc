"""Who is let in, and when those who are not should come again. Plain data; the engine holds its lock around it."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

_SHARE = 0.75  # of the room, for one client while there are others
_OTHERS_SECONDS = 60.0  # a client counts for so long after it has asked
_MOST_SECONDS = 59  # clients ignore longer ones: OpenAI's of 60 (older ones for JavaScript) or more than 60
_LATE_SECONDS = 1.0  # how long a promised place is kept for who is late
_MARGIN = 1.1  # of the estimate: too early costs the client one of its few tries


class Job(Protocol):
    """An admitted request: `images` that were asked for, `work_left` in pixels times steps times forwards."""

    @property
    def client(self) -> str: ...
    @property
    def images(self) -> int: ...
    @property
    def work_left(self) -> float: ...


@dataclass(frozen=True)
class _Promise:
    """A request that was told to come again. Of the monotonic clock: `free`, when a place for it is expected; `due`,
    when it was told to come; `until`, when it is not expected any more."""

    client: str
    images: int
    work_left: float
    free: float
    due: float
    until: float


@dataclass
class Room:
    """What fits, who has it, and which places have been promised.

    Args:
        images: in flight at most. work: left at most before a request comes; one request may go beyond it.
        batch: images that a tick advances, which end together.
    """

    images: int
    work: float
    batch: int
    _seen: dict[str, float] = field(default_factory=dict)
    _promised: list[_Promise] = field(default_factory=list)

    def ask(self, client: str, images: int, work: float, jobs: Iterable[Job], rate: float, now: float) -> int | None:
        """None: come in. Else the seconds after which there will be room, for this client after all that were told so
        before it.

        Args:
            images, work: of the request. jobs: in flight, in order of arrival. rate: work done in a second.
            now: monotonic seconds.
        """
        jobs = list(jobs)
        self._seen[client] = now
        self._seen = {name: at for name, at in self._seen.items() if now - at < _OTHERS_SECONDS}
        self._promised = [promise for promise in self._promised if promise.until > now]
        told = self._redeem(client, images, now)
        # Whoever comes back as told has nobody before it but those who were told earlier; places that are free by now
        # are kept for those who were told.
        before = [promise for promise in self._promised if told is None or promise.free < told.free]
        kept = [promise for promise in before if told is None and promise.free <= now]
        mine = sum(job.images for job in jobs if job.client == client)
        share = self.images * _SHARE if len(self._seen) > 1 else self.images
        over_all = sum(job.images for job in [*jobs, *kept]) + images - self.images
        over_share = math.ceil(mine + images - share) if mine else 0
        over_work = sum(job.work_left for job in [*jobs, *kept]) - self.work
        if over_all <= 0 and over_share <= 0 and over_work <= 0:
            return None
        line: list[Job] = [*jobs, *before]
        later = [promise for promise in before if promise not in kept]
        ahead = 0.0
        if over_all > 0:
            places = over_all + sum(promise.images for promise in later)
            ahead = self._work_until(places, line, lambda job: job.images)
        if over_share > 0:
            own = over_share + sum(promise.images for promise in before if promise.client == client)
            ahead = max(ahead, self._work_until(own, line, lambda job: job.images if job.client == client else 0))
        if over_work > 0:
            ahead = max(ahead, over_work + sum(promise.work_left for promise in later))
        wait = ahead / rate if rate else 0.0
        seconds = min(max(math.ceil(_MARGIN * wait - 1e-6), 1), _MOST_SECONDS)
        free = now + wait if told is None else told.free  # it keeps its place in the line
        self._promised.append(_Promise(client, images, work, free, now + seconds, now + seconds + _LATE_SECONDS))
        return seconds

    def _redeem(self, client: str, images: int, now: float) -> _Promise | None:
        """The promise that this request comes back on, which is kept now."""
        for promise in self._promised:
            if promise.due <= now and (promise.client, promise.images) == (client, images):
                self._promised.remove(promise)
                return promise
        return None

    def _work_until(self, images: int, jobs: list[Job], counts: Callable[[Job], int]) -> float:
        """Work until `images` places are free. Images that share a batch end together, so a place is free when the
        batch is done in which it is; what is older is done before."""
        freed, position, work, end = 0, 0, 0.0, 0
        for job in jobs:
            if freed >= images and position >= end:
                break
            work += job.work_left
            position += job.images
            if freed < images:
                freed += counts(job)
                end = math.ceil(position / self.batch) * self.batch
        return work
