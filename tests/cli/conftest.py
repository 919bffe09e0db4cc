"""`opd` against a real API server; the tests say what the operator would."""

import io
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from devcluster.control_plane import ControlPlane
from opd_cli.cluster import Distillations
from opd_cli.main import main

from tests.cli.kubelet import Kubelet, kubelet
from tests.operator.live import Api

_numbers = itertools.count()


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def api(control_plane: ControlPlane) -> Iterator[Api]:
    """A namespace of the test's own."""
    with Api(control_plane, f"cli-{next(_numbers)}").lasting() as made:
        yield made


@pytest.fixture
def cluster(api: Api) -> Distillations:
    return Distillations(api.namespace, kubeconfig=api.cluster.kubeconfig)


@pytest.fixture
def opd(api: Api, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """`opd COMMAND ...` in the test's namespace, in this process."""
    monkeypatch.setenv("KUBECONFIG", str(api.cluster.kubeconfig))
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str | Path, stdin: str = "", namespace: str | None = None) -> Done:
        where = ["--namespace", namespace or api.namespace] if namespace != "" else []
        monkeypatch.setattr(sys, "argv", ["opd", *map(str, arguments), *where])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
            main()
        return Done(int(end.value.code or 0), out.getvalue(), err.getvalue())

    return call


@pytest.fixture
def example(repository: Path) -> Path:
    return repository / "examples" / "tiny" / "distill.yaml"


@pytest.fixture
def node(api: Api, tmp_path: Path, free_port: Callable[[], int]) -> Iterator[tuple[str, Kubelet]]:
    """A node of the test's own, whose kubelet has nothing but logs."""
    name = f"node-{next(_numbers)}"
    with kubelet(tmp_path / "pki", free_port()) as running:
        endpoints = {"kubeletEndpoint": {"Port": running.port}}
        status = {"addresses": [{"type": "InternalIP", "address": "127.0.0.1"}], "daemonEndpoints": endpoints}
        api.call("POST", "/api/v1/nodes", {"metadata": {"name": name}, "status": status})
        yield name, running
        api.call("DELETE", f"/api/v1/nodes/{name}")


NAME = "tiny-three-tasks"  # of the example


def say(api: Api, name: str = "tiny", conditions: dict[str, tuple[str, ...]] | None = None, **status: Any) -> None:
    """Write a status as the operator would: `conditions` as type -> (status, reason, message); the rest waits."""
    generation = api.get(name)["metadata"]["generation"]
    wanted: dict[str, tuple[str, ...]] = {
        "Accepted": ("True", "Accepted", "the spec is valid"),
        "TeachersTrained": ("True", "Disabled", "no teacher is trained"),
        **(conditions or {}),
    }
    kinds = [
        "Accepted",
        "TeachersTrained",
        "TeachersReady",
        "Trained",
        "Evaluated",
        "Deployed",
        "Serving",
        "Suspended",
        "Failed",
        "Ready",
    ]
    written = []
    for kind in kinds:
        value, reason, message = (*wanted.get(kind, ("False", "Waiting")), "", "")[:3]
        written.append(
            {"type": kind, "status": value, "reason": reason, "message": message, "observedGeneration": generation,
             "lastTransitionTime": "2026-01-01T00:00:00Z"}
        )  # fmt: skip
    content = {"observedGeneration": generation, "conditions": written, **status}
    api.patch("opddistillations", name, {"status": content}, "status")


CONTAINER = {
    "name": "trainer", "image": "i",
    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
}  # fmt: skip
SECURITY = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
POD = {"spec": {"containers": [CONTAINER], "securityContext": SECURITY}}


def make_pod(
    api: Api,
    name: str,
    role: str,
    node: str = "",
    job: str = "",
    index: int = 0,
    phase: str = "Running",
    owner: str = "tiny",
) -> None:
    """A pod of a role of distillation `owner`, as its Job or Deployment would make it."""
    labels = {"opd.dev/distillation": owner, "opd.dev/role": role, **({"job-name": job} if job else {})}
    metadata = {
        "name": name, "labels": labels, "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
    }  # fmt: skip
    container = {**POD["spec"]["containers"][0], "name": "teacher" if role == "teachers" else role}
    spec = {**POD["spec"], "containers": [container], **({"nodeName": node} if node else {})}
    api.call("POST", api.path("pods"), {"metadata": metadata, "spec": spec})
    api.patch("pods", name, {"status": {"phase": phase}}, "status")
