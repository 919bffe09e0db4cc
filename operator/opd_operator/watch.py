"""kopf as the eyes: what happens to objects and children goes into the cache, and the object into the queue."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

import kopf
from kopf._core.reactor.inventory import ResourceMemories, ResourceMemory  # the type of an argument of kopf.operator

from opd_operator import names
from opd_operator.cache import Cache, Key, version_of
from opd_operator.kube import DISTILLATION, OWNED, PAGE, POD, ROUTE, Kube, Resource
from opd_operator.metrics import Metrics
from opd_operator.queue import WorkQueue

log = logging.getLogger("opd_operator")

_OURS = f"app.kubernetes.io/managed-by={names.MANAGER}"
_LATE = 10.0  # seconds after which an event that a list has seen should have come by its watch, too
_BACKOFFS = (1, 1, 2, 3, *[5] * 20)  # seconds; an API server that is back after minutes is seen at once


Watch = tuple[str, str]  # kind and namespace; no namespace: all of them


class DeadWatchError(Exception):
    """A watch that is open and says nothing."""


class NewKindError(Exception):
    """The cluster has learnt a kind that is not watched."""


@dataclass
class Watches:
    """What is watched, and the newest resource version that each watch has brought. There is one of every kind in every
    namespace, or in all of them together."""

    resources: Sequence[Resource]
    namespaces: Sequence[str] = ()
    seen: dict[Watch, int] = field(default_factory=dict)

    def saw(self, kind: str, namespace: str, version: str) -> None:
        watch = (kind, namespace if self.namespaces else "")
        self.seen[watch] = max(self.seen.get(watch, 0), int(version))


class NoMemories(ResourceMemories):  # type: ignore[misc]
    """kopf remembers every object it has seen, for daemons and indices; there are none here, and it adds up."""

    async def recall(self, *args: Any, **kwargs: Any) -> ResourceMemory:
        return await super().recall(*args, **{**kwargs, "ephemeral": True})


class NoEssences(kopf.AnnotationsDiffBaseStorage):  # type: ignore[misc]
    """kopf copies every object it sees, to find what a handler of changes has not seen yet. There are none here."""

    def build(self, **_: Any) -> Any:
        return {}


async def watched(kube: Kube) -> Sequence[Resource]:
    """Children before distillations: whoever is known has its children known."""
    routes = (ROUTE,) if await kube.has(ROUTE) else ()
    return (*OWNED, *routes, POD, DISTILLATION)


def registry(cache: Cache, queue: WorkQueue[Key], watches: Watches) -> kopf.OperatorRegistry:
    """Handlers for kopf. They are level-triggered: an event says only that something is worth a look, since edges are
    lost when a process restarts (kopf's own docs/reconciliation.rst)."""
    found = kopf.OperatorRegistry()

    def seen(resource: Resource) -> Any:
        async def handler(event: Any, **_: Any) -> None:
            obj = {"apiVersion": resource.api_version, "kind": resource.kind, **event["object"]}
            watches.saw(resource.kind, obj["metadata"]["namespace"], obj["metadata"]["resourceVersion"])
            key = cache.remove(obj) if event["type"] == "DELETED" else cache.put(obj)
            if key is not None:
                queue.add(key)

        return handler

    def configure(settings: kopf.OperatorSettings, **_: Any) -> None:
        settings.posting.enabled = False  # our own events, on our own terms
        settings.scanning.disabled = True
        settings.persistence.diffbase_storage = NoEssences()
        settings.networking.request_timeout = 30
        settings.networking.connect_timeout = 10
        settings.networking.error_backoffs = _BACKOFFS
        settings.watching.connect_timeout = 10
        settings.watching.server_timeout = 290
        settings.watching.client_timeout = 300
        settings.watching.chunk_size = PAGE
        settings.queueing.idle_timeout = 0.1  # a task and a queue of every object, as long as this after its last event
        for resource in watches.resources:
            if resource is not DISTILLATION:
                settings.watching.label_selectors[resource.plural] = _OURS

    def login(**kwargs: Any) -> Any:
        return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)

    kopf.on.startup(registry=found)(configure)
    kopf.on.login(registry=found)(login)
    for resource in watches.resources:
        group, _, version = resource.api_version.rpartition("/")
        kopf.on.event(group, version, resource.plural, registry=found)(seen(resource))
    return found


async def fill(kube: Kube, cache: Cache, watches: Watches) -> tuple[set[Key], dict[Watch, int]]:
    """List everything into the cache. Returns the keys that this was news for, and the newest version by watch of what
    was news: with a watch that works there is none, or its event is on the way."""
    news: set[Key] = set()
    newest: dict[Watch, int] = {}
    for resource in watches.resources:
        selector = "" if resource is DISTILLATION else _OURS
        present, versions = set(), []
        for namespace in watches.namespaces or ("",):
            async for page in kube.pages(resource, namespace, selector):
                versions.append(page.version)
                for obj in page.items:
                    present.add(obj["metadata"]["uid"])
                    if key := cache.put(obj):
                        news.add(key)
                        watch = (resource.kind, namespace)
                        newest[watch] = max(newest.get(watch, 0), version_of(obj))
        news |= cache.retain(resource.kind, present, min(versions))
    return news, newest


async def resync(
    connect: Callable[[], AbstractAsyncContextManager[Kube]],
    cache: Cache,
    queue: WorkQueue[Key],
    watches: Watches,
    metrics: Metrics,
    seconds: float,
) -> None:
    """A net under the watches: what they missed is found by listing, counted, and looked at.

    Each listing has connections of its own: those that are open may be as dead as the watches.

    Raises:
        DeadWatchError: a watch does not bring what a list has found. NewKindError: the Gateway API was installed. The
            process starts anew.
    """
    while True:
        await asyncio.sleep(seconds)
        try:
            async with connect() as kube:
                if ROUTE not in watches.resources and await kube.has(ROUTE):
                    raise NewKindError(f"{ROUTE.kind} is there now")
                news, newest = await fill(kube, cache, watches)
        except NewKindError:
            raise
        except Exception as error:
            log.warning("the full listing failed and is repeated: %r", error)
            continue
        metrics.resync_news.inc(len(news))
        for key in news:
            queue.add(key)
        if newest:
            await asyncio.sleep(_LATE)
        if dead := [watch for watch, version in newest.items() if watches.seen.get(watch, 0) < version]:
            said = ", ".join(" in ".join(part for part in watch if part) for watch in dead)
            raise DeadWatchError(f"the watch of {said} is open and brings nothing")
