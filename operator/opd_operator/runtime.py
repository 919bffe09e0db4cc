"""The operator's process: the lease, the listing before the first decision, then watches, workers and questions."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import kopf
from opd_core.pages import serve
from opd_core.ports import EVERYWHERE, listen

from opd_operator.cache import Cache, Key
from opd_operator.kube import Kube, connect
from opd_operator.leader import lead
from opd_operator.metrics import Metrics
from opd_operator.peers import Peers
from opd_operator.probes import metrics_pages, probe_pages
from opd_operator.queue import WorkQueue, work
from opd_operator.reconcile import Reconciler
from opd_operator.settings import Settings
from opd_operator.watch import NoMemories, Watches, fill, registry, resync, watched

log = logging.getLogger("opd_operator")


async def run(settings: Settings, stop: asyncio.Event) -> None:
    """Until `stop`.

    Raises:
        LeaseLostError: another one is at work. DeadWatchError: what is known may be old. NewKindError: more is to be
            watched. All: start anew.
    """
    cache, queue, listed = Cache(), WorkQueue[Key](), asyncio.Event()
    metrics = Metrics(cache, queue)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(connect(2 * settings.workers))
        leading = False

        def ready() -> bool:
            return listed.is_set() or not leading

        for port, pages in (
            (settings.metrics_port, metrics_pages(metrics.registry)),
            (settings.probe_port, probe_pages(ready=ready, busy=lambda: queue.busy_seconds)),
        ):
            stack.callback((await serve(listen(EVERYWHERE, port), pages)).close)
        kube, peers = Kube(client, metrics.api), Peers()
        reconciler = Reconciler(kube, cache, queue, metrics, settings, peers)

        @asynccontextmanager
        async def fresh() -> AsyncIterator[Kube]:
            async with connect(1) as own:
                yield Kube(own, metrics.api)

        async def play() -> None:
            nonlocal leading
            leading = True
            metrics.leader.set(1)
            watches = await _first_listing(kube, cache, settings)
            listed.set()
            for key in cache:
                queue.add(key)
            log.info("%d objects; watching %s", len(cache), settings.namespaces or "all namespaces")
            eyes = kopf.operator(
                registry=registry(cache, queue, watches),
                memories=NoMemories(),
                standalone=True,
                clusterwide=not settings.namespaces,
                namespaces=settings.namespaces,
                stop_flag=stop,
            )
            net = resync(fresh, cache, queue, watches, metrics, settings.resync_seconds)
            workers = [work(queue, reconciler.handle) for _ in range(settings.workers)]
            tasks = [asyncio.create_task(each) for each in (eyes, net, peers.keep_asking(cache, queue.add), *workers)]
            try:
                # None of them ends by itself: the first that does takes the process with it, which starts anew.
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    if task.done():
                        task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        campaign = (
            lead(client, settings.lease_name, settings.lease_namespace, play) if settings.leader_election else play()
        )
        leader, stopping = asyncio.create_task(campaign), asyncio.create_task(stop.wait())
        await asyncio.wait([leader, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not leader.done():
            leader.cancel()
        stopping.cancel()
        result = await asyncio.gather(leader, return_exceptions=True)
        if isinstance(result[0], Exception):
            raise result[0]


async def _first_listing(kube: Kube, cache: Cache, settings: Settings) -> Watches:
    """List everything once before the first decision: a child that is only not known yet must not be made again."""
    pause = 1.0
    while True:
        try:
            watches = Watches(await watched(kube), settings.namespaces)
            await fill(kube, cache, watches)
            return watches
        except Exception as error:
            log.warning("cannot list yet, again in %.0f s: %s", pause, error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, 30.0)
