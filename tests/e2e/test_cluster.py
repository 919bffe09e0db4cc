"""The development cluster itself: it heals like a node, and however it ends, nothing of it stays on the machine."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from devcluster import node

from .conftest import Namespace

STARTER = """
import sys, time
from devcluster import node
node.up(sys.argv[1], die_with_me=True)
print("up", flush=True)
time.sleep(300)
"""


def test_a_killed_api_server_comes_back(cluster: node.Node) -> None:
    cluster.signal("apiserver", signal.SIGKILL)
    wait_until(lambda: not answers(cluster))
    wait_until(lambda: answers(cluster))


def test_a_stopped_etcd_stalls_writes_until_it_goes_on(cluster: node.Node) -> None:
    cluster.signal("etcd", signal.SIGSTOP)
    try:
        with pytest.raises(RuntimeError, match="timed out|deadline exceeded|Timeout"):
            cluster.kubectl("create", "namespace", "stalled", "--request-timeout=3s")
    finally:
        cluster.signal("etcd", signal.SIGCONT)
    wait_until(lambda: answers(cluster))


def test_a_killed_starter_leaves_nothing_on_the_machine(cluster: node.Node, repository: Path) -> None:
    """Beside the running cluster: two of them do not meet."""
    name = "doomed"
    before = links()
    env = {**os.environ, "PYTHONPATH": str(repository / "tools")}
    try:
        with subprocess.Popen(
            [sys.executable, "-c", STARTER, name], env=env, stdout=subprocess.PIPE, text=True
        ) as starter:
            assert starter.stdout is not None
            assert starter.stdout.readline() == "up\n"
            assert len(links() - before) == 1
            inside = node.find(name)
            starter.send_signal(signal.SIGKILL)
        wait_until(lambda: not processes(inside.folder))
        wait_until(lambda: links() == before)
        assert str(inside.folder) not in Path("/proc/self/mountinfo").read_text()
        assert answers(cluster)
        node.down(name)
        assert not inside.folder.exists()
        assert not list(node.CGROUPS.glob(f"**/opd-{name}"))
    finally:
        node.down(name, images=True)


def test_network_policies_are_enforced(namespace: Namespace) -> None:
    for name, restricted in (("closed", True), ("open", False)):
        namespace.kubectl("create", "-f", "-", stdin=json.dumps(server(name)))
        namespace.kubectl("expose", "pod", name, "--port=8000")
        if restricted:
            spec = {"podSelector": {"matchLabels": {"app": name}}, "policyTypes": ["Ingress"]}
            policy = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": name}}
            namespace.kubectl("create", "-f", "-", stdin=json.dumps({**policy, "spec": spec}))
    namespace.kubectl("wait", "pod", "--all", "--for=condition=Ready", "--timeout=60s")
    # Names and Services work some seconds after they were made; until then nobody reaches anybody.
    wait_until(lambda: connects(namespace, "open", "open"))
    wait_until(lambda: connects(namespace, "closed", "open"))
    wait_until(lambda: not connects(namespace, "open", "closed"))


def server(name: str) -> dict[str, object]:
    """A pod that listens on port 8000."""
    container = {
        "name": "server",
        "image": "diffusion-opd/operator:0.1.0",
        "command": ["python", "-m", "http.server", "8000", "--directory", "/opt/opd"],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "readinessProbe": {"tcpSocket": {"port": 8000}, "periodSeconds": 1},
    }
    spec = {"securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}}
    meta = {"name": name, "labels": {"app": name}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": {**spec, "containers": [container]}}


def connects(namespace: Namespace, source: str, target: str) -> bool:
    """Whether pod `source` reaches Service `target`."""
    # Looked up with a trailing dot: a pod finds its own name in its hosts file.
    host = f"{target}.{namespace.name}.svc.cluster.local."
    code = f"import socket; socket.create_connection(({host!r}, 8000), 2)"
    try:
        namespace.kubectl("exec", source, "--", "python", "-c", code)
    except RuntimeError:
        return False
    return True


def answers(cluster: node.Node) -> bool:
    try:
        return cluster.kubectl("get", "--raw", "/readyz", "--request-timeout=3s") == "ok"
    except RuntimeError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert condition()


def links() -> set[str]:
    return {name for name in os.listdir("/sys/class/net") if name.startswith("opd")}


def processes(folder: Path) -> list[str]:
    """Command lines that name the cluster's folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = file.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder) in command:
            found.append(command)
    return found
