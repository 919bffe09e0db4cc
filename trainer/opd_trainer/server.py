"""One port per pod: /metrics for Prometheus, /progress for the operator and `opd run`, /healthz for the kubelet."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable

from opd_core.pages import Page, Pages, text
from opd_core.pages import serve as serve_pages
from opd_core.ports import listen
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from opd_trainer.metrics import Metrics


def serve(metrics: Metrics, host: str, port: int) -> Callable[[], None]:
    """Answer on a background thread until the process ends or what is returned is called.

    Raises:
        UnavailableError: the port is taken.
    """
    loop, done, listening = asyncio.new_event_loop(), asyncio.Event(), listen(host, port)

    def answer() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(_serve(listening, _pages(metrics), done))

    thread = threading.Thread(target=answer, name="metrics", daemon=True)
    thread.start()

    def end() -> None:
        loop.call_soon_threadsafe(done.set)
        thread.join()

    return end


async def _serve(listening: socket.socket, pages: Pages, done: asyncio.Event) -> None:
    server = await serve_pages(listening, pages)
    await done.wait()
    server.close()


def _pages(metrics: Metrics) -> Pages:
    async def series() -> Page:
        return 200, CONTENT_TYPE_LATEST, generate_latest(metrics.registry)

    async def progress() -> Page:
        return 200, "application/json", json.dumps(metrics.progress).encode()

    async def health() -> Page:
        return text(200, "ok\n")

    return {"/metrics": series, "/progress": progress, "/healthz": health}
