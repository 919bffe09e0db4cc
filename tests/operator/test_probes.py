"""The operator's own ports: they answer on both stacks, and a page of metrics is made once for all."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing

import pytest
from opd_core.pages import Pages, serve
from opd_core.ports import EVERYWHERE, listen
from opd_operator import peers
from opd_operator.probes import metrics_pages, probe_pages
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tests.questions import asked


class Counted(Collector):
    """Counts how often it is asked."""

    scrapes = 0

    def collect(self) -> Iterator[Metric]:
        self.scrapes += 1
        yield GaugeMetricFamily("scrapes", "So many.", value=self.scrapes)


def healthy() -> Pages:
    return probe_pages(ready=lambda: True, busy=lambda: 0.0)


def served(pages: Pages, port: int, play: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        with closing(await serve(listen(EVERYWHERE, port), pages)):
            async with asyncio.timeout(20):
                await play()

    asyncio.run(run())


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_both_stacks_are_answered(host: str, free_port: Callable[[], int]) -> None:
    """On a cluster of IPv6 alone the kubelet asks there, and would end a healthy operator."""
    if host == "::1" and not socket.has_dualstack_ipv6():
        host = "127.0.0.1"  # the fallback of a machine without IPv6
    port = free_port()

    async def play() -> None:
        assert await peers.fetch(host, port, "/readyz") == "ok\n"

    served(healthy(), port, play)


def test_a_long_queue_is_no_reason_to_start_anew_and_a_stuck_worker_is(free_port: Callable[[], int]) -> None:
    port = free_port()
    at_work = {"seconds": 300.0}
    pages = probe_pages(ready=lambda: False, busy=lambda: at_work["seconds"])

    async def play() -> None:
        assert b" 200 " in await asked(port, b"GET /livez HTTP/1.1\r\n\r\n")
        assert b" 503 " in await asked(port, b"GET /readyz?verbose HTTP/1.1\r\n\r\n")
        at_work["seconds"] = 700.0
        assert b" 503 " in await asked(port, b"GET /livez HTTP/1.1\r\n\r\n")

    served(pages, port, play)


def test_scrapers_share_a_page_for_some_seconds(free_port: Callable[[], int]) -> None:
    """Each costs a look at every object: many at once took a good part of the operator's time."""
    port, now = free_port(), [100.0]
    registry, counted = CollectorRegistry(), Counted()
    registry.register(counted)
    counted.scrapes = 0  # registering asks for the names

    async def play() -> None:
        first = await asyncio.gather(*(peers.fetch("127.0.0.1", port, "/metrics") for _ in range(40)))
        assert len(set(first)) == 1
        assert "scrapes 1.0" in str(first[0])
        now[0] += 5
        assert "scrapes 2.0" in str(await peers.fetch("127.0.0.1", port, "/metrics"))

    served(metrics_pages(registry, lambda: now[0]), port, play)
