"""Faults injected into a real API server, its etcd, its clients and its objects: each ends in the right state."""

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

from tests.operator.conftest import install
from tests.operator.live import STUDENT, Api, Operator, quiet, to_student, wait_for
from tests.operator.proxy import Proxy

Start = Callable[..., Operator]


# ---------------------------------------------------------------------------------------------------- the API server


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane that may be broken; its etcd holds little."""
    with control_plane(etcd=["--quota-backend-bytes=16777216"]) as running:
        install(running)
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
    operator = start(own_api, f"--lease-namespace={own_api.namespace}").ready()
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


# ---------------------------------------------------------------------------------------------------- the connection


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
        wait_for(lambda: api.status("second"), "the listing that finds it", 30)
        assert operator.process
        wait_for(lambda: operator.process and operator.process.poll() is not None, "the end of a blind operator", 40)
        assert operator.process.returncode == 75
        assert "brings nothing" in operator.log.read_text()
    finally:
        proxy.close()


# ---------------------------------------------------------------------------------------------------- the clock

AHEAD = "import time\nreal = time.time\ntime.time = lambda: real() + 7200\n"


def test_an_operator_with_a_wrong_clock_ends_no_run(api: Api, start: Start) -> None:
    """Two hours ahead every deadline would have passed."""
    first = start(api, "--no-leader-election").ready()
    api.submit()
    api.run("teachers")
    api.until("Trained", "False", "Starting")
    first.stop()
    start(api, "--no-leader-election", prelude=AHEAD).ready()
    api.run("trainer")
    api.until("Trained", "False", "Running")
    assert api.condition("Failed") == ("False", "NotFailed")
    times = api.status()["stageTimes"]["TrainerReady"]
    assert times["completionTime"] < time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 60))


# ---------------------------------------------------------------------------------------------------- other clients


def test_another_manager_of_the_same_field_does_not_make_it_hot(api: Api, operator: Operator) -> None:
    api.submit()
    wait_for(lambda: api.ours("deployments", "teachers"))
    end = time.monotonic() + 12
    fought = 0
    while time.monotonic() < end:
        body = {"spec": {"replicas": 3}}
        path = api.path("deployments", "tiny-teachers-0") + "?fieldManager=somebody"
        api.call("PATCH", path, body, "application/merge-patch+json")
        fought += 1
        time.sleep(0.05)
    applied = [name for verb, resource, name in api.writes() if (verb, resource) == ("patch", "deployments")]
    assert fought > 100
    assert len(applied) < 15
    wait_for(lambda: api.ours("deployments", "teachers")[0]["spec"]["replicas"] == 1, "the last word", 70)


def test_an_admission_webhook_that_is_not_there_is_told_and_waited_for(api: Api, operator: Operator) -> None:
    hook = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": f"absent-{api.namespace}"},
        "webhooks": [
            {
                "name": "absent.example.com",
                "clientConfig": {"service": {"namespace": "nowhere", "name": "absent", "path": "/"}},
                "rules": [
                    {
                        "apiGroups": ["apps"],
                        "apiVersions": ["v1"],
                        "operations": ["CREATE"],
                        "resources": ["deployments"],
                    }
                ],
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": api.namespace}},
                "failurePolicy": "Fail",
                "sideEffects": "None",
                "admissionReviewVersions": ["v1"],
                "timeoutSeconds": 1,
            }
        ],
    }
    path = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"
    api.call("POST", path, hook)
    try:
        time.sleep(1)
        api.submit()
        api.until("TeachersReady", "False", "Rejected")
        conditions = {c["type"]: c["message"] for c in api.status()["conditions"]}
        assert "absent.example.com" in conditions["TeachersReady"]
    finally:
        api.call("DELETE", f"{path}/absent-{api.namespace}")
    wait_for(lambda: api.ours("deployments", "teachers"), "the teachers", 60)
    api.until("TeachersReady", "False", "Starting")


def test_a_deletion_that_hangs_is_not_called_failed(api: Api, operator: Operator) -> None:
    """kubeflow/trainer#3994: what is called failed holds no GPU."""
    api.submit(runPolicy={"stageDeadlines": {"teachersReady": 3}})
    wait_for(lambda: api.ours("deployments", "teachers"))
    api.patch("deployments", "tiny-teachers-0", {"metadata": {"finalizers": ["example.com/hold"]}})
    wait_for(lambda: "deletionTimestamp" in api.ours("deployments", "teachers")[0]["metadata"], "the deletion")
    time.sleep(2)
    assert api.condition("Failed") == ("False", "Stopping")
    api.patch("deployments", "tiny-teachers-0", {"metadata": {"finalizers": None}})

    def failed() -> bool:
        api.sweep()
        return api.condition("Failed") == ("True", "DeadlineExceeded")

    wait_for(failed)


# ---------------------------------------------------------------------------------------------------- deletion


