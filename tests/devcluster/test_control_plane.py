"""The control plane that other tests stand on: real, strict, and gone with whoever started it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from devcluster.control_plane import ControlPlane
from devcluster.control_plane import control_plane as run_control_plane
from devcluster.node import Node

STARTER = """
import time
from devcluster.control_plane import control_plane
with control_plane() as running:
    print(*(running.daemons.pid(name) for name in ("etcd", "apiserver", "controller-manager")), flush=True)
    time.sleep(60)
"""


def test_controllers_work_and_pods_must_be_restricted(control_plane: ControlPlane) -> None:
    control_plane.kubectl("create", "namespace", "strict")
    control_plane.kubectl("create", "-n", "strict", "job", "plain", "--image=any")
    deadline = time.monotonic() + 20
    events = ""
    while "FailedCreate" not in events and time.monotonic() < deadline:
        events = control_plane.kubectl("get", "events", "-n", "strict")
    assert 'violates PodSecurity "restricted:latest"' in events


def test_the_audit_log_tells_who_did_what(control_plane: ControlPlane) -> None:
    control_plane.kubectl("create", "namespace", "audited")
    lines = [json.loads(line) for line in control_plane.audit_log.read_text().splitlines()]
    found = [line for line in lines if line.get("objectRef", {}).get("name") == "audited" and line["verb"] == "create"]
    assert [line["user"]["username"] for line in found] == ["admin"]


def test_a_refused_request_raises_what_the_server_said(control_plane: ControlPlane) -> None:
    with pytest.raises(RuntimeError, match='namespaces "absent" not found'):
        control_plane.kubectl("get", "namespace", "absent")


def test_the_claims_of_the_first_distillation_find_volumes(
    control_plane: ControlPlane, repository: Path, tmp_path: Path
) -> None:
    """As after `make cluster-up`: claims of the default StorageClass, which the page does not name."""
    node = Node(control_plane.binaries, control_plane.kubeconfig, control_plane.audit_log, "any", tmp_path)
    node.make_default_volumes()
    try:
        node.kubectl("create", "namespace", "claims")
        objects = [*yaml.safe_load_all((repository / "examples" / "tiny" / "claims.yaml").read_text())]
        claims = [each for each in objects if each["kind"] == "PersistentVolumeClaim"]
        node.kubectl("apply", "-n", "claims", "-f", "-", stdin=yaml.safe_dump_all(claims))
        for claim in claims:
            name = f"pvc/{claim['metadata']['name']}"
            node.kubectl("wait", name, "-n", "claims", "--for=jsonpath={.status.phase}=Bound", "--timeout=60s")
    finally:
        node.kubectl("delete", "namespace", "claims", "--wait=false")
        node.kubectl("delete", "storageclass", "folders")


def test_a_second_one_runs_beside_it_and_restarts(control_plane: ControlPlane) -> None:
    with run_control_plane() as other:
        other.kubectl("create", "namespace", "here")
        other.daemons.stop("apiserver")
        other.daemons.start("apiserver")
        deadline = time.monotonic() + 60
        while not _has(other, "here") and time.monotonic() < deadline:
            time.sleep(0.2)
        assert _has(other, "here")
        assert not _has(control_plane, "here")
    assert not other.kubeconfig.exists()


def test_nothing_outlives_a_killed_starter(repository: Path) -> None:
    tools = {"PYTHONPATH": str(repository / "tools")}
    with subprocess.Popen(
        [sys.executable, "-c", STARTER], env={**os.environ, **tools}, stdout=subprocess.PIPE, text=True
    ) as starter:
        assert starter.stdout is not None
        pids = [int(pid) for pid in starter.stdout.readline().split()]
        assert len(pids) == 3
        starter.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in pids)


def _has(cluster: ControlPlane, namespace: str) -> bool:
    try:
        cluster.kubectl("get", "namespace", namespace)
    except RuntimeError:
        return False
    return True


def _alive(pid: int) -> bool:
    """Whether a process runs; one that ended but was not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
