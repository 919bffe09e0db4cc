"""What the operator makes of many objects at once, against a bare writer of the very same requests.

A real etcd, API server and controller manager on this machine, fresh for each run. N objects are created by another
process, and everything is measured on the API server's own clock, from its audit log:

    settled          first object created -> last write of the operator before it falls silent
    bare             the same for a writer that only repeats what the operator sends for one object: no watch, no
                     decision; same client, same concurrency
    pod to status    pod status accepted -> status of its distillation written, pods patched at a steady rate
    writes           of the operator while nothing happens, and after it is started again: there must be none

`--no-controllers`: without the controller manager, which otherwise makes a Deployment's pods on the same cores meanwhile.
Not called operator.py: a script's folder comes first on the path, and the standard library has a module of that name.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from devcluster.control_plane import ControlPlane, control_plane
from kubernetes.aio import config
from kubernetes.aio.client import ApiClient, Configuration
from opd_operator import names
from opd_operator.cache import Cache
from opd_operator.kube import DISTILLATION, POD, Kube, Resource
from opd_operator.metrics import Metrics
from opd_operator.peers import Peers
from opd_operator.queue import WorkQueue
from opd_operator.reconcile import Reconciler
from opd_operator.settings import Settings
from opd_operator.watch import Watches, fill, watched

ROOT = Path(__file__).resolve().parents[1]
CRD = ROOT / "crds" / "opd.dev_opddistillations.yaml"
EXAMPLE = yaml.safe_load((ROOT / "examples" / "tiny" / "distill.yaml").read_text())
NAMESPACE, SAMPLE, WORKERS = "bench", "sample", 8
SETTINGS = Settings(images={names.TEACHERS: "teacher:1", names.TRAINER: "trainer:1", names.ENDPOINT: "endpoint:1"})
QUIET = 3.0  # seconds without a write: it has settled


# ---------------------------------------------------------------------------------------------------- the audit log


@dataclass(frozen=True)
class Write:
    agent: str
    verb: str
    resource: str  # with its subresource
    name: str
    code: int
    began: float
    ended: float


class Audit:
    """Writes into the benchmark's namespace, in the order in which they ended; read as the file grows."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset, self.writes = path, 0, []  # type: ignore[var-annotated]

    def read(self) -> list[Write]:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            whole, _, _ = file.read().rpartition(b"\n")
        self.offset += len(whole) + 1 if whole else 0
        for line in whole.splitlines():
            entry = json.loads(line)
            ref = entry.get("objectRef", {})
            if ref.get("namespace") == NAMESPACE and entry["verb"] not in ("get", "list", "watch"):
                self.writes.append(
                    Write(
                        entry.get("userAgent", ""), entry["verb"],
                        "/".join(part for part in (ref["resource"], ref.get("subresource")) if part),
                        ref.get("name", ""), entry["responseStatus"].get("code", 0),
                        _seconds(entry["requestReceivedTimestamp"]), _seconds(entry["stageTimestamp"]),
                    )
                )  # fmt: skip
        return self.writes

    def of(self, agent: str) -> list[Write]:
        return [write for write in self.read() if write.agent.startswith(agent)]


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


# ---------------------------------------------------------------------------------------------------- the writers


@asynccontextmanager
async def client(agent: str) -> Any:
    configuration = Configuration()
    await config.load_kube_config(config_file=os.environ["KUBECONFIG"], client_configuration=configuration)
    configuration.connection_pool_maxsize = 2 * WORKERS
    async with ApiClient(configuration) as found:
        found.user_agent = agent
        yield Kube(found)


def distillation(name: str) -> dict[str, Any]:
    return {**EXAMPLE, "metadata": {"name": name, "namespace": NAMESPACE}}


def creator(count: int, created: "multiprocessing.Queue[tuple[str, str, str]]") -> None:
    """Create the objects; say each one's name, uid and version."""

    async def create() -> None:
        async with client("creator") as kube:
            waiting = iter(range(count))

            async def worker() -> None:
                for number in waiting:
                    obj = distillation(f"object-{number:05}")
                    made = await kube._request("POST", DISTILLATION, DISTILLATION.path(NAMESPACE), {}, obj)
                    metadata = made["metadata"]
                    created.put((metadata["name"], metadata["uid"], metadata["resourceVersion"]))

            await asyncio.gather(*(worker() for _ in range(WORKERS)))

    asyncio.run(create())


@dataclass(frozen=True)
class Request:
    method: str
    resource: Resource
    path: str
    query: dict[str, str]
    body: str
    content_type: str


@dataclass
class Recorder(Kube):
    """Keeps what is sent."""

    sent: list[Request] = field(default_factory=list)

    async def _request(self, method: str, resource: Resource, path: str, query: Any, body: Any = None,
                       content_type: str = "application/json") -> dict[str, Any]:  # fmt: skip
        if method != "GET":
            self.sent.append(Request(method, resource, path, dict(query), json.dumps(body), content_type))
        return await super()._request(method, resource, path, query, body, content_type)