def everything(api: Api) -> list[str]:
    kinds = ("deployments", "jobs", "pods", "services", "configmaps", "networkpolicies")
    found = [item for kind in kinds for item in api.find(kind, **{"app.kubernetes.io%2Fmanaged-by": "opd-operator"})]
    return [f"{item['metadata']['name']}" for item in found]


def gone(api: Api) -> bool:
    api.sweep()
    return not everything(api) and not api.call("GET", api.path("opddistillations"))["items"]


def at_teachers(api: Api) -> None:
    wait_for(lambda: api.pods("teachers"))


def at_training(api: Api) -> None:
    api.run("teachers")
    api.run("trainer")
    api.until("Trained", "False", "Running")


def at_evaluation(api: Api) -> None:
    at_training(api)
    api.end("trainer", digest=STUDENT)
    wait_for(lambda: api.pods("evaluator"))


def at_rollout(api: Api) -> None:
    to_student(api)
    wait_for(lambda: api.pods("endpoint"))


def at_pause(api: Api) -> None:
    at_training(api)
    api.end("trainer", 1, "broken")
    api.until("Trained", "False", "Restarting")


@pytest.mark.parametrize("policy", ["Background", "Foreground"])
@pytest.mark.parametrize("stage", [at_teachers, at_training, at_pause, at_evaluation, at_rollout])
def test_deleted_in_any_stage_nothing_is_left(
    stage: Callable[[Api], None], policy: str, api: Api, operator: Operator
) -> None:
    api.submit()
    stage(api)
    api.delete("opddistillations", "tiny", propagationPolicy=policy)
    wait_for(lambda: gone(api), "everything to go", 60)
    time.sleep(2)
    assert everything(api) == [], "made again after its end"


def test_a_namespace_that_goes_takes_everything_and_is_left_in_peace(api: Api, operator: Operator) -> None:
    api.submit()
    at_training(api)
    api.cluster.kubectl("delete", "namespace", api.namespace, "--wait=false")

    def over() -> bool:
        api.sweep()
        # The controller looks again after half the longest grace period of a pod (5 minutes here), or 5 s after a change.
        touched = {"metadata": {"annotations": {"test/touched": str(time.monotonic())}}}
        try:
            api.call("PATCH", f"/api/v1/namespaces/{api.namespace}", touched, "application/merge-patch+json")
        except RuntimeError as error:
            if "not found" not in str(error):
                raise
            return True
        return False

    wait_for(over, "the end of the namespace", 60)
    assert "Traceback" not in operator.log.read_text()


def test_a_finished_object_removes_itself(api: Api, operator: Operator) -> None:
    api.submit(runPolicy={"ttlSecondsAfterFinished": 3})
    to_student(api)
    api.run("endpoint")
    wait_for(lambda: gone(api), "its end", 40)


# ---------------------------------------------------------------------------------------------------- many, and later


def test_two_hundred_objects_at_once(api: Api, operator: Operator) -> None:
    for number in range(200):
        api.submit(f"many-{number}")
    began = time.monotonic()
    wait_for(lambda: len(api.ours("deployments", "teachers")) == 200, "200 Deployments", 60)

    def starting() -> bool:
        items = api.call("GET", api.path("opddistillations"))["items"]
        return all(item.get("status", {}).get("phase") == "Starting" for item in items)

    wait_for(starting, "their status", 60)
    print(f"200 objects in {time.monotonic() - began:.1f} s")
    quiet(api)


def test_an_upgraded_operator_rewrites_nothing(api: Api, start: Start) -> None:
    """A new release brings new default images; what runs keeps what it began with."""
    first = start(api, "--no-leader-election").ready()
    api.submit("served")
    api.submit("training", training__seed=7)
    for name in ("served", "training"):
        wait_for(lambda name=name: api.status(name))
    api.run("teachers", 2)
    api.run("trainer", 2)
    api.end("trainer", digest=STUDENT)
    wait_for(lambda: len(api.pods("evaluator")) == 2, "two evaluators")
    api.end("evaluator", digest=STUDENT, gatePassed=True, scores=[])
    for name in ("served", "training"):
        api.until("Evaluated", "True", name=name)
    api.run("endpoint", 2)
    for name in ("served", "training"):
        api.until("Ready", "True", name=name)
    api.edit("training", training={"seed": 8})
    api.run("teachers")
    quiet(api)
    first.stop()
    before = api.writes()
    images = [f"--{role}-image=diffusion-opd/{role}:99" for role in ("trainer", "teacher", "endpoint")]
    start(api, "--no-leader-election", *images).ready()
    time.sleep(4)
    assert api.writes() == before


def test_the_lease_is_given_back_and_the_next_one_takes_over_at_once(api: Api, start: Start) -> None:
    lease = f"--lease-namespace={api.namespace}"
    first = start(api, lease).ready()
    wait_for(lambda: "opd_leader 1.0" in first.metrics())
    second = start(api, lease).ready()
    began = time.monotonic()
    assert first.stop(signal.SIGTERM) == 0
    wait_for(lambda: "opd_leader 1.0" in second.metrics(), "the second one", 10)
    assert time.monotonic() - began < 8
