"""A cluster on paper for the pure core: what `plan`, `build` and `diff` decide is done to dicts, and the test plays the
controllers and the pods. The real API server has tests of its own."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import yaml
from opd_operator import names
from opd_operator.build import build
from opd_operator.diff import changes
from opd_operator.draft import timestamp
from opd_operator.observe import Requests, observe
from opd_operator.plan import Plan, advance
from opd_operator.settings import Settings
from opd_operator.words import Progress

REPOSITORY = Path(__file__).resolve().parents[2]
SETTINGS = Settings(images={names.TEACHERS: "teacher:1", names.TRAINER: "trainer:1", names.ENDPOINT: "endpoint:1"})
STUDENT = "sha256:" + "a" * 64
_EXAMPLE = yaml.safe_load((REPOSITORY / "examples" / "tiny" / "distill.yaml").read_text())


def example(**changes_: Any) -> dict[str, Any]:
    """The example as the API server would hold it; `a__b=v` sets spec.a.b."""
    obj = copy.deepcopy(_EXAMPLE)
    obj["metadata"].update(name="tiny", namespace="team", uid="uid-1", generation=1, resourceVersion="1")
    for path, value in changes_.items():
        *parents, last = path.split("__")
        part = obj["spec"]
        for parent in parents:
            part = part.setdefault(parent, {})
        part[last] = value
    return obj


def teachers(*trained: str) -> list[dict[str, Any]]:
    """The example's, `trained` ones by reinforcement learning."""
    training = {"algorithm": "DiffusionNFT", "rounds": 100}
    return [
        {**{key: value for key, value in each.items() if key != "adapter"}, "training": dict(training)}
        if each["name"] in trained
        else each
        for each in copy.deepcopy(_EXAMPLE)["spec"]["teachers"]
    ]


def with_models(**uris: str) -> list[dict[str, Any]]:
    """The example's teachers, those named with models of their own."""
    found = copy.deepcopy(_EXAMPLE)["spec"]["teachers"]
    for each in found:
        if uri := uris.get(each["name"]):
            del each["adapter"]
            each["model"] = {"uri": uri}
    return list(found)


def adapter(teacher: str) -> str:
    """Digest of a trained teacher's adapter."""
    return f"sha256:{hashlib.sha256(teacher.encode()).hexdigest()}"


class KilledError(Exception):
    """The operator, after a write."""


def has_ended(job: dict[str, Any]) -> bool:
    return any(c["type"] in ("Complete", "Failed") for c in job["status"].get("conditions", []))


def answer(**conditions: str) -> dict[str, Any]:
    """Of the controller of Gateway web: status of its conditions by type."""
    said = [{"type": k, "status": v, "reason": "Why", "message": f"because of {k}"} for k, v in conditions.items()]
    return {"parents": [{"parentRef": {"name": "web"}, "conditions": said}]}