async def record() -> tuple[str, list[Request]]:
    """What the operator sends for one new object until it is content; with the object's uid."""
    async with client("recorder") as kube:
        recorder = Recorder(kube.client)
        await recorder._request("POST", DISTILLATION, DISTILLATION.path(NAMESPACE), {}, distillation(SAMPLE))
        recorder.sent.clear()
        cache, queue, before = Cache(), WorkQueue[tuple[str, str]](), -1
        await fill(recorder, cache, Watches(await watched(recorder), [NAMESPACE]))
        reconciler = Reconciler(recorder, cache, queue, Metrics(cache, queue), SETTINGS, Peers())
        while before != len(recorder.sent):
            before = len(recorder.sent)
            await reconciler.reconcile((NAMESPACE, SAMPLE))
        return str(cache.get((NAMESPACE, SAMPLE))["metadata"]["uid"]), recorder.sent


async def bare(count: int, sample: str, requests: list[Request], created: Any) -> None:
    """Send `requests` for each object that is created, in their order."""
    todo: asyncio.Queue[tuple[str, str, str]] = asyncio.Queue()

    async def worker(kube: Kube) -> None:
        while True:
            name, uid, version = await todo.get()
            for request in requests:
                path, text = request.path.replace(SAMPLE, name), request.body.replace(SAMPLE, name).replace(sample, uid)
                body = json.loads(text)
                if "resourceVersion" in body["metadata"]:
                    body["metadata"]["resourceVersion"] = version
                answer = await kube._request(
                    request.method, request.resource, path, request.query, body, request.content_type
                )
                if request.resource is DISTILLATION:
                    version = answer["metadata"]["resourceVersion"]
            todo.task_done()

    async with client("bare") as kube:
        workers = [asyncio.create_task(worker(kube)) for _ in range(WORKERS)]
        loop = asyncio.get_running_loop()
        for _ in range(count):
            todo.put_nowait(await loop.run_in_executor(None, created.get))
        done = asyncio.create_task(todo.join())
        await asyncio.wait([done, *workers], return_when=asyncio.FIRST_COMPLETED)
        for task in workers:
            if task.done():
                task.result()
            task.cancel()


@contextmanager
def operator(plane: ControlPlane, log: Path) -> Iterator[int]:
    """The process id of an operator that is ready."""
    ports = [_free_port(), _free_port()]
    command = [
        sys.executable, "-m", "opd_operator", "--device=cpu", f"--watch-namespace={NAMESPACE}", "--no-leader-election",
        f"--metrics-port={ports[0]}", f"--probe-port={ports[1]}", f"--workers={WORKERS}",
    ]  # fmt: skip
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env={**os.environ, "KUBECONFIG": str(plane.kubeconfig)}, stdout=output, stderr=output
        )
    try:
        while not _ready(ports[1]):
            if process.poll() is not None:
                raise SystemExit(f"the operator ended:\n{log.read_text()[-2000:]}")
            time.sleep(0.02)
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _peak_mib(pid: int) -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---------------------------------------------------------------------------------------------------- the runs


@dataclass(frozen=True)
class Run:
    seconds: float
    writes: Counter[tuple[str, str]]  # by verb and resource
    failed: int


@contextmanager
def cluster(controllers: bool) -> Iterator[ControlPlane]:
    with control_plane(crds=[CRD]) as plane:
        os.environ["KUBECONFIG"] = str(plane.kubeconfig)
        plane.kubectl("create", "namespace", NAMESPACE)
        if not controllers:
            plane.daemons.stop("controller-manager")
        yield plane


def settled(audit: Audit, agent: str, count: int) -> Run:
    """Wait until `agent` has made each object's Deployment and is silent."""
    while True:
        writes = audit.of(agent)
        made = {write.name for write in writes if write.resource == "deployments" and write.code < 300}
        if len(made) >= count and time.time() - writes[-1].ended > QUIET:
            break
        time.sleep(0.5)
    began = min(write.began for write in audit.of("creator"))
    kinds = Counter((write.verb, write.resource) for write in writes)
    return Run(max(write.ended for write in writes) - began, kinds, sum(write.code >= 300 for write in writes))


def run_bare(count: int, controllers: bool) -> Run:
    with cluster(controllers) as plane:
        sample, requests = asyncio.run(record())
        with started(count) as created:
            asyncio.run(bare(count, sample, requests, created))
        return settled(Audit(plane.audit_log), "bare", count)


@contextmanager
def started(count: int) -> Iterator[Any]:
    """The creator's process at work; what it yields says what was made."""
    context = multiprocessing.get_context("spawn")
    created = context.Queue()
    process = context.Process(target=creator, args=(count, created))
    process.start()
    try:
        yield created
    finally:
        created.cancel_join_thread()
        process.terminate()
        process.join()


