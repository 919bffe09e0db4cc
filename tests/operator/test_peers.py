"""What pods say, and pods that say nothing, rubbish or too much: nobody waits for them, nobody believes them."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from opd_core.api.types import KIND
from opd_operator import names, peers
from opd_operator.cache import Cache
from opd_operator.observe import Requests
from opd_operator.peers import Answers, Peers, requests_in
from opd_operator.words import progress

SAID = {
    "stage": "Training", "round": 30, "totalRounds": 500, "percentage": 6.0, "remainingSeconds": 360.4,
    "imagesPerSecond": 3.1, "metrics": [{"task": "ocr", "loss": 1.25, "velocityMse": 0.5}],
    "checkpoint": {"round": 20, "path": "p"},
}  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        None, "", "<html>", "[]", "{}", '{"round": -1, "totalRounds": 5, "percentage": 1}',
        json.dumps({**SAID, "percentage": 900}), json.dumps({**SAID, "metrics": [{"loss": 1}]}),
        json.dumps({**SAID, "metrics": [{"task": str(i)} for i in range(65)]}), '{"round": 1e400}',
        json.dumps({**SAID, "remainingSeconds": "soon"}),
    ],
)  # fmt: skip
def test_what_is_no_progress_is_not_believed(text: str | None) -> None:
    assert progress(text) is None


def test_a_trainers_progress_is_read_with_all_its_figures() -> None:
    found = progress(json.dumps({**SAID, "somethingNew": 1}))
    assert found is not None
    assert (found.round, found.checkpoint and found.checkpoint.round) == (30, 20)
    assert found.metrics[0].figures == {"loss": 1.25, "velocityMse": 0.5}


def test_failed_requests_are_those_with_a_server_error() -> None:
    page = "\n".join(
        [
            "# TYPE opd_endpoint_requests counter",
            'opd_endpoint_requests_total{code="200"} 90',
            'opd_endpoint_requests_total{code="429"} 5',
            'opd_endpoint_requests_total{code="500"} 3',
            'opd_endpoint_requests_total{code="503"} 2',
            "",
        ]
    )
    assert requests_in([page, page]) == Requests(failed=10, total=200)
    assert requests_in(["not { metrics", page]) == Requests(failed=5, total=100)
    assert requests_in(["# TYPE other gauge\nother 1\n"]) is None


# ---------------------------------------------------------------------------------------------------- over the network


def family(status: dict[str, Any], owner: str = "tiny", ip: str = "127.0.0.1", cache: Cache | None = None) -> Cache:
    """A distillation with one training pod and one pod of a canary."""
    cache = cache or Cache()
    metadata = {"namespace": "team", "name": owner, "uid": owner, "resourceVersion": "1"}
    cache.put({"kind": KIND, "apiVersion": "v", "metadata": metadata, "spec": {}, "status": status})
    for role, revision in ((names.TRAINER, ""), (names.ENDPOINT, "r2")):
        labels = {names.ROLE: role, names.OWNER: owner, names.DISTILLATION: owner, names.REVISION: revision}
        name = f"{owner}-{role}"
        pod = {"namespace": "team", "name": name, "uid": name, "resourceVersion": "1", "labels": labels}
        conditions = [{"type": "Ready", "status": "True"}]
        state = {"phase": "Running", "podIP": ip, "conditions": conditions, "containerStatuses": []}
        cache.put({"kind": "Pod", "metadata": pod, "status": state})
    return cache


async def once(cache: Cache, monkeypatch: pytest.MonkeyPatch, port: int) -> tuple[Peers, list[Any]]:
    """Ask until the first round is over."""
    monkeypatch.setattr(names, "TRAINER_METRICS", port)
    monkeypatch.setattr(names, "ENDPOINT_HTTP", port)
    woken: list[Any] = []
    async with aiohttp.ClientSession() as session:
        found = Peers(session)
        task = asyncio.create_task(found.keep_asking(cache, woken.append))
        async with asyncio.timeout(10):
            while not woken:
                await asyncio.sleep(0.02)
        task.cancel()
    return found, woken


def serving(port: int, pages: dict[str, Callable[[], web.StreamResponse]]) -> web.AppRunner:
    app = web.Application()

    async def answer(request: web.Request) -> web.StreamResponse:
        return pages[request.path]()

    app.add_routes([web.get("/{tail:.*}", answer)])
    return web.AppRunner(app)


TRAINING = {"workers": {"desired": 1}}
CANARY = {"endpoint": {"canary": {"revision": "r2"}}, "student": {"digest": "d"}}


def test_trainer_and_canary_are_asked_and_whoever_has_news_is_woken(
    monkeypatch: pytest.MonkeyPatch, free_port: Callable[[], int]
) -> None:
    port = free_port()
    metrics = '# TYPE opd_endpoint_requests counter\nopd_endpoint_requests_total{code="200"} 7\n'
    pages = {"/progress": lambda: web.json_response(SAID), "/metrics": lambda: web.Response(text=metrics)}

    async def play(status: dict[str, Any]) -> tuple[Peers, list[Any]]:
        runner = serving(port, pages)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        try:
            return await once(family(status), monkeypatch, port)
        finally:
            await runner.cleanup()

    found, woken = asyncio.run(play(TRAINING))
    assert woken == [("team", "tiny")]
    assert found.answers["team", "tiny"].progress == progress(json.dumps(SAID))
    found, _ = asyncio.run(play(CANARY))
    assert found.answers["team", "tiny"].requests == Requests(failed=0, total=7)


def test_a_pod_that_does_not_answer_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch, free_port: Callable[[], int]
) -> None:
    """It takes the connection and is silent; another distillation's trainer is asked all the same."""
    port = free_port()
    cache = family(TRAINING, "mute", "127.0.0.2", family(TRAINING))

    async def play() -> tuple[Peers, list[Any]]:
        async def hold(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await asyncio.sleep(30)
            writer.close()

        mute = await asyncio.start_server(hold, "127.0.0.2", port)
        runner = serving(port, {"/progress": lambda: web.json_response(SAID)})
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        try:
            return await once(cache, monkeypatch, port)
        finally:
            mute.close()
            await runner.cleanup()

    found, woken = asyncio.run(play())
    assert ("team", "tiny") in woken
    assert found.answers["team", "tiny"].progress is not None
    assert found.answers["team", "mute"] == Answers(None, None)


def test_nobody_is_asked_who_neither_trains_nor_rolls_out() -> None:
    for status, asked in (({"workers": 1}, True), ({"workers": 1, "student": {"digest": "d"}}, False), ({}, False)):
        cache = family(status)
        obj = cache.get(("team", "tiny"))
        assert obj is not None
        assert (peers._questions(obj, cache) is not None) == asked, status
