"""Which samples the next forward pass advances: step-level continuous batching, shared fairly. Pure functions.

One *sample* is one image on its way from noise. A tick advances one group: samples whose tensors can share a batch,
whatever their prompt, step, step count, guidance or seed. Turns go by work that was done, in pixels times forwards:
first to the client that has had the least, then to the least served of that client's groups. So a client with a hundred
sizes gets no more than one with a single image, and a large image no more than a small one. What room the batch has
left goes to other clients' samples of that group; each client pays for its own. Within a client the oldest go first,
so everyone finishes.
"""

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

_MOST_AHEAD = 16  # steps of the largest image that a client can owe for places which nobody else wanted


class Sample(Protocol):
    """`group`: what must match to share a batch. `work` of one step, in pixels; `pixels` of the image."""

    @property
    def client(self) -> str: ...
    @property
    def group(self) -> Hashable: ...
    @property
    def work(self) -> int: ...
    @property
    def pixels(self) -> int: ...


AnySample = TypeVar("AnySample", bound=Sample)
Served = Mapping[tuple[Hashable, ...], float]  # work done for (client,) and (client, group)


def plan(samples: Sequence[AnySample], served: Served, max_images: int, max_pixels: int) -> list[AnySample]:
    """The samples to advance by one step now, at least one where there are any. `samples` in order of arrival."""
    if not samples:
        return []
    clients = _levels(served, ((sample.client,) for sample in samples))
    (leader,) = min(clients, key=clients.__getitem__)
    groups = _levels(served, ((leader, sample.group) for sample in samples if sample.client == leader))
    _, group = min(groups, key=groups.__getitem__)
    able = sorted((s for s in samples if s.group == group), key=lambda s: (s.client != leader, clients[s.client,]))
    fit = min(max_images, max(max_pixels // able[0].pixels, 1))
    return able[:fit]


def charge(served: Served, samples: Sequence[Sample], batch: Collection[Sample]) -> Served:
    """What has been done for whom, after a tick in which `batch`, some of `samples`, made a step."""
    ahead = _MOST_AHEAD * max(sample.work for sample in samples)
    clients = _levels(served, ((sample.client,) for sample in samples))
    levels = dict(clients)
    for (client,) in clients:
        levels |= _levels(served, ((client, sample.group) for sample in samples if sample.client == client))
    for sample in batch:
        levels[sample.client,] += sample.work
        levels[sample.client, sample.group] += sample.work
    least = min(levels[path] for path in clients)
    for path in clients:
        levels[path] = min(levels[path], least + ahead)
    # Whoever comes back at once has not lost its debt by leaving.
    return {path: level for path, level in served.items() if len(path) == 1 and level > least} | levels


def _levels(served: Served, paths: Iterable[tuple[Hashable, ...]]) -> dict[tuple[Hashable, ...], float]:
    """The level of each path, in their order; who is new starts beside the least served."""
    unique = dict.fromkeys(paths)
    least = min((served[path] for path in unique if path in served), default=0.0)
    return {path: served.get(path, least) for path in unique}
