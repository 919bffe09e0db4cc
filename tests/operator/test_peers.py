"""What pods say, and pods that say nothing, rubbish or too much: nobody waits for them, nobody believes them."""

import asyncio
import gzip
import json
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web
from opd_core.api.types import KIND
from opd_operator import names, peers
from opd_operator.cache import Cache
from opd_operator.observe import Requests
from opd_operator.peers import Peers, requests_in
from opd_operator.words import progress
from opd_serving.endpoint.metrics import Metrics
from prometheus_client import generate_latest

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


def test_a_tasks_figures_are_finite_numbers_and_not_too_many() -> None:
    row = {
        "task": "ocr",
        "loss": 1,
        "nan": float("nan"),
        "big": 10**400,
        "minus": -(10**400),
        "nested": [[]],
        "no": None,
    }
    found = progress(json.dumps({**SAID, "metrics": [{**row, **{f"f{i}": i for i in range(1000)}}]}))
    assert found is not None
    (task,) = found.metrics
    assert len(task.figures) == 64
    assert set(task.figures) == {"loss", *(f"f{i}" for i in range(63))}
    assert all(math.isfinite(value) for value in task.figures.values())


def test_what_an_endpoint_counts_is_what_is_read() -> None:
    """Its own page: images that are there and failures inside count, what clients bring upon themselves does not."""
    metrics = Metrics()
    page = generate_latest(metrics.registry).decode()
    assert requests_in([page]) == Requests(failed=0, total=0)
    metrics.images.inc(90)
    metrics.failures.labels("encode").inc(3)
    metrics.failures.labels("step").inc(7)
    for code in ("400", "429", "499", "503", "504"):
        metrics.requests.labels("m", code).inc(500)
    metrics.cancelled.labels("timeout").inc(40)
    page = generate_latest(metrics.registry).decode()
    assert requests_in([page, page]) == Requests(failed=20, total=200)
    assert requests_in(["not { metrics", page]) == Requests(failed=10, total=100)
    assert requests_in(["# TYPE other gauge\nother 1\n"]) is None


def test_a_count_is_as_large_as_it_needs_to_be() -> None:
    """So many failures are judged by their share: the sum over their chances takes as many steps as there are."""
    page = 'opd_endpoint_images_total {}\nopd_endpoint_failures_total{{stage="step"}} {}\n'
    assert requests_in([page.format("3e+06", "1e+06")]) == Requests(failed=2500, total=10_000)
    assert requests_in([page.format("9" * 15, "9.99e+99")]) == Requests(failed=9999, total=10_000)


@pytest.mark.parametrize("value", ["NaN", "+Inf", "1e400", "-5", "9" * 5000, "1e+999", "0x7", "", "\u0663"])
def test_a_count_that_is_none_does_not_count(value: str) -> None:
    """Each once ended the operator, for all namespaces."""
    page = f'opd_endpoint_failures_total{{stage="step"}} {value}\nopd_endpoint_images_total 7.0\n'
    assert requests_in([page]) == Requests(failed=0, total=7)


HOSTILE_BODIES = [
    b"[" * 60_000, b'{"a":' * 20_000, b"9" * 60_000, b"\xff" * 1000, b"\x00", b'"\\ud800"', b'{"round": NaN}',
    json.dumps({**SAID, "metrics": [{"task": "a", "x": [[]] * 20_000}]}).encode(),
    json.dumps({**SAID, "round": int("9" * 4000)}).encode(),
    b"a{x=\"" + b'\\"' * 30_000 + b"\"} 1\n", b"opd_endpoint_images_total{" * 2000, b"opd_endpoint_images_total " + b"1" * 60_000,
]  # fmt: skip


@pytest.mark.parametrize("body", HOSTILE_BODIES, ids=range(len(HOSTILE_BODIES)))
def test_a_hostile_page_costs_no_more_than_an_honest_one(body: bytes) -> None:
    """The bound is generous: what it guards against took minutes, or ended in an exception that nobody caught."""
    text = body.decode(errors="replace")
    began = time.process_time()
    progress(text)
    requests_in([text])
    assert time.process_time() - began < 1


