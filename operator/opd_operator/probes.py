"""What the operator shows on its own ports: /livez and /readyz to the kubelet, /metrics to Prometheus.

The page of the metrics costs a look at every object: it is kept for a few seconds for all who ask.
"""

import asyncio
import time
from collections.abc import Callable

from opd_core.pages import Page, Pages, text
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_STUCK_SECONDS = 600.0  # a look with every request as slow as allowed takes less
_PAGE_SECONDS = 5.0


def probe_pages(*, ready: Callable[[], bool], busy: Callable[[], float]) -> Pages:
    """Args:
    ready: whether everything has been listed; a follower is ready too, it waits for the lease.
    busy: seconds that a worker has been at one object, the longest of them.
    """

    async def livez() -> Page:
        # That this answers shows that the loop turns. A long queue is no reason to start anew: it would begin again.
        seconds = busy()
        return text(503 if seconds > _STUCK_SECONDS else 200, f"at one object for {seconds:.0f} s\n")

    async def readyz() -> Page:
        return text(200, "ok\n") if ready() else text(503, "listing\n")

    return {"/livez": livez, "/readyz": readyz}


def metrics_pages(registry: CollectorRegistry, clock: Callable[[], float] = time.monotonic) -> Pages:
    made, content, turn = -_PAGE_SECONDS, b"", asyncio.Lock()

    async def page() -> Page:
        nonlocal made, content
        async with turn:
            if clock() - made >= _PAGE_SECONDS:
                content = await asyncio.to_thread(generate_latest, registry)
                made = clock()
        return 200, CONTENT_TYPE_LATEST, content

    return {"/metrics": page}
