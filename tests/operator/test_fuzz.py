"""Hostile pods and objects beside an honest one, at random: the honest one is served all the while, and memory stays flat.

Some seconds in `make test`; OPD_FUZZ_SECONDS=600 is the long form, which prints what it has seen (`pytest -s`).
"""

import asyncio
import copy
import gzip
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest
from opd_core.api.types import KIND
from opd_operator import names, peers
from opd_operator.cache import Cache, Key
from opd_operator.kube import Kube
from opd_operator.metrics import Metrics
from opd_operator.peers import Peers
from opd_operator.queue import WorkQueue
from opd_operator.reconcile import Reconciler
from prometheus_client import generate_latest

from tests.operator.live import Api, Operator, to_student, wait_for
from tests.operator.world import SETTINGS, World, teachers

SECONDS = float(os.environ.get("OPD_FUZZ_SECONDS", "6"))

HONEST = {"round": 1, "totalRounds": 10**6, "percentage": 1.0, "metrics": [{"task": "ocr", "loss": 1.0}]}
TEXTS = [
    "", "[" * 4096, '{"a":' * 800, "9" * 4096, "\x1b]52;c;x\x07\x1b[2J", "\ud800", "\u202e", "\x00", "x" * 100_000, "NaN",
    '{"exitCode": 1e400}', '{"digest": "sha256:x\\n", "message": "\\u001b[2J"}', "-1", "1e999", "\u0663" * 30,
]  # fmt: skip
VALUES: list[Any] = [
    *TEXTS,
    None,
    True,
    -1,
    2**63,
    10**400,
    float("inf"),
    float("nan"),
    [],
    {},
    [[]] * 1000,
    {"a": [{}]},
]


def nested(rng: random.Random, depth: int) -> Any:
    value: Any = rng.choice(TEXTS)
    for _ in range(depth):
        value = rng.choice([{"a": value}, [value], {"metrics": [value]}])
    return value


