"""What the tests on a real node share: the namespace of a test, reading objects, pods and the audit log."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devcluster import node

SYSTEM = "opd-system"
OPERATOR = f"system:serviceaccount:{SYSTEM}:diffusion-opd"
OURS = "app.kubernetes.io/managed-by=opd-operator"
CHILDREN = (
    "deployments,jobs,pods,services,configmaps,serviceaccounts,networkpolicies,"
    "poddisruptionbudgets,horizontalpodautoscalers,httproutes"
)


def wait_until(condition: Callable[[], Any], what: str = "", seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what or condition}"
        time.sleep(0.5)
    return found


@dataclass(frozen=True)
class Namespace:
    """A namespace of one test, with the claims of `examples/tiny/distill.yaml`."""

    cluster: node.Node
    name: str
    students: Path  # what is behind the claim `students`

    def kubectl(self, *arguments: str | Path, stdin: str | None = None) -> str:
        return self.cluster.kubectl("--namespace", self.name, *arguments, stdin=stdin)

    def opd(self, *arguments: str | Path) -> str:
        """Standard output of `opd` in this namespace."""
        command = [sys.executable, "-m", "opd_cli.main", *map(str, arguments), "--namespace", self.name]
        command += ["--kubeconfig", str(self.cluster.kubeconfig)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr or done.stdout
        return done.stdout

    def apply(self, document: dict[str, Any]) -> str:
        self.kubectl("apply", "-f", "-", stdin=json.dumps(document))
        return str(document["metadata"]["name"])

    def edit(self, name: str, **spec: Any) -> None:
        self.kubectl("patch", f"opd/{name}", "--type=merge", "-p", json.dumps({"spec": spec}))

    def get(self, what: str) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.kubectl("get", what, "-o", "json"))
        return document

    def status(self, name: str) -> dict[str, Any]:
        return dict(self.get(f"opd/{name}").get("status", {}))

    def condition(self, name: str, kind: str) -> tuple[str, str, str]:
        """(status, reason, message)."""
        found = [c for c in self.status(name).get("conditions", []) if c["type"] == kind]
        return (found[0]["status"], found[0]["reason"], found[0].get("message", "")) if found else ("", "", "")

    def until(self, name: str, kind: str, status: str, reason: str = "", seconds: float = 300) -> str:
        """Wait for a condition; its message."""

        def there() -> bool:
            found = self.condition(name, kind)
            return found[0] == status and reason in ("", found[1])

        try:
            wait_until(there, seconds=seconds)
        except AssertionError:
            shown = json.dumps(self.status(name), indent=1)
            raise AssertionError(f"{kind} is not {status} {reason}: {shown}\n{self.kubectl('get', 'pods')}") from None
        return self.condition(name, kind)[2]

    def pods(self, role: str = "") -> list[dict[str, Any]]:
        """Pods of distillations that have not ended."""
        selector = f"opd.dev/role={role}" if role else "opd.dev/distillation"
        items = json.loads(self.kubectl("get", "pods", "-l", selector, "-o", "json"))["items"]
        return [pod for pod in items if pod["status"]["phase"] in ("Pending", "Running")]

    def running(self, role: str) -> list[str]:
        """Names of the role's pods whose container runs and that are not leaving."""
        return [
            pod["metadata"]["name"]
            for pod in self.pods(role)
            if pod["status"]["phase"] == "Running" and "deletionTimestamp" not in pod["metadata"]
        ]

    def children(self) -> str:
        return self.kubectl("get", CHILDREN, "-l", OURS, "-o", "name")

    def rounds(self, name: str) -> int:
        return int(self.status(name).get("progress", {}).get("round", 0))

    def log(self, role: str) -> str:
        try:
            return self.kubectl("logs", "-l", f"opd.dev/role={role}", "--tail=-1")
        except RuntimeError:  # its container is not there yet
            return ""


def audit(cluster: node.Node, user: str = OPERATOR) -> list[dict[str, Any]]:
    """The audit log's lines of a user."""
    lines = (json.loads(line) for line in cluster.audit_log.read_text().splitlines())
    return [line for line in lines if line["user"].get("username") == user]


def writes(namespace: Namespace) -> list[tuple[str, str, str]]:
    """(verb, resource, name) of what the operator has changed in a namespace."""
    found = []
    for line in audit(namespace.cluster):
        ref = line.get("objectRef", {})
        if ref.get("namespace") == namespace.name and line["verb"] not in ("get", "list", "watch"):
            found.append((line["verb"], ref["resource"], ref.get("name", "")))
    return found


def refusals(cluster: node.Node) -> list[str]:
    """What the operator had no right to.

    A right takes a moment to reach the API server, and admission learns of a new type some seconds after it came, so
    what was allowed another time does not count; nor does a namespace that is going, where nobody may make anything.
    """
    lines = audit(cluster)
    allowed = {_asked(line) for line in lines if line["responseStatus"]["code"] != 403}
    refused = [line for line in lines if line["responseStatus"]["code"] == 403 and _asked(line) not in allowed]
    said = [f"{line['verb']} {line['requestURI']}: {line['responseStatus'].get('message', '')}" for line in refused]
    return [each for each in said if "is being terminated" not in each]


def _asked(line: dict[str, Any]) -> tuple[str, ...]:
    ref = line.get("objectRef", {})
    return (line["verb"], *(ref.get(part, "") for part in ("apiGroup", "resource", "subresource", "namespace")))