def run_operator(count: int, controllers: bool, options: argparse.Namespace, report: dict[str, str]) -> Run:
    folder = tempfile.TemporaryDirectory()
    with folder, cluster(controllers) as plane:
        log, audit = Path(folder.name) / "operator.log", Audit(plane.audit_log)
        with operator(plane, log) as pid:
            empty = _peak_mib(pid)
            with started(count) as created:
                for _ in range(count):
                    created.get()
                run = settled(audit, names.MANAGER, count)
            report["peak memory"] = f"{_peak_mib(pid):.0f} MiB, {empty:.0f} MiB of it without an object"
            report["CPU"] = f"{1000 * _cpu_seconds(pid) / count:.1f} ms per object"
            if controllers:
                pods = wait_for_pods(plane, count)
                settled(audit, names.MANAGER, count)
                report["pod to status"] = asyncio.run(latency(audit, pods[: options.pod_events], options.rate))
                report["peak memory with pods"] = f"{_peak_mib(pid):.0f} MiB"
            report["writes in silence"] = silence(audit, options.silence)
        began = time.monotonic()
        with operator(plane, log) as pid:
            report["ready again after"] = f"{time.monotonic() - began:.1f} s"
            report["writes after restart"] = silence(audit, options.silence)
            report["peak memory after restart"] = f"{_peak_mib(pid):.0f} MiB"
        defects = log.read_text().count("a defect of the operator")
        report["defects logged"] = str(defects)
    return run


def wait_for_pods(plane: ControlPlane, count: int) -> list[str]:
    """Names of the pods that the controller manager has made, once they are all there."""
    while True:
        found = plane.kubectl("get", "pods", "-n", NAMESPACE, "-o", "name").split()
        if len(found) >= count:
            return [name.removeprefix("pod/") for name in found]
        time.sleep(2)


async def latency(audit: Audit, pods: list[str], rate: float) -> str:
    """Say of each pod that it cannot be scheduled, and see when its distillation says so."""
    async with client("kubelet") as kube:

        async def say(pod: str) -> None:
            condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": f"no {pod}"}
            body = {"metadata": {}, "status": {"conditions": [condition]}}
            kind = "application/strategic-merge-patch+json"
            await kube._request("PATCH", POD, POD.path(NAMESPACE, pod, "status"), {}, body, kind)

        saying, began = [], time.monotonic()
        for number, pod in enumerate(pods):
            await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
            saying.append(asyncio.create_task(say(pod)))
        await asyncio.gather(*saying)
    await asyncio.sleep(QUIET)
    said = {write.name.rpartition("-teachers-")[0]: write.ended for write in audit.of("kubelet")}
    found: dict[str, float] = {}
    for write in audit.of(names.MANAGER):
        since = said.get(write.name)
        if since is not None and write.resource.endswith("/status") and write.ended > since and write.code < 300:
            found.setdefault(write.name, write.ended - since)
    times = statistics.quantiles(found.values(), n=100)
    return (
        f"p50 {1000 * times[49]:.0f} ms, p99 {1000 * times[98]:.0f} ms "
        f"({len(found)} of {len(said)} answered, {rate:g} pods/s)"
    )


def silence(audit: Audit, seconds: float) -> str:
    before = len(audit.of(names.MANAGER))
    time.sleep(seconds)
    new = audit.of(names.MANAGER)[before:]
    return f"{len(new)} in {seconds:g} s" + (f": {new[:3]}" if new else "")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--objects", type=int, default=1000)
    options.add_argument("--controllers", action=argparse.BooleanOptionalAction, default=True)
    options.add_argument("--pod-events", type=int, default=500)
    options.add_argument("--rate", type=float, default=50.0, help="pod events per second")
    options.add_argument("--silence", type=float, default=30.0, help="seconds in which nothing may be written")
    arguments = options.parse_args()
    count, report = arguments.objects, {}  # type: ignore[var-annotated]
    least = run_bare(count, arguments.controllers)
    run = run_operator(count, arguments.controllers, arguments, report)
    print(f"{count} objects, {WORKERS} at a time, {'with' if arguments.controllers else 'without'} controller manager")
    for name, one in (("bare", least), ("operator", run)):
        total = sum(one.writes.values())
        print(
            f"  {name:10} {one.seconds:7.1f} s  {total} writes, {total / one.seconds:.0f} a second"
            f"{f', {one.failed} refused' if one.failed else ''}"
        )
    print(f"  ratio      {least.seconds / run.seconds:7.2f}    of the bare writer's pace")
    for (verb, resource), number in sorted((run.writes - least.writes).items()):
        print(f"  more than the bare writer: {verb} {resource} {number}")
    for name, text in report.items():
        print(f"  {name:26} {text}")


if __name__ == "__main__":
    main()
