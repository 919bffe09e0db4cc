"""The operator as a process against a real API server and controller manager; the test plays the kubelet."""

import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import kubernetes
import yaml
from devcluster.control_plane import Cluster

REPOSITORY = Path(__file__).resolve().parents[2]
CRD = REPOSITORY / "crds" / "opd.dev_opddistillations.yaml"
OPD = "/apis/opd.dev/v1alpha1"


def wait_for(condition: Callable[[], Any], what: str = "", seconds: float = 60) -> Any:
    deadline, pause = time.monotonic() + seconds, 0.02
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what or condition}"
        time.sleep(pause)
        pause = min(1.5 * pause, 0.2)  # a question costs the API server as much as an answer
    return found


class Api:
    """Requests as plain data; one namespace."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster, self.namespace = cluster, namespace
        settings = kubernetes.client.Configuration()
        kubernetes.config.load_kube_config(str(cluster.kubeconfig), client_configuration=settings)
        context = ssl.create_default_context(cafile=settings.ssl_ca_cert)
        context.load_cert_chain(settings.cert_file, settings.key_file)
        self.http = httpx.Client(base_url=settings.host, verify=context, timeout=30)

    def call(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> dict[str, Any]:
        answer = self.http.request(method, path, content=json.dumps(body) if body is not None else None,
                                   headers={"Content-Type": kind})  # fmt: skip
        content: dict[str, Any] = answer.json()
        if answer.status_code >= 300:
            raise RuntimeError(f"{method} {path}: {content.get('message')}")
        return content

    def path(self, plural: str, name: str = "", sub: str = "") -> str:
        roots = {
            "pods": "/api/v1", "services": "/api/v1", "configmaps": "/api/v1", "serviceaccounts": "/api/v1", "events": "/api/v1",
            "deployments": "/apis/apps/v1", "jobs": "/apis/batch/v1", "opddistillations": OPD,
            "networkpolicies": "/apis/networking.k8s.io/v1",
        }  # fmt: skip
        return "/".join(part for part in (roots[plural], "namespaces", self.namespace, plural, name, sub) if part)

    def find(self, plural: str, **labels: str) -> list[dict[str, Any]]:
        selector = ",".join(f"{key}={value}" for key, value in labels.items())
        items: list[dict[str, Any]] = self.call("GET", self.path(plural) + f"?labelSelector={selector}")["items"]
        return items

    def ours(self, plural: str, role: str) -> list[dict[str, Any]]:
        return self.find(plural, **{"opd.dev%2Frole": role})

    @contextmanager
    def lasting(self) -> Iterator["Api"]:
        """The namespace, made and deleted; it may be deleted meanwhile."""
        self.call("POST", "/api/v1/namespaces", {"metadata": {"name": self.namespace}})
        yield self
        self.http.delete(f"/api/v1/namespaces/{self.namespace}")

    def patch(self, plural: str, name: str, body: Any, sub: str = "") -> dict[str, Any]:
        return self.call("PATCH", self.path(plural, name, sub), body, "application/merge-patch+json")

    def delete(self, plural: str, name: str, **options: Any) -> None:
        self.call("DELETE", self.path(plural, name), options)

    # ------------------------------------------------------------------------------------ the distillation

    def submit(self, name: str = "tiny", **changes: Any) -> None:
        """The example; `a__b=v` sets spec.a.b."""
        obj = yaml.safe_load((REPOSITORY / "examples" / "tiny" / "distill.yaml").read_text())
        obj["metadata"] = {"name": name, "namespace": self.namespace}
        for path, value in changes.items():
            *parents, last = path.split("__")
            part = obj["spec"]
            for parent in parents:
                part = part.setdefault(parent, {})
            part[last] = value
        self.call("POST", self.path("opddistillations"), obj)

    def get(self, name: str = "tiny") -> dict[str, Any]:
        return self.call("GET", self.path("opddistillations", name))

    def status(self, name: str = "tiny") -> dict[str, Any]:
        status: dict[str, Any] = self.get(name).get("status", {})
        return status

    def condition(self, kind: str, name: str = "tiny") -> tuple[str, str]:
        found = [c for c in self.status(name).get("conditions", []) if c["type"] == kind]
        return (found[0]["status"], found[0]["reason"]) if found else ("", "")

    def until(self, kind: str, status: str, reason: str = "", name: str = "tiny", seconds: float = 60) -> None:
        def there() -> bool:
            found = self.condition(kind, name)
            return found[0] == status and reason in ("", found[1])

        try:
            wait_for(there, seconds=seconds)
        except AssertionError:
            raise AssertionError(
                f"{kind} is not {status} {reason}: {json.dumps(self.status(name), indent=1)}"
            ) from None

    def edit(self, name: str = "tiny", **spec: Any) -> None:
        self.patch("opddistillations", name, {"spec": spec})

    # ------------------------------------------------------------------------------------ the kubelet

    def pods(self, role: str) -> list[dict[str, Any]]:
        """Pods of a role that have not ended and are not leaving."""
        return [
            pod
            for pod in self.ours("pods", role)
            if pod["status"].get("phase") in ("Pending", "Running") and "deletionTimestamp" not in pod["metadata"]
        ]

    def run(self, role: str, count: int = 1) -> None:
        """Every pod of a role becomes ready; until they are `count`."""
        self.ready(wait_for(lambda: len(found := self.pods(role)) >= count and found, f"{count} {role} pods"))

    def ready(self, pods: Iterable[dict[str, Any]]) -> None:
        """Each becomes ready, unless it is gone by now."""
        for pod in pods:
            try:
                self._say(pod, "Running", {"running": {}}, ready=True)
            except RuntimeError as error:
                if "not found" not in str(error):
                    raise

    def end(self, role: str, code: int = 0, message: str = "", reason: str = "Error", **facts: Any) -> None:
        """Every pod of a role ends; with `facts`, as our programs say it."""
        for pod in wait_for(lambda: self.pods(role), f"{role} pods"):
            self.ended(pod, code, message, reason, **facts)

    def ended(self, pod: dict[str, Any], code: int = 0, message: str = "", reason: str = "Error", **facts: Any) -> None:
        words = json.dumps({"exitCode": code, "message": message, **facts}) if facts else message
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        state = {"exitCode": code, "reason": "Completed" if code == 0 else reason, "message": words, "finishedAt": now}
        self._say(pod, "Failed" if code else "Succeeded", {"terminated": state}, ready=False)

    def _say(self, pod: dict[str, Any], phase: str, state: dict[str, Any], *, ready: bool) -> None:
        container = pod["spec"]["containers"][0]
        status = {
            "phase": phase,
            "podIP": "127.0.0.1",
            "conditions": [{"type": "Ready", "status": str(ready)}],
            "containerStatuses": [
                {"name": container["name"], "image": container["image"], "imageID": "", "ready": ready,
                 "restartCount": 0, "state": state}
            ],
        }  # fmt: skip
        self.patch("pods", pod["metadata"]["name"], {"status": status}, "status")

    def sweep(self) -> None:
        """Nobody runs here, so whatever is leaving may go at once, as a kubelet would tell."""
        for pod in self.find("pods"):
            if "deletionTimestamp" in pod["metadata"]:
                try:
                    self.delete("pods", pod["metadata"]["name"], gracePeriodSeconds=0)
                except RuntimeError as error:
                    if "not found" not in str(error):  # gone in between
                        raise

    def writes(self) -> list[tuple[str, str, str]]:
        """(verb, resource, name) of what the operator has written in this namespace, from the audit log."""
        found = []
        here = f'"namespace":"{self.namespace}"'
        for line in self.cluster.audit_log.read_text().splitlines():
            if here not in line:
                continue
            entry = json.loads(line)
            ref = entry.get("objectRef", {})
            ours = entry.get("userAgent", "").startswith("opd-operator")
            if not ours or ref.get("namespace") != self.namespace or ref["resource"] == "leases":
                continue
            if entry["verb"] not in ("get", "list", "watch"):
                found.append((entry["verb"], ref["resource"], ref.get("name", "")))
        return found


class Operator:
    """`python -m opd_operator`; `prelude` is Python that is run before it, in the same process."""

    def __init__(
        self, cluster: Cluster, folder: Path, ports: tuple[int, int], *options: str, prelude: str = ""
    ) -> None:
        self.cluster, self.log, self.ports = cluster, folder / "operator.log", ports
        program = ["-c", f"{prelude}\nfrom opd_operator.__main__ import main\nraise SystemExit(main())"]
        self.command = [
            sys.executable, *(program if prelude else ["-m", "opd_operator"]), "--device=cpu",
            f"--metrics-port={ports[0]}", f"--probe-port={ports[1]}", *options,
        ]  # fmt: skip
        self.kubeconfig = cluster.kubeconfig
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Operator":
        env = {**os.environ, "KUBECONFIG": str(self.kubeconfig)}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, env=env, stdout=log, stderr=subprocess.STDOUT)
        return self

    def ready(self) -> "Operator":
        def answers() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()
            try:
                return httpx.get(f"http://127.0.0.1:{self.ports[1]}/readyz", timeout=5).status_code == 200
            except httpx.TransportError:
                return False

        wait_for(answers, "the operator")
        return self

    def metrics(self) -> str:
        return httpx.get(f"http://127.0.0.1:{self.ports[0]}/metrics", timeout=5).text

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(timeout=20)

    def kill(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


STUDENT = "sha256:" + "a" * 64
SCORES = [{"task": "ocr", "reward": "tiny-ocr", "base": 0.1, "teacher": 0.9, "student": 0.8, "kept": 0.9}]


def quiet(api: Api, seconds: float = 3.0) -> None:
    """The operator comes to rest: nothing is written for a while."""

    def rests() -> bool:
        before = api.writes()
        time.sleep(seconds)
        return api.writes() == before

    wait_for(rests, "silence")


def to_student(api: Api, digest: str = STUDENT) -> None:
    api.run("teachers")
    api.run("trainer")
    api.until("Trained", "False", "Running")
    api.end("trainer", digest=digest, round=500)
    api.until("Trained", "True")
    api.end("evaluator", digest=digest, gatePassed=True, scores=SCORES)
    api.until("Evaluated", "True")