class World:
    def __init__(self, **changes_: Any) -> None:
        self.obj = example(**changes_)
        self.now = 1_800_000_000.0
        self.children: dict[tuple[str, str], dict[str, Any]] = {}
        self.requests: Requests | None = Requests(failed=0, total=0)  # of the canary's pods, as they tell
        self.progress: dict[str, Any] | None = None
        self.progress_of: dict[str, dict[str, Any]] = {}  # progress by teacher that is trained
        self.rejected: dict[str, str] = {}
        self.claims: dict[str, list[str]] = {}  # their access modes
        self.events: list[tuple[str, str]] = []
        self.plan: Plan | None = None
        self.writes = 0  # of the operator
        self.child_writes = 0  # of anybody: events that wake the operator
        self.settled_at = -1
        self._built: dict[str, list[dict[str, Any]]] = {}
        self.crash_at = 0  # number of the write after which the operator is killed
        self.gateway = answer(Accepted="True", ResolvedRefs="True")  # its answer to an HTTPRoute
        self.linger = False  # whether pods take their time to leave
        self.injected: tuple[str, ...] = ()  # containers that a webhook adds to every pod, as a mesh does
        self.queues = False  # whether Jobs with a queue's label are suspended when they are made, as by Kueue

    # ---------------------------------------------------------------------------------------- the operator's part

    def look(self) -> "World":
        """One reconciliation."""
        children = list(self.children.values())
        progress = Progress.model_validate(self.progress) if self.progress else None
        taught = {name: Progress.model_validate(said) for name, said in self.progress_of.items()}
        observed = observe(children, progress, self.requests, self.rejected, self.claims, taught)
        self.plan = plan = advance(self.obj, observed, SETTINGS.images, self.now)
        if plan.status != self.obj.get("status"):
            self.obj["status"] = plan.status
            self.written()
            self.events += [(event.reason, event.message) for event in plan.events]
        if plan.wanted is not None and plan.distillation is not None:
            desired = self.build(plan)
            due = changes(desired, children, plan.wanted.keep)
            for child in due.free:
                self.remove(child["kind"], child["metadata"]["name"])
                self.written()
            for manifest in due.apply:
                self.put(manifest)
                self.written()
            for child in due.sweep:
                self.remove(child["kind"], child["metadata"]["name"])
                self.written()
        return self

    def build(self, plan: Plan) -> list[dict[str, Any]]:
        """Pure, and most looks ask for the same: what was built is remembered."""
        assert plan.distillation
        assert plan.wanted
        run, wanted = plan.status["run"], plan.wanted
        asked = (
            self.obj["metadata"],
            self.obj["spec"],
            [run["key"], run["attempt"], run["images"]],
            [wanted.teach, wanted.teachers, wanted.trainer, wanted.evaluator, [vars(each) for each in wanted.served]],
        )
        key = json.dumps(asked, sort_keys=True)
        if key not in self._built:
            self._built[key] = build(self.obj, plan.distillation, run, wanted, SETTINGS)
        return self._built[key]

    def written(self) -> None:
        self.writes += 1
        if self.writes == self.crash_at:
            raise KilledError

    def settle(self) -> "World":
        """Look as often as the operator would: after an event of a child, or when it asked to be woken. Its own write of
        the status wakes nobody. An operator that is killed is started again."""
        for _ in range(20):
            before = self.child_writes
            try:
                self.look()
            except KilledError:
                continue
            assert self.plan is not None
            due = self.plan.wake is not None and self.plan.wake <= self.now
            if not due and self.child_writes == before:
                if not self.crash_at:
                    self.assert_nothing_is_left_undone()
                self.settled_at = self.child_writes
                return self
        raise AssertionError("it never settles")

    def assert_nothing_is_left_undone(self) -> None:
        """One look more decides the same: what is waited for is an event or a time."""
        before, status = self.writes, self.obj.get("status")
        self.look()
        assert self.writes == before, ("a decision waits for nobody", status, self.obj["status"])

    def wait(self, seconds: float) -> "World":
        """Time passes; the operator sleeps until it has asked to be woken."""
        end = self.now + seconds
        while self.plan is not None and self.plan.wake is not None and self.plan.wake <= end:
            self.now = max(self.now, self.plan.wake)
            self.settle()
        self.now = end
        return self

    # ---------------------------------------------------------------------------------------- the cluster's part

    def put(self, manifest: dict[str, Any]) -> None:
        """As the API server: the status stays, about the generation that its controller has seen."""
        self.child_writes += 1
        key = (manifest["kind"], manifest["metadata"]["name"])
        known = self.children.get(key)
        child = {"status": {}, **copy.deepcopy(manifest)}
        made = {"uid": "u", "generation": 1, "creationTimestamp": timestamp(self.now)}
        if known:
            child["status"] = known["status"]
            made = {name: known["metadata"][name] for name in made}
            made["generation"] += child.get("spec") != known.get("spec")
        child["metadata"] = {**child["metadata"], **made}
        if child["kind"] == "HTTPRoute":
            child["status"] = self.gateway
        if (
            not known
            and child["kind"] == "Job"
            and self.queues
            and names.QUEUE_LABELS[0] in child["metadata"]["labels"]
        ):
            child["spec"]["suspend"] = True
            child["status"] = {"conditions": [{"type": "Suspended", "status": "True"}]}
        self.children[key] = child

    def remove(self, kind: str, name: str) -> None:
        """A Job goes after its pods, and where pods linger it may have some that nobody has seen."""
        self.child_writes += 1
        child = self.children[kind, name]
        if self.linger and kind == "Job" and not has_ended(child):
            child["metadata"]["deletionTimestamp"] = timestamp(self.now)
        else:
            del self.children[kind, name]
        self.remove_pods(name)

    def remove_pods(self, parent: str) -> None:
        for key, child in list(self.children.items()):
            if child["kind"] == "Pod" and child["parent"] == parent:
                if self.linger and child["status"]["phase"] in ("Pending", "Running"):
                    child["metadata"]["deletionTimestamp"] = timestamp(self.now)
                else:
                    del self.children[key]

    def active(self) -> list[dict[str, Any]]:
        return [pod for pod in self.of("Pod") if pod["status"]["phase"] in ("Pending", "Running")]

    def leave(self) -> "World":
        """The pods that were on their way out are gone."""
        for key, child in list(self.children.items()):
            if "deletionTimestamp" in child["metadata"]:
                del self.children[key]
        return self.settle()

    def of(self, kind: str, role: str = "") -> list[dict[str, Any]]:
        found = [child for (of, _), child in sorted(self.children.items()) if of == kind]
        return [child for child in found if not role or child["metadata"]["labels"][names.ROLE] == role]

    def up(self, role: str, only: str = "") -> "World":
        """Deployments of a role become available, with a pod each."""
        for child in self.of("Deployment", role):
            if only in child["metadata"]["name"]:
                replicas = child["spec"]["replicas"]
                seen = {"observedGeneration": child["metadata"]["generation"]}
                child["status"] = {**seen, "readyReplicas": replicas, "updatedReplicas": replicas}
                name = child["metadata"]["name"]
                for key in [k for k, pod in self.children.items() if pod["kind"] == "Pod" and pod["parent"] == name]:
                    del self.children[key]
                for i in range(replicas):
                    self.pod(child, f"{name}-{i}", "Running", ready=True)
        return self.settle()

    def jobs(self, role: str = "") -> list[dict[str, Any]]:
        """Those that are to work: they have not ended, nor are they leaving."""
        return [
            job for job in self.of("Job", role) if not has_ended(job) and "deletionTimestamp" not in job["metadata"]
        ]

    def job(self, role: str, teacher: str = "") -> dict[str, Any]:
        """The one that is at work for a role, or for one teacher that is trained."""
        (job,) = [job for job in self.jobs(role) if teacher in ("", job["metadata"]["labels"].get(names.TEACHER))]
        return job

    def run(self, role: str = names.TRAINER, teacher: str = "") -> "World":
        job = self.job(role, teacher)
        pods = job["spec"]["completions"]
        job["status"] = {"active": pods, "ready": pods}
        for i in range(pods):
            self.pod(job, f"{job['metadata']['name']}-{i}", "Running", ready=True, index=i)
        return self.settle()

    def finish(self, role: str, teacher: str = "", **facts: Any) -> "World":
        job = self.job(role, teacher)
        pods = job["spec"]["completions"]
        job["status"] = {"succeeded": pods, "conditions": [{"type": "Complete", "status": "True"}]}
        words = json.dumps({"message": "done", "exitCode": 0, **facts})
        for i in range(pods):
            ended = {"exitCode": 0, "message": words if i == 0 else ""}
            self.pod(job, f"{job['metadata']['name']}-{i}", "Succeeded", ended=ended, index=i)
        return self.settle()

    def fail(
        self, role: str, code: int, reason: str = "Error", message: str = "it broke", *, peers: int = 75,
        gone: bool = False, teacher: str = "", **more: Any,
    ) -> "World":  # fmt: skip
        """The first pod ends with `code`, the others of its Job with `peers`; `gone`: the first one has been deleted
        with its node before anybody looked."""
        job = self.job(role, teacher)
        job["status"] = {"failed": 1, "conditions": [{"type": "Failed", "status": "True", "message": "BackoffLimit"}]}
        for i in range(job["spec"]["completions"]):
            name = f"{job['metadata']['name']}-{i}"
            ended = {"exitCode": code if i == 0 else peers, "reason": reason, "message": message}
            self.pod(job, name, "Failed", ended=ended, index=i, **(more if i == 0 else {}))
            if gone and i == 0:
                del self.children["Pod", name]
        return self.settle()

    def disrupt(self, role: str) -> "World":
        """The node of a Job's first pod is lost: its pods are marked, then deleted; the Job does not know yet."""
        name = f"{self.job(role)['metadata']['name']}-0"
        marked = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}
        pod = self.children["Pod", name]
        pod["status"]["conditions"].append(marked)
        pod["metadata"]["deletionTimestamp"] = timestamp(self.now)
        self.settle()
        del self.children["Pod", name]
        return self.settle()

    def suspend_job(self, role: str, teacher: str = "") -> "World":
        """By somebody else, as Kueue does it to preempt: the Job controller takes the pods away, and nothing fails."""
        job = self.job(role, teacher)
        job["spec"]["suspend"] = True
        job["metadata"]["generation"] += 1
        done = job["status"].get("succeeded", 0)
        job["status"] = {"succeeded": done, "conditions": [{"type": "Suspended", "status": "True"}]}
        self.remove_pods(job["metadata"]["name"])
        return self.settle()

    def admit(self, role: str, teacher: str = "") -> "World":
        """A queue lets a Job begin, on nodes of its choice."""
        job = self.job(role, teacher)
        job["spec"]["suspend"] = False
        job["spec"]["template"]["spec"]["nodeSelector"] = {"flavor": "spot"}
        job["metadata"]["generation"] += 1
        job["status"] = {"conditions": [{"type": "Suspended", "status": "False"}]}
        return self.settle()

    def pod(
        self, parent: dict[str, Any], name: str, phase: str, *, ready: bool = False, index: int = 0,
        ended: dict[str, Any] | None = None, conditions: tuple[dict[str, Any], ...] = (),
        waiting: dict[str, Any] | None = None, restarts: int = 0, before: dict[str, Any] | None = None,
        leaving: bool = False,
    ) -> None:  # fmt: skip
        self.child_writes += 1
        state = {"terminated": ended} if ended else {"waiting": waiting} if waiting else {"running": {}}
        own = [{"type": "Ready", "status": str(ready)}]
        others = [
            {"name": other, "state": {"terminated": {"exitCode": 0, "message": ""}} if ended else {"running": {}},
             "lastState": {}, "restartCount": 0, "image": "injected:1"}
            for other in self.injected
        ]  # fmt: skip
        main = parent["spec"]["template"]["spec"]["containers"][0]["name"]
        self.children["Pod", name] = {
            "kind": "Pod",
            "parent": parent["metadata"]["name"],
            "metadata": {
                "name": name,
                "labels": {**parent["spec"]["template"]["metadata"]["labels"], "job-name": parent["metadata"]["name"]},
                "annotations": {names.COMPLETION_INDEX: str(index)},
                **({"deletionTimestamp": timestamp(self.now)} if leaving else {}),
            },
            "spec": {"nodeName": "machine-1"},
            "status": {
                "phase": phase,
                "podIP": "10.0.0.1",
                "conditions": [*own, *conditions],
                # The kubelet sorts them by name.
                "containerStatuses": sorted(
                    [
                        *others,
                        {
                            "name": main,
                            "state": state,
                            "lastState": {"terminated": before} if before else {},
                            "restartCount": restarts,
                            "image": "image:1",
                        },
                    ],
                    key=lambda status: status["name"],
                ),
            },
        }

    # ---------------------------------------------------------------------------------------- what people see

    @property
    def status(self) -> dict[str, Any]:
        return self.obj["status"]

    def condition(self, kind: str) -> tuple[str, str]:
        (found,) = [c for c in self.status["conditions"] if c["type"] == kind]
        return found["status"], found["reason"]

    def message(self, kind: str) -> str:
        (found,) = [c for c in self.status["conditions"] if c["type"] == kind]
        return found["message"]

    def edit(self, **changes_: Any) -> "World":
        self.obj["spec"] = example(**changes_)["spec"]
        self.obj["metadata"]["generation"] += 1
        return self.settle()

    # ---------------------------------------------------------------------------------------- shortcuts

    def taught(self, *teachers: str) -> "World":
        """Each is trained, one after the other; its digest is of its name."""
        for teacher in teachers:
            self.run(names.TEACH, teacher).finish(names.TEACH, teacher, digest=adapter(teacher))
        return self

    def trained(self, digest: str = STUDENT) -> "World":
        return self.settle().up(names.TEACHERS).run().finish(names.TRAINER, digest=digest)

    def evaluated(self, digest: str = STUDENT, *, passed: bool = True, kept: float = 0.9) -> "World":
        figures = {"base": 0.1, "teacher": 0.9, "student": 0.8, "kept": kept}
        tasks = [(teacher["name"], teacher["rewards"][0]) for teacher in self.obj["spec"]["teachers"]]
        scores = [{"task": task, "reward": reward, **figures} for task, reward in tasks]
        return self.trained(digest).finish(names.EVALUATOR, digest=digest, gatePassed=passed, scores=scores)

    def served(self, digest: str = STUDENT) -> "World":
        return self.evaluated(digest).up(names.ENDPOINT)
