"""An API server that restarts, an etcd that is slow or full, a watch that falls silent: the operator waits and goes on."""

import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from devcluster.control_plane import ControlPlane, control_plane
from opd_core.exit_codes import ExitCode

from tests.operator.live import CRD, STUDENT, Api, Operator, quiet, wait_for
from tests.operator.proxy import Proxy

Start = Callable[..., Operator]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane that may be broken; its etcd holds little."""
    with control_plane(etcd=["--quota-backend-bytes=16777216"], crds=[CRD]) as running:
        yield running


@pytest.fixture
def own_api(own: ControlPlane) -> Iterator[Api]:
    namespace = f"broken-{time.monotonic_ns()}"
    own.kubectl("create", "namespace", namespace)
    yield Api(own, namespace)
    own.kubectl("delete", "namespace", namespace, "--wait=false")


def answers(cluster: ControlPlane) -> bool:
    try:
        return cluster.kubectl("get", "--raw", "/readyz", "--request-timeout=3s") == "ok"
    except RuntimeError:
        return False


def test_a_restarted_api_server_is_waited_for_by_the_same_process(
    own: ControlPlane, own_api: Api, start: Start
) -> None:
    """Without a lease: that runs out after ten seconds, and a busy machine needs longer to start an API server."""
    operator = start(own_api, "--no-leader-election").ready()
    own_api.submit()
    own_api.run("teachers")
    own.daemons.stop("apiserver", signal.SIGKILL)
    time.sleep(3)
    own.daemons.start("apiserver")
    wait_for(lambda: answers(own), "the API server", 60)
    own_api.until("Trained", "False", "Starting", seconds=60)
    own_api.run("trainer")
    own_api.until("Trained", "False", "Running")
    assert operator.process
    assert operator.process.poll() is None, operator.log.read_text()


def test_a_slow_etcd_delays_and_changes_nothing(own: ControlPlane, own_api: Api, start: Start) -> None:
    start(own_api, "--no-leader-election").ready()
    own_api.submit()
    own_api.run("teachers")
    etcd = own.daemons.pid("etcd")
    stopped = threading.Event()

    def stutter() -> None:
        while not stopped.wait(0.4):
            os.kill(etcd, signal.SIGSTOP)
            time.sleep(0.6)
            os.kill(etcd, signal.SIGCONT)

    thread = threading.Thread(target=stutter)
    thread.start()
    try:
        own_api.run("trainer")
        own_api.until("Trained", "False", "Running", seconds=60)
    finally:
        stopped.set()
        thread.join()
    to_student_from_running(own_api)
    own_api.run("endpoint")
    own_api.until("Ready", "True")
    assert own_api.status()["restarts"] == own_api.status()["disruptions"] == 0
    quiet(own_api)


def test_a_full_etcd_stops_writes_until_there_is_room(own: ControlPlane, own_api: Api, start: Start) -> None:
    start(own_api, "--no-leader-election").ready()
    own_api.submit()
    own_api.run("teachers")
    own_api.until("Trained", "False", "Starting")
    fill_etcd(own_api)
    with pytest.raises(RuntimeError, match="database space exceeded"):
        own_api.call("POST", own_api.path("configmaps"), {"metadata": {"name": "one-more"}})
    before = own_api.status()
    time.sleep(4)  # it tries and is refused
    assert own_api.status() == before
    empty_etcd(own, own_api)
    own_api.run("trainer")
    own_api.until("Trained", "False", "Running", seconds=90)
    assert own_api.condition("Failed")[0] == "False"


def to_student_from_running(api: Api) -> None:
    api.end("trainer", digest=STUDENT, round=500)
    api.until("Trained", "True")
    api.end("evaluator", digest=STUDENT, gatePassed=True, scores=[])
    api.until("Evaluated", "True")


def fill_etcd(api: Api) -> None:
    for number in range(64):
        body = {"metadata": {"name": f"filler-{number}", "labels": {"filler": "yes"}}, "data": {"x": "y" * 900_000}}
        try:
            api.call("POST", api.path("configmaps"), body)
        except RuntimeError as error:
            assert "database space exceeded" in str(error)
            return
    raise AssertionError("etcd has no quota")


def empty_etcd(cluster: ControlPlane, api: Api) -> None:
    """As the on-call does it: delete, compact, defragment, disarm."""
    command = cluster.daemons._commands["etcd"]
    url = command[command.index("--advertise-client-urls") + 1]

    def ask(path: str, body: object) -> dict[str, Any]:
        request = urllib.request.Request(f"{url}/v3/{path}", json.dumps(body).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return dict(json.load(answer))

    api.call("DELETE", api.path("configmaps") + "?labelSelector=filler%3Dyes")  # etcd lets go even when it is full
    revision = ask("maintenance/status", {})["header"]["revision"]
    ask("kv/compaction", {"revision": revision, "physical": True})
    ask("maintenance/defragment", {})
    for alarm in ask("maintenance/alarm", {"action": "GET"}).get("alarms", []):
        ask("maintenance/alarm", {"action": "DEACTIVATE", **alarm})


def test_a_watch_that_falls_silent_is_noticed_and_repaired(api: Api, start: Start, tmp_path: Path) -> None:
    proxy = Proxy(api.cluster, tmp_path)
    try:
        operator = start(api, "--no-leader-election", "--resync-seconds=5")
        operator.kill()
        operator.kubeconfig = proxy.kubeconfig
        operator.start().ready()
        api.submit("first")
        wait_for(lambda: api.status("first"), "the first object")
        proxy.mute_open_connections()
        api.submit("second")
        assert operator.process
        wait_for(lambda: operator.process and operator.process.poll() is not None, "the end of a blind operator", 30)
        assert operator.process.returncode == 75
        assert "brings nothing" in operator.log.read_text()
        operator.start().ready()
        wait_for(lambda: api.status("second"), "the second object")
    finally:
        proxy.close()


ROUTES = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "httproutes.gateway.networking.k8s.io", "annotations": {"api-approved.kubernetes.io": "unapproved, a test"}},
    "spec": {
        "group": "gateway.networking.k8s.io",
        "names": {"kind": "HTTPRoute", "plural": "httproutes", "singular": "httproute", "listKind": "HTTPRouteList"},
        "scope": "Namespaced",
        "versions": [
            {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": {"type": "object"}}}
        ],
    },
}  # fmt: skip


def test_a_gateway_api_that_is_installed_later_is_seen(own_api: Api, start: Start) -> None:
    """The process starts anew, as after a dead watch."""
    operator = start(own_api, "--no-leader-election", "--resync-seconds=1").ready()
    own_api.call("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", ROUTES)
    assert operator.process
    assert operator.process.wait(30) == ExitCode.UNAVAILABLE
    assert "HTTPRoute is there now; starting anew" in operator.log.read_text()
    operator.start().ready()
    time.sleep(3)
    assert operator.process.poll() is None