# ---------------------------------------------------------------------------------------------------- over the network


def family(
    status: dict[str, Any],
    owner: str = "tiny",
    ip: str = "127.0.0.1",
    cache: Cache | None = None,
    namespace: str = "team",
) -> Cache:
    """A distillation with one training pod, one that trains teacher ocr, and one pod of a canary."""
    cache = Cache() if cache is None else cache
    metadata = {"namespace": namespace, "name": owner, "uid": owner, "resourceVersion": "1"}
    cache.put({"kind": KIND, "apiVersion": "v", "metadata": metadata, "spec": {}, "status": status})
    own = {names.TRAINER: {}, names.TEACH: {names.TEACHER: "ocr"}, names.ENDPOINT: {names.REVISION: "r2"}}
    for role, more in own.items():
        labels = {names.ROLE: role, names.OWNER: owner, names.DISTILLATION: owner, **more}
        name = f"{owner}-{role}"
        pod = {"namespace": namespace, "name": name, "uid": name, "resourceVersion": "1", "labels": labels}
        conditions = [{"type": "Ready", "status": "True"}]
        state = {"phase": "Running", "podIP": ip, "conditions": conditions, "containerStatuses": []}
        cache.put({"kind": "Pod", "metadata": pod, "status": state})
    return cache


async def once(cache: Cache, monkeypatch: pytest.MonkeyPatch, port: int, until: int = 1) -> tuple[Peers, list[Any]]:
    """Ask until so many have been woken."""
    monkeypatch.setattr(names, "TRAINER_METRICS", port)
    monkeypatch.setattr(names, "ENDPOINT_METRICS", port)
    woken: list[Any] = []
    found = Peers()
    task = asyncio.create_task(found.keep_asking(cache, woken.append))
    async with asyncio.timeout(20):
        while len(woken) < until:
            assert not task.done(), task.exception()
            await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
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
    metrics = "# TYPE opd_endpoint_images counter\nopd_endpoint_images_total 7.0\n"
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
    assert found.answers["team", "tiny"].taught == {"ocr": progress(json.dumps(SAID))}
    found, _ = asyncio.run(play(CANARY))
    assert found.answers["team", "tiny"].requests == Requests(failed=0, total=7)


HEAD = b"HTTP/1.1 200 OK\r\n"
LENGTH = b"Content-Length: 999999999999\r\n\r\n"
BOMB = gzip.compress(b" " * (64 << 20))

Hold = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]


async def silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(30)


def without_end(start: bytes, part: bytes) -> Hold:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(start)
        while not writer.is_closing():
            writer.write(part)
            await writer.drain()

    return answer


def says(content: bytes) -> Hold:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(content)
        await writer.drain()
        writer.close()

    return answer


