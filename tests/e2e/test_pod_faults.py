"""Pods that are killed, evicted, starved, or never come up: told, survived or ended, and nothing leaks."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from devcluster import images, node

from .kit import Namespace, wait_until

pytestmark = pytest.mark.timeout(900)

# The ranks are the launcher's children.
KILL_RANK = (
    "import os, signal, pathlib\n"
    "for entry in pathlib.Path('/proc').glob('[0-9]*/cmdline'):\n"
    "    if b'opd_trainer.train' in entry.read_bytes() and entry.parent.name != str(os.getpid()):\n"
    "        os.kill(int(entry.parent.name), signal.SIGKILL)\n"
)


def restarted(namespace: Namespace, name: str, cause: str, count: int) -> None:
    """Wait for the next start, and that it goes on where the last one was."""
    wait_until(lambda: namespace.status(name).get(cause) == count, f"{count} {cause}")
    wait_until(lambda: "continuing after round" in namespace.log("trainer"), "the next start", 300)


def test_a_run_survives_its_pods(namespace: Namespace, operator: str, example: dict[str, Any]) -> None:
    """A teacher deleted, a rank killed, a pod evicted, the node cordoned: one training, to its end."""
    example["spec"]["training"].update(rounds=40, checkpoint={"everyRounds": 2, "keep": 2})
    example["spec"]["evaluation"].update(promptsPerTask=2, gate=[])
    example["spec"]["endpoint"]["enabled"] = False
    name = namespace.apply(example)
    wait_until(lambda: namespace.rounds(name) >= 3, "the first rounds", 300)

    (teacher,) = namespace.running("teachers")
    namespace.kubectl("delete", "pod", teacher, "--wait=false", "--grace-period=1")
    wait_until(lambda: namespace.running("teachers") not in ([], [teacher]), "another teacher")
    reached = namespace.rounds(name)
    wait_until(lambda: namespace.rounds(name) > reached + 1, "rounds with the new teacher", 180)
    assert namespace.status(name)["restarts"] == 0, "the trainer waited"

    (trainer,) = namespace.running("trainer")
    namespace.kubectl("exec", trainer, "--", "python", "-c", KILL_RANK)
    restarted(namespace, name, "restarts", 1)
    assert namespace.status(name)["lastFailure"]["pod"] == trainer

    (trainer,) = wait_until(lambda: namespace.running("trainer"), "the next trainer")
    (machine,) = namespace.kubectl("get", "nodes", "-o", "jsonpath={.items[*].metadata.name}").split()
    eviction = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": trainer, "namespace": namespace.name},
    }
    namespace.kubectl("cordon", machine)
    try:
        path = f"/api/v1/namespaces/{namespace.name}/pods/{trainer}/eviction"
        namespace.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(eviction))
        message = namespace.until(name, "Trained", "False", "Unschedulable")
        assert "unschedulable" in message
        assert namespace.status(name)["disruptions"] == 1
    finally:
        namespace.kubectl("uncordon", machine)
    restarted(namespace, name, "disruptions", 1)
    namespace.until(name, "Trained", "True", seconds=600)
    assert namespace.status(name)["restarts"] == 1
    wait_until(lambda: not namespace.pods("teachers"), "the teachers to go")


def test_out_of_memory_is_told_and_ends_the_run(namespace: Namespace, operator: str, alone: dict[str, Any]) -> None:
    alone["spec"]["training"]["pod"] = {"resources": {"limits": {"memory": "400Mi"}}}
    alone["spec"]["runPolicy"] = {"backoffLimit": 0}
    name = namespace.apply(alone)
    namespace.until(name, "Failed", "True", "BackoffLimitExceeded")
    assert namespace.status(name)["lastFailure"]["reason"] == "OutOfMemory"
    assert not namespace.pods()


def test_a_user_error_ends_the_run_with_its_own_words(
    namespace: Namespace, operator: str, alone: dict[str, Any]
) -> None:
    alone["spec"]["teachers"][0]["prompts"]["uri"] = "pvc://tiny-world/prompts/none.jsonl"
    name = namespace.apply(alone)
    message = namespace.until(name, "Failed", "True", "UserError")
    assert "none.jsonl" in message
    assert namespace.status(name)["lastFailure"]["exitCode"] == 2
    assert not namespace.pods()


def test_a_wrong_image_is_mended_and_all_that_an_endpoint_may_have_comes_and_goes(
    namespace: Namespace, operator: str, alone: dict[str, Any]
) -> None:
    alone["spec"]["training"].update(rounds=1, pod={"image": "localhost:1/none:1"})
    alone["spec"]["evaluation"].update(promptsPerTask=1, gate=[])
    alone["spec"]["endpoint"] = {
        "replicas": 2,
        "autoscaling": {"minReplicas": 2, "maxReplicas": 3},
        "route": {"gateway": "web", "hostnames": ["images.example.com"]},
    }
    alone["spec"]["runPolicy"] = {"ttlSecondsAfterFinished": 30}
    name = namespace.apply(alone)
    assert "localhost:1/none:1" in namespace.until(name, "Trained", "False", "ImagePullFailed")
    namespace.edit(name, training={"pod": None})
    assert "no controller of a Gateway has answered" in namespace.until(name, "Serving", "False", "NotRouted")
    extras = {"poddisruptionbudget", "horizontalpodautoscaler", "httproute"}

    def kinds() -> set[str]:
        return {line.split("/")[0].split(".")[0] for line in namespace.children().splitlines()}

    assert extras <= kinds()
    children = namespace.children().splitlines()
    mended = [child for child in children if not child.startswith(("pod/", "job.", "configmap/"))]  # never changed
    for child in mended:
        namespace.kubectl("label", child, "app.kubernetes.io/name=changed", "--overwrite")

    def changed() -> list[str]:
        return [child for child in mended if "changed" in namespace.get(child)["metadata"]["labels"].values()]

    wait_until(lambda: not changed(), "labels that somebody changed to be put right")
    namespace.edit(name, endpoint={"replicas": 1, "autoscaling": None, "route": None})
    namespace.until(name, "Serving", "True")
    wait_until(lambda: not extras & kinds(), "what was taken out of the spec to go")
    assert "networkpolicy" in kinds()
    namespace.edit(name, endpoint={"suspend": True})  # what serves has no end
    wait_until(lambda: not namespace.kubectl("get", "opd", "-o", "name"), "its time to be over", 180)
    wait_until(lambda: not namespace.children(), "everything to go")


def test_what_no_node_has_is_told_and_freed_at_its_deadline(
    namespace: Namespace, operator: str, example: dict[str, Any]
) -> None:
    """The teachers run and wait; they do not wait for ever."""
    example["spec"]["training"]["pod"] = {"resources": {"requests": {"cpu": "64"}}}
    example["spec"]["runPolicy"] = {"stageDeadlines": {"trainerReady": 15}}
    name = namespace.apply(example)
    assert "Insufficient cpu" in namespace.until(name, "Trained", "False", "Unschedulable")
    assert namespace.pods("teachers")
    assert "Insufficient cpu" in namespace.until(name, "Failed", "True", "DeadlineExceeded")
    assert not namespace.pods()


def test_a_claim_that_is_not_there_is_named(namespace: Namespace, operator: str, alone: dict[str, Any]) -> None:
    alone["spec"]["student"]["output"]["uri"] = "pvc://forgotten/students"
    name = namespace.apply(alone)
    assert '"forgotten" not found' in namespace.until(name, "Trained", "False", "Unschedulable")


@pytest.fixture
def small(cluster: node.Node, tmp_path: Path) -> Path:
    """On the node, a file system of one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    options = f"size=1m,mode=0755,uid={images.USER},gid={images.USER}"
    cluster.run("mount", "-t", "tmpfs", "-o", options, "tmpfs", folder)
    return folder


