"""What the operator shows on its own ports: /livez and /readyz to the kubelet, /metrics to Prometheus.

Whoever can reach a port may ask: a question is bounded in bytes, one connection in time, and the page of the metrics,
which costs a look at every object, is kept for a few seconds for all who ask.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

from opd_core.ports import EVERYWHERE, listen
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_STUCK_SECONDS = 600.0  # a look with every request as slow as allowed takes less
_PAGE_SECONDS = 5.0
_SECONDS = 10.0  # of a connection
_LARGEST = 8192  # bytes of a question

Page = tuple[int, str, bytes]  # status, content type, content
Pages = Mapping[str, Callable[[], Awaitable[Page]]]


def probe_pages(*, ready: Callable[[], bool], busy: Callable[[], float]) -> Pages:
    """Args:
    ready: whether everything has been listed; a follower is ready too, it waits for the lease.
    busy: seconds that a worker has been at one object, the longest of them.
    """

    async def livez() -> Page:
        # That this answers shows that the loop turns. A long queue is no reason to start anew: it would begin again.
        seconds = busy()
        return _text(503 if seconds > _STUCK_SECONDS else 200, f"at one object for {seconds:.0f} s\n")

    async def readyz() -> Page:
        return _text(200, "ok\n") if ready() else _text(503, "listing\n")

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


async def serve(port: int, pages: Pages) -> asyncio.Server:
    """On every address of the pod.

    Raises:
        UnavailableError: the port is taken.
    """

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_SECONDS):
                await _answer(reader, writer, pages)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # it has hung up, or is no HTTP client
        finally:
            writer.transport.abort()

    return await asyncio.start_server(connected, sock=listen(EVERYWHERE, port), limit=_LARGEST)


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pages: Pages) -> None:
    question = (await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)
    method, path = question[0], question[1].partition(b"?")[0].decode(errors="replace") if len(question) > 1 else ""
    if method not in (b"GET", b"HEAD"):
        status, kind, content = _text(405, "GET only\n")
    elif path not in pages:
        status, kind, content = _text(404, f"{', '.join(pages)}\n")
    else:
        status, kind, content = await pages[path]()
    head = f"HTTP/1.1 {status} -\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode())
    if method == b"GET":
        writer.write(content)
    await writer.drain()
    writer.close()
    await writer.wait_closed()


def _text(status: int, text: str) -> Page:
    return status, "text/plain; charset=utf-8", text.encode()
