"""A keyed work queue: each key at most once in the queue and once at work; failures come back later and later."""

import asyncio
import heapq
import itertools
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0

K = TypeVar("K", bound=Hashable)


class WorkQueue(Generic[K]):
    """Keys that are added while they are at work are given out again afterwards, once."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ready: deque[K] = deque()
        self._since: dict[K, float] = {}  # queued keys, and since when
        self._active: dict[K, float] = {}  # keys at work, and since when
        self._again: set[K] = set()
        self._later: list[tuple[float, int, K]] = []
        self._due: dict[K, float] = {}
        self._failures: dict[K, int] = {}
        self._order = itertools.count()
        self._wake = asyncio.Event()
        self.adds = 0

    def __len__(self) -> int:
        return len(self._ready)

    @property
    def oldest_seconds(self) -> float:
        """How long the head of the queue has been waiting."""
        return self._clock() - self._since[self._ready[0]] if self._ready else 0.0

    @property
    def busy_seconds(self) -> float:
        """How long the key that is longest at work has been so."""
        return self._clock() - min(self._active.values()) if self._active else 0.0

    def add(self, key: K) -> None:
        self.adds += 1
        if key in self._active:
            self._again.add(key)
        elif key not in self._since:
            self._since[key] = self._clock()
            self._ready.append(key)
            self._wake.set()

    def add_after(self, key: K, seconds: float) -> None:
        """Add `key` then, or earlier if it was asked for earlier already."""
        due = self._clock() + max(0.0, seconds)
        if key in self._due and self._due[key] <= due:
            return
        self._due[key] = due
        heapq.heappush(self._later, (due, next(self._order), key))
        self._wake.set()

    def retry(self, key: K, at_least: float = 0.0) -> float:
        """Add `key` after a pause that doubles with every failure in a row. Returns the pause in seconds."""
        count = self._failures[key] = self._failures.get(key, 0) + 1
        pause = max(at_least, min(_FIRST_PAUSE * 2.0 ** min(count - 1, 16), _LONGEST_PAUSE))
        pause *= random.uniform(0.8, 1.2)  # noqa: S311  (spreads load, guards nothing)
        self.add_after(key, pause)
        return pause

    def forget(self, key: K) -> None:
        """The key has succeeded."""
        self._failures.pop(key, None)

    async def get(self) -> tuple[K, float]:
        """The next key and how long it waited. The caller says `done` when it has finished with it."""
        while True:
            self._release()
            if self._ready:
                key = self._ready.popleft()
                waited = self._clock() - self._since.pop(key)
                self._active[key] = self._clock()
                return key, waited
            self._wake.clear()
            pause = self._later[0][0] - self._clock() if self._later else None
            try:
                await asyncio.wait_for(self._wake.wait(), pause)
            except TimeoutError:
                continue

    def done(self, key: K) -> None:
        self._active.pop(key, None)
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    def _release(self) -> None:
        now = self._clock()
        while self._later and self._later[0][0] <= now:
            due, _, key = heapq.heappop(self._later)
            if self._due.get(key) == due:
                del self._due[key]
                self.add(key)
        if self._ready:
            self._wake.set()  # for the next worker


async def work(queue: WorkQueue[K], handle: Callable[[K, float], Awaitable[None]]) -> None:
    """One worker, until it is cancelled. `handle` deals with its own errors."""
    while True:
        key, waited = await queue.get()
        try:
            await handle(key, waited)
        finally:
            queue.done(key)