def test_a_full_claim_ends_the_run_with_the_reason(
    cluster: node.Node, namespace: Namespace, operator: str, alone: dict[str, Any], small: Path
) -> None:
    cluster.make_claim("small", namespace.name, small)
    alone["spec"]["student"]["output"]["uri"] = "pvc://small/students"
    alone["spec"]["training"]["checkpoint"] = {"everyRounds": 1, "keep": 1}
    name = namespace.apply(alone)
    message = namespace.until(name, "Failed", "True", "Failed")
    assert "exit code 74" in message
    assert re.search(r"where \d\.\d MB of 1\.0 MB are free", message)


def test_only_the_trainer_reaches_the_teachers(namespace: Namespace, operator: str, example: dict[str, Any]) -> None:
    example["spec"]["training"]["pod"] = {"resources": {"requests": {"cpu": "64"}}}  # teachers alone
    name = namespace.apply(example)
    namespace.until(name, "TeachersReady", "True")
    host = f"{name}-teachers-0.{namespace.name}.svc.cluster.local."
    stranger = probe(host, {"app": "stranger"})
    friend = probe(host, {"opd.dev/distillation": name, "opd.dev/role": "trainer"})
    for pod in (stranger, friend):
        namespace.kubectl("create", "-f", "-", stdin=json.dumps(pod))
    for pod, phase in ((friend, "Succeeded"), (stranger, "Failed")):
        what = f"pod/{pod['metadata']['name']}"
        wait_until(lambda what=what: namespace.get(what)["status"]["phase"] in ("Succeeded", "Failed"), what)
        assert namespace.get(what)["status"]["phase"] == phase, namespace.kubectl("logs", what)


def probe(host: str, labels: dict[str, str]) -> dict[str, Any]:
    """A pod that ends well if it can connect to the teachers' port within some tries."""
    code = (
        "import socket, time\n"
        "for _ in range(8):\n"
        "    try:\n"
        f"        socket.create_connection(({host!r}, 8001), 2).close()\n"
        "        raise SystemExit(0)\n"
        "    except OSError as error:\n"
        "        print(error)\n"
        "        time.sleep(1)\n"
        "raise SystemExit(1)\n"
    )
    container = {
        "name": "probe",
        "image": "diffusion-opd/operator:0.1.0",
        "command": ["python", "-c", code],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    security = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    spec = {"restartPolicy": "Never", "securityContext": security, "containers": [container]}
    meta = {"name": f"probe-{labels.get('app', 'trainer')}", "labels": labels}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}
