"""An operator that dies after every single write, against the real API server: it ends where an undisturbed one ends.

The paper world of test_crashes dies at each write of a life in turn; here one life survives them all.
"""

import asyncio
import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from kubernetes.aio import config
from kubernetes.aio.client import ApiClient, Configuration
from opd_operator import names
from opd_operator.cache import Cache
from opd_operator.kube import Kube, Resource
from opd_operator.metrics import Metrics
from opd_operator.peers import Peers
from opd_operator.queue import WorkQueue
from opd_operator.reconcile import Reconciler
from opd_operator.settings import Settings
from opd_operator.watch import Watches, fill, watched

from tests.operator.live import STUDENT, Api, Operator, quiet, wait_for

IMAGES = {
    names.TEACHERS: "diffusion-opd/teacher:0.1.0",
    names.TRAINER: "diffusion-opd/trainer:0.1.0",
    names.ENDPOINT: "diffusion-opd/endpoint:0.1.0",
}


class KilledError(BaseException):
    """Nothing in the operator catches this, as nothing catches a SIGKILL."""


class Mortal(Kube):
    deaths = 0

    async def _request(self, method: str, resource: Resource, *arguments: Any, **options: Any) -> dict[str, Any]:
        answer = await super()._request(method, resource, *arguments, **options)
        if method != "GET":
            Mortal.deaths += 1
            raise KilledError
        return answer


async def lives(api: Api, stop: threading.Event) -> None:
    """Start, list, decide, write once, die; again and again."""
    namespace, configuration = api.namespace, Configuration()
    await config.load_kube_config(config_file=str(api.cluster.kubeconfig), client_configuration=configuration)
    while not stop.is_set():
        async with ApiClient(configuration) as client:
            kube, cache, queue = Mortal(client), Cache(), WorkQueue[tuple[str, str]]()
            await fill(kube, cache, Watches(await watched(kube), [namespace]))
            settings = Settings(images=IMAGES, device="cpu", namespaces=(namespace,))
            reconciler = Reconciler(kube, cache, queue, Metrics(cache, queue), settings, Peers())
            try:
                for key in cache:
                    await reconciler.reconcile(key)
                await asyncio.sleep(0.2)  # nothing to do
            except KilledError:
                pass


@contextmanager
def mortal_operator(api: Api) -> Iterator[None]:
    stop, failure = threading.Event(), []

    def play() -> None:
        try:
            asyncio.run(lives(api, stop))
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=play)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert failure == []


def life(api: Api) -> None:
    """A failure on the way, a student in service, a suspension, and the way back."""
    api.submit(endpoint__replicas=2)
    api.run("teachers")
    api.run("trainer")
    api.end("trainer", 1, "broken")
    wait_for(lambda: api.status().get("restarts") == 1)
    api.run("trainer")
    api.end("trainer", digest=STUDENT)
    api.until("Trained", "True")
    api.end("evaluator", digest=STUDENT, gatePassed=True, scores=[])
    api.until("Evaluated", "True")
    api.run("endpoint", 2)
    api.until("Ready", "True")
    api.edit(suspend=True, endpoint={"suspend": True})

    def suspended() -> bool:
        api.sweep()
        return api.condition("Suspended")[0] == "True" and api.condition("Serving")[1] == "Suspended"

    wait_for(suspended)
    api.edit(suspend=False, endpoint={"suspend": False})
    api.run("endpoint", 2)
    api.until("Ready", "True")


def end(api: Api) -> tuple[Any, Any]:
    """Status and children, without what differs between two runs: times, uids, the namespace."""
    kinds = ("deployments", "jobs", "services", "configmaps", "networkpolicies")
    children = {
        f"{kind}/{item['metadata']['name']}": item.get("spec", item.get("data"))
        for kind in kinds
        for item in api.find(kind, **{"app.kubernetes.io%2Fmanaged-by": "opd-operator"})
    }
    text = json.dumps([api.status(), children], sort_keys=True)
    text = re.sub(r"\d{4}-\d\d-\d\dT[0-9:]+Z", "TIME", text).replace(api.namespace, "NAMESPACE")
    text = re.sub(r"(trainer-\d+-\d+-\d+)-\w{5}", r"\1", text)
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|\d+\.\d+\.\d+\.\d+", "UNIQUE", text)
    status, found = json.loads(text)
    return status, found


def test_dead_after_every_write_it_ends_as_undisturbed(
    api: Api, second_api: Api, start: Callable[..., Operator]
) -> None:
    start(api, "--no-leader-election").ready()
    with ThreadPoolExecutor(1) as undisturbed, mortal_operator(second_api):
        other = undisturbed.submit(life, api)
        life(second_api)
        quiet(second_api)
        other.result()
    assert Mortal.deaths > 40
    (status, children), (expected, expected_children) = end(second_api), end(api)
    assert status == expected
    assert children.keys() == expected_children.keys()
    for name, child in children.items():
        assert child == expected_children[name], name