HOSTILE = {
    "silence": silent,
    "an endless body": without_end(HEAD + LENGTH, b"x" * 65536),
    "endless headers": without_end(HEAD, b"X-A: y\r\n" * 5000),
    "an endless header": without_end(HEAD + b"X-A: ", b"y" * 65536),
    "endless interim answers": without_end(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 2000),
    "an endless chunk": without_end(HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffffff\r\n", b"0" * 65536),
    "compressed zeros": says(HEAD + b"Content-Encoding: gzip\r\n\r\n" + BOMB),
    "no HTTP": says(b"\x00" * 1000),
    "a negative length": says(HEAD + b"Content-Length: -5\r\n\r\n{}"),
    "a length that is none": says(HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n{}"),
    "a chunk that is none": says(HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"),
    "a status that is none": says(b"HTTP/1.1 " + b"9" * 5000 + b" OK\r\n\r\n"),
    "half an answer": says(HEAD + b"Content-Length: 500\r\n\r\n" + json.dumps(SAID).encode()),
    "another place": says(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\n\r\n"),
}


@pytest.mark.parametrize("hold", HOSTILE.values(), ids=HOSTILE)
def test_a_pod_that_answers_badly_or_never_holds_up_nobody(
    hold: Hold, monkeypatch: pytest.MonkeyPatch, free_port: Callable[[], int]
) -> None:
    """Many of them; another distillation's trainer is asked all the same, and they have said nothing."""
    port = free_port()
    cache = family(TRAINING)
    for number in range(20):
        family(TRAINING, f"hostile-{number}", "127.0.0.2", cache)

    async def play() -> tuple[Peers, list[Any]]:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await hold(reader, writer)
            except OSError:
                pass  # it has heard enough
            finally:
                writer.close()

        hostile = await asyncio.start_server(answer, "127.0.0.2", port)
        runner = serving(port, {"/progress": lambda: web.json_response(SAID)})
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        try:
            return await once(cache, monkeypatch, port)
        finally:
            hostile.close()
            await runner.cleanup()

    found, woken = asyncio.run(play())
    assert woken == [("team", "tiny")]
    assert found.answers["team", "tiny"].progress is not None


def test_an_answer_in_several_pieces_is_one(free_port: Callable[[], int]) -> None:
    body = json.dumps(SAID).encode()
    answers = {
        "/length": [HEAD + b"Content-Length: %d\r\n\r\n" % len(body), body[:20], body[20:]],
        "/end": [HEAD + b"\r\n" + body[:20], body[20:]],
        "/chunked": [HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n", body[:5], b"\r\n%x\r\n" % len(body[5:]), body[5:], b"\r\n0\r\n\r\n"],
    }  # fmt: skip

    async def play() -> list[str | None]:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            path = (await reader.readline()).split()[1].decode()
            for part in answers[path]:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.05)
            writer.close()

        port = free_port()
        async with await asyncio.start_server(answer, "127.0.0.1", port):
            return [await peers.fetch("127.0.0.1", port, path) for path in answers]

    assert asyncio.run(play()) == [body.decode()] * 3


def test_silent_pods_of_one_namespace_do_not_slow_those_of_another(
    monkeypatch: pytest.MonkeyPatch, free_port: Callable[[], int]
) -> None:
    """More of them than questions are asked at once."""
    cache = Cache()
    for number in range(200):
        family(TRAINING, f"mute-{number}", "127.0.0.2", cache, namespace="other")
    family(TRAINING, cache=cache)
    asked: list[str] = []

    async def get(host: str, _: int, __: str) -> str | None:
        asked.append(host)
        if host == "127.0.0.2":
            await asyncio.sleep(30)
        return json.dumps(SAID)

    monkeypatch.setattr(peers, "fetch", get)
    asyncio.run(once(cache, monkeypatch, free_port()))
    assert asked.count("127.0.0.2") < 64


def test_an_exception_belongs_to_one_object(
    monkeypatch: pytest.MonkeyPatch, free_port: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    """A defect, or a status that somebody else has written: it is told once, and the others are asked."""
    monkeypatch.setattr(peers, "_PERIOD", 0.05)
    cache = family({"workers": {}, "endpoint": {"canary": {"no": "revision"}}}, "broken")
    family(TRAINING, cache=cache)
    rounds = 0

    async def get(*_: Any) -> str | None:
        nonlocal rounds
        rounds += 1
        return json.dumps({**SAID, "round": rounds})

    monkeypatch.setattr(peers, "fetch", get)
    _, woken = asyncio.run(once(cache, monkeypatch, free_port(), until=3))
    assert set(woken) == {("team", "tiny")}
    (record,) = [record for record in caplog.records if "broken" in record.getMessage()]
    assert record.exc_info


def test_nobody_is_asked_who_neither_trains_nor_rolls_out() -> None:
    for status, asked in (
        ({"workers": 1}, True),
        ({"workers": 1, "student": {"digest": "d"}}, False),
        ({"teaching": [{"name": "geneval", "digest": "d"}, {"name": "ocr"}]}, True),
        ({"teaching": [{"name": "ocr", "digest": "d"}]}, False),
        ({}, False),
    ):
        cache = family(status)
        obj = cache.get(("team", "tiny"))
        assert obj is not None
        assert any(peers._questions(obj, cache)) == asked, status