def mutated(rng: random.Random, value: Any) -> Any:
    """A copy in which something, somewhere, is something else."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {name: item for name, item in value.items() if name != key}
        return {**value, key: mutated(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        return [*value[:place], mutated(rng, value[place]), *value[place + rng.choice([0, 1]) :]]
    return copy.deepcopy(rng.choice(VALUES)) if rng.random() < 0.9 else nested(rng, rng.choice([3, 150]))


# ------------------------------------------------------------------------------------------------------ in one process


class Paper:
    """Takes every write."""

    def now(self) -> float:
        return 1_800_000_000.0

    async def apply(self, manifest: dict[str, Any]) -> dict[str, Any]:
        version = str(time.monotonic_ns())
        return {**manifest, "metadata": {**manifest["metadata"], "uid": version, "resourceVersion": version}}

    async def write_status(self, obj: dict[str, Any], status: dict[str, Any]) -> dict[str, Any]:
        return {**obj, "metadata": {**obj["metadata"], "resourceVersion": str(time.monotonic_ns())}, "status": status}

    async def record(self, event: dict[str, Any]) -> None:
        json.dumps(event)

    async def delete(self, obj: dict[str, Any]) -> None: ...


def family(cache: Cache, world: World, namespace: str, change: Callable[[Any], Any]) -> Key:
    """The world's object and children in a namespace of their own, changed; what names them stays."""

    def put(obj: dict[str, Any], **metadata: Any) -> None:
        found = change(copy.deepcopy(obj))
        found = found if isinstance(found, dict) else {}
        kept = found.get("metadata") if isinstance(found.get("metadata"), dict) else {}
        own = {"namespace": namespace, "name": obj["metadata"]["name"], "resourceVersion": str(time.monotonic_ns())}
        cache.put({**found, "kind": obj["kind"], "metadata": {**kept, **own, **metadata}})

    put(world.obj, uid=namespace)
    for child in world.children.values():
        labels = {**child["metadata"]["labels"], names.OWNER: namespace, names.DISTILLATION: "tiny"}
        reference = {"apiVersion": world.obj["apiVersion"], "kind": KIND, "name": "tiny", "uid": namespace}
        owner = {} if child["kind"] == "Pod" else {"ownerReferences": [reference]}
        put(child, uid=f"{namespace}-{child['kind']}-{child['metadata']['name']}", labels=labels, **owner)
    return namespace, "tiny"


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_wrong_with_an_object_is_wrong_with_it_alone(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what no schema lets through, as an older type definition or none has let it."""
    rng = random.Random(seed)
    taught = World(teachers=teachers("geneval", "ocr")).settle().taught("geneval").run(names.TEACH)
    worlds = [World().settle(), World().settle().up(names.TEACHERS).run(), World().served(), taught]
    pages = [lambda: rng.choice(TEXTS), lambda: json.dumps(mutated(rng, HONEST)), lambda: json.dumps(nested(rng, 60))]

    async def fetch(*_: Any) -> str | None:
        return rng.choice(pages)()

    async def play() -> None:
        cache, queue, found = Cache(), WorkQueue[Key](), Peers()
        metrics = Metrics(cache, queue)
        reconciler = Reconciler(cast(Kube, Paper()), cache, queue, metrics, SETTINGS, found)
        monkeypatch.setattr(peers, "fetch", fetch)
        for number in range(12):
            hostile = family(cache, rng.choice(worlds), f"hostile-{number}", lambda obj: mutated(rng, obj))
            honest = family(cache, worlds[1], f"honest-{number}", lambda obj: obj)
            await found._round([hostile, honest], cache, queue.add, asyncio.Semaphore(8))
            await reconciler.handle(hostile, 0.0)
            await reconciler.reconcile(honest)
            obj = cache.get(honest)
            assert obj
            assert {c["type"]: c["reason"] for c in obj["status"]["conditions"]}["Trained"] == "Running"
            json.dumps(obj["status"], ensure_ascii=False).encode()  # no lone surrogate
            page = generate_latest(metrics.registry).decode()
            assert f'namespace="honest-{number}"' in page

    asyncio.run(play())


# --------------------------------------------------------------------------------------------- the operator's own process


def answers(rng: random.Random) -> Iterator[bytes]:
    """An answer of a hostile pod, in parts; some never end."""
    head = rng.choice(
        [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n" * 5000, b"HTTP/9 x\r\n", b"", b"\x00" * 99]
    )
    body = rng.choice(
        [
            json.dumps(mutated(rng, HONEST)).encode(), json.dumps(nested(rng, 900)).encode(), b"[" * 100_000,
            gzip.compress(b" " * (16 << 20)), rng.randbytes(5000), b'a{x="' + b'\\"' * 50_000 + b'"} 1\n',
            json.dumps({**HONEST, "metrics": [{"task": "a", "x": [[]] * 30_000}]}).encode(),
        ]
    )  # fmt: skip
    field = rng.choice(
        [b"", b"Content-Encoding: gzip\r\n", b"Transfer-Encoding: chunked\r\n", b"X: " + b"y" * 50_000 + b"\r\n"]
    )
    length = rng.choice([len(body), 10**15, -1])
    yield head + field + b"Content-Length: %d\r\n\r\n" % length
    yield body
    while rng.random() < 0.3:
        yield rng.choice([b"0" * 65536, b"X-Y: z\r\n" * 8000])


@contextmanager
def hostile_pods(host: str, rng: random.Random) -> Iterator[list[int]]:
    """A server that answers badly; how often it was asked."""
    asked = [0]

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked[0] += 1
        try:
            if rng.random() < 0.1:
                await asyncio.sleep(5)
            for part in answers(rng):
                writer.write(part)
                await asyncio.wait_for(writer.drain(), 5)
        except (OSError, TimeoutError):
            pass  # it has heard enough
        finally:
            writer.close()

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(connected, host, names.TRAINER_METRICS))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield asked
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.1))
        loop.close()


@contextmanager
def honest_pod(host: str) -> Iterator[list[int]]:
    """A trainer that is a round further each time it is asked."""
    asked = [0]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked[0] += 1
            self.send_response(200)
            try:
                self.end_headers()
                self.wfile.write(json.dumps({**HONEST, "round": asked[0]}).encode())
            except OSError:
                pass  # on a busy machine the operator may not have waited

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer((host, names.TRAINER_METRICS), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def memory(operator: Operator) -> float:
    """MiB that the process holds."""
    assert operator.process
    pages = int(Path(f"/proc/{operator.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def running(api: Api, pod: dict[str, Any], ip: str, **more: Any) -> None:
    container = {"name": pod["spec"]["containers"][0]["name"], "image": "i", "imageID": "", "ready": True, "restartCount": 0,
                 "state": {"running": {}}, **more}  # fmt: skip
    ready = [{"type": "Ready", "status": "True"}]
    status = {
        "phase": "Running",
        "podIP": ip,
        "podIPs": [{"ip": ip}],
        "conditions": ready,
        "containerStatuses": [container],
    }
    api.patch("pods", pod["metadata"]["name"], {"status": status}, "status")


def attack(api: Api, ip: str, rng: random.Random, number: int) -> None:
    """One hostile write; what the API server refuses is its bound."""
    pods, said = api.pods("trainer"), rng.choice(TEXTS)[:30_000]
    pod = rng.choice(pods) if pods else None
    match rng.randrange(5):
        case 0 if pod:
            ended = {"exitCode": rng.choice([0, 1, 75]), "message": said, "reason": said[:100]}
            running(api, pod, ip, restartCount=3, lastState={"terminated": ended})
        case 1 if pod:
            index = rng.choice(["9" * 5000, "-1", "\u0663"])
            api.patch("pods", pod["metadata"]["name"], {"metadata": {"annotations": {names.COMPLETION_INDEX: index}}})
        case 2 if pod:
            state = {"waiting": {"reason": rng.choice(["CrashLoopBackOff", "ErrImagePull", said]), "message": said}}
            running(api, pod, ip, state=state)
        case 3:
            labels = {"app.kubernetes.io/managed-by": names.MANAGER, names.ROLE: "trainer"}
            metadata = {"name": f"junk-{number % 20}", "labels": labels}
            if number >= 20:
                api.delete("configmaps", metadata["name"])
            deep = '{"f:x":' * 9000 + "{}" + "}" * 9000
            fields = {
                "manager": "m",
                "operation": "Update",
                "apiVersion": "v1",
                "fieldsType": "FieldsV1",
                "fieldsV1": "?",
            }
            body = {"metadata": {**metadata, "managedFields": [fields]}, "data": {"x": "y" * rng.choice([10, 500_000])}}
            content = json.dumps(body).replace('"?"', deep)
            api.http.post(api.path("configmaps"), content=content, headers={"Content-Type": "application/json"})
        case _:
            name = f"hostile-{rng.randrange(4)}"
            progress = {"round": rng.randrange(100), "metrics": [{"name": said[:200], "value": "x"}]}
            api.patch("opddistillations", name, {"status": {"progress": progress, "phase": said[:60]}}, "status")


@pytest.mark.timeout(SECONDS + 500)
def test_the_honest_one_is_served_all_the_while(api: Api, second_api: Api, start: Callable[..., Operator]) -> None:
    rng = random.Random(7)
    network = f"127.{20 + os.getpid() % 200}.{os.getpid() // 200 % 250}"
    hostile_ip, honest_ip = f"{network}.1", f"{network}.2"
    hurry = "from opd_operator import peers\npeers._PERIOD = 0.5\n"
    options = (f"--watch-namespace={second_api.namespace}", "--no-leader-election", "--resync-seconds=20")
    with hostile_pods(hostile_ip, rng) as attacks, honest_pod(honest_ip) as asked:
        operator = start(api, *options, prelude=hurry).ready()
        assert operator.process
        for number in range(4):
            second_api.submit(f"hostile-{number}")
        api.submit()
        for each, count in ((second_api, 4), (api, 1)):
            each.run("teachers", count)
            pods = wait_for(lambda each=each, count=count: len(found := each.pods("trainer")) >= count and found)
            for pod in pods:
                running(each, pod, honest_ip if each is api else hostile_ip)
        wait_for(lambda: api.status().get("progress", {}).get("round"), "the first round")
        began, memories, rounds, gap, moved = time.monotonic(), [memory(operator)], set[int](), 0.0, time.monotonic()
        number = refused = 0
        while time.monotonic() - began < SECONDS or len(rounds) < 3:
            assert operator.process.poll() is None, operator.log.read_text()[-5000:]
            assert time.monotonic() - moved < 60, "the honest one is not served"
            try:
                attack(second_api, hostile_ip, rng, number)
            except RuntimeError:
                refused += 1
            number += 1
            if number % 10 == 0:
                round_ = api.status()["progress"]["round"]
                if round_ not in rounds:
                    gap, moved = max(gap, time.monotonic() - moved), time.monotonic()
                    rounds.add(round_)
                memories.append(memory(operator))
            time.sleep(0.02)
        page = operator.metrics()
        print(
            f"\n{time.monotonic() - began:.0f} s: {number} hostile writes ({refused} refused), {attacks[0]} hostile answers; "
            f"{asked[0]} honest answers, {len(rounds)} seen in the status, at most {gap:.1f} s apart; "
            f"memory {memories[0]:.0f} MiB, in the middle {memories[len(memories) // 2]:.0f}, at the end {memories[-1]:.0f}, "
            f"most {max(memories):.0f}"
        )
        assert f'name="tiny",namespace="{api.namespace}"' in page
        assert max(memories) < 400, "the chart's limit is 512Mi"
        assert attacks[0] > 0
        to_student_of(api)
    assert operator.process.poll() is None


def to_student_of(api: Api) -> None:
    """The honest one comes to its end."""
    to_student(api)
    api.run("endpoint")
    api.until("Ready", "True")
