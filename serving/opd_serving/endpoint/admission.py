"""Who is let in, and when those who are not should come again. Plain data; the engine holds its lock around it."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

_SHARE = 0.75  # of the room, for one client while there are others
_OTHERS_SECONDS = 60.0  # a client counts for so long after it has asked
_MOST_SECONDS = 60  # clients ignore longer ones
_LATE_SECONDS = 1.0  # how long a promised place is kept in mind
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
    """A request that was told to come again, and is expected until a moment of the monotonic clock."""

    client: str
    images: int
    work_left: float
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
        mine = sum(job.images for job in jobs if job.client == client)
        share = self.images * _SHARE if len(self._seen) > 1 else self.images
        over_all = sum(job.images for job in jobs) + images - self.images
        over_share = math.ceil(mine + images - share) if mine else 0
        over_work = sum(job.work_left for job in jobs) - self.work
        if over_all <= 0 and over_share <= 0 and over_work <= 0:
            return None
        line: list[Job] = [*jobs, *self._promised]  # those who were promised a place will have it before
        ahead = 0.0
        if over_all > 0:
            places = over_all + sum(promise.images for promise in self._promised)
            ahead = self._work_until(places, line, lambda job: job.images)
        if over_share > 0:
            own = over_share + sum(promise.images for promise in self._promised if promise.client == client)
            ahead = max(ahead, self._work_until(own, line, lambda job: job.images if job.client == client else 0))
        if over_work > 0:
            ahead = max(ahead, over_work + sum(promise.work_left for promise in self._promised))
        seconds = min(max(math.ceil(_MARGIN * ahead / rate - 1e-6), 1), _MOST_SECONDS) if rate else 1
        self._promised.append(_Promise(client, images, work, now + seconds + _LATE_SECONDS))
        return seconds

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
