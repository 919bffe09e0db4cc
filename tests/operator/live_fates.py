"""What fates.py plays on paper, against the real API server and its controllers.

Here nothing waits for anything: a fault comes while the one before is still being looked after, pods and Jobs come and
go by themselves, and an operator that is killed takes up several lives at once.
"""

import hashlib
import random
import threading
import time
from collections.abc import Callable
from typing import Any

from opd_core.api.status import Status
from opd_operator import names

from tests.operator.fates import CODES, lived
from tests.operator.live import Api, Operator, wait_for
from tests.operator.world import adapter, teachers

# A start that has failed is tried again at once; a life takes seconds.
PRELUDE = "from opd_operator import jobs\njobs._FIRST_PAUSE = jobs._LONGEST_PAUSE = 0.1\n"
_JOBS = (names.TEACH, names.TRAINER, names.EVALUATOR)
_KINDS = ("deployments", "jobs", "services", "configmaps", "networkpolicies", "serviceaccounts")
_OURS = {"app.kubernetes.io%2Fmanaged-by": "opd-operator"}
_GONE = ("not found", "could not find", "Conflict", "object has been modified", "is immutable", "Precondition failed")


class SharedOperator:
    """One for several lives; whoever kills it starts it again."""

    def __init__(self, operator: Operator) -> None:
        self._operator, self._lock = operator, threading.Lock()

    def crash(self) -> None:
        with self._lock:
            self._operator.kill()
            self._operator.start().ready()


class LiveFate:
    """One life in a namespace of its own; `log` says what happened, so that a failure can be told."""

    def __init__(self, seed: int, api: Api, operator: SharedOperator) -> None:
        self.seed, self.api, self.operator, self.log = seed, api, operator, list[str]()
        self.random = random.Random(seed)
        pick = self.random.choice
        policy = {"backoffLimit": pick([0, 1, 3]), "cleanPodPolicy": pick(["Running", "All"])}
        self.spec: dict[str, Any] = {
            "teachers": pick([teachers(), teachers(), teachers("ocr")]),
            "teacherServing": {"placement": pick(["Shared", "Dedicated", "InProcess"])},
            "training": {"nodes": pick([1, 1, 2]), "seed": 42, "pod": {}},
            "evaluation": {"seed": 1},
            "endpoint": {"replicas": pick([1, 2]), "rollout": {"strategy": "Replace"}, "suspend": False},
            "runPolicy": policy,
            "suspend": False,
        }

    def run(self, events: int) -> None:
        lived(self, events)

    def play(self, events: int) -> None:
        self.api.submit(**{f"{part}__{key}": value for part, values in self.spec.items() if isinstance(values, dict)
                           for key, value in values.items()}, teachers=self.spec["teachers"])  # fmt: skip
        for _ in range(events):
            (kind,) = self.random.choices((_WORK, _FAULTS, _OTHERS), weights=(5, 3, 2))
            event = self.random.choice(kind)
            self.log.append(event.__name__)
            self.may_be_late(lambda event=event: event(self))
            time.sleep(self.random.choice([0, 0.1, 0.5]))
            self.check()

    def may_be_late(self, work: Callable[[], Any]) -> None:
        """What a kubelet, a queue or a person does may find that its object has just gone or changed."""
        try:
            work()
        except RuntimeError as error:
            if not any(word in str(error) for word in _GONE):
                raise

    # -------------------------------------------------------------------------------------------- at every moment

    def check(self) -> None:
        conditions = {c["type"]: c["status"] for c in self.api.status().get("conditions", [])}
        assert not conditions.get("Failed") == conditions.get("Ready") == "True"
        assert conditions.get("Stalled") == conditions.get("Failed")
        active = [pod for pod in self.api.find("pods") if pod["status"].get("phase") in ("Pending", "Running")]
        writers = {
            (pod["metadata"]["labels"].get(names.TEACHER, ""), pod["metadata"]["labels"]["job-name"])
            for pod in active
            if pod["metadata"]["labels"].get(names.ROLE) in (names.TEACH, names.TRAINER)
        }
        folders = [folder for folder, _ in writers]
        assert len(folders) == len(set(folders)), f"two trainers in one folder: {writers}"

    # -------------------------------------------------------------------------------------------- all is well again

    def mend(self) -> None:
        """Nobody suspends, preempts or breaks anything any more; whoever looks after it tries again what has failed."""
        self.log.append("mend")
        self.spec["training"]["seed"], self.spec["evaluation"]["seed"] = 42, 3
        self.edit(suspended=False)

        def ready() -> bool:
            if self.api.condition("Failed")[0] == "True":
                self.edit(suspended=True)
                wait_for(self.put_away, "the suspension of what has failed")
                self.edit(suspended=False)
            self.may_be_late(self.work)
            self.check()
            return self.api.condition("Ready")[0] == "True" and self.seen()

        try:
            wait_for(ready, "Ready", seconds=120)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.api.status()}; {self.children()}") from None

    def children(self) -> list[str]:
        """What there is, and what is leaving."""
        found = [child for kind in (*_KINDS, "pods") for child in self.api.find(kind, **_OURS)]
        leaving = {True: " (leaving)", False: ""}
        return [c["metadata"]["name"] + leaving["deletionTimestamp" in c["metadata"]] for c in found]

    def edit(self, *, suspended: bool) -> None:
        self.spec["suspend"] = self.spec["endpoint"]["suspend"] = suspended
        self.api.edit(**self.spec)
        wait_for(self.seen, "the operator to see the spec", seconds=90)

    def seen(self) -> bool:
        obj = self.api.get()
        return bool(obj["metadata"]["generation"] == obj["status"].get("observedGeneration"))

    def put_away(self) -> bool:
        self.may_be_late(self.api.sweep)
        return self.api.condition("Suspended")[0] == "True"

    def work(self) -> None:
        """What kubelets, controllers, queues and programs do."""
        self.api.sweep()
        for job in self.suspended_jobs():
            self.api.patch("jobs", job["metadata"]["name"], {"spec": {"suspend": False}})
        for role in (names.TEACHERS, names.ENDPOINT, *_JOBS):
            self.api.ready(self.api.pods(role))
        for role in _JOBS:
            for pod in self.api.pods(role):
                self.ends_well(pod, role)

    def ends_well(self, pod: dict[str, Any], role: str, *, passed: bool = True) -> None:
        facts: dict[str, Any] = {"digest": self.digest()}
        if role == names.TEACH:
            facts["digest"] = adapter(pod["metadata"]["labels"][names.TEACHER])
        if role == names.EVALUATOR:
            facts |= {"gatePassed": passed, "scores": []}
        self.api.ended(pod, 0, **facts)

    def digest(self) -> str:
        """Of the student that this run makes: the same for the same spec."""
        return "sha256:" + hashlib.sha256(self.api.status()["run"]["key"].encode()).hexdigest()

    def suspended_jobs(self) -> list[dict[str, Any]]:
        return [job for job in self.api.find("jobs") if job["spec"].get("suspend") and not ended(job)]

    def judge(self) -> None:
        """The right state, and nothing that belongs to nothing."""
        self.log.append("judge")
        left: list[str] = []

        def right() -> bool:
            self.may_be_late(self.api.sweep)
            left[:] = self.wrong()
            return not left

        try:
            wait_for(right, seconds=60)
        except AssertionError:
            raise AssertionError(f"{left}; {self.api.status()}") from None
        Status.model_validate(self.api.status())
        self.edit(suspended=True)

        def everything_goes() -> bool:
            self.may_be_late(self.api.sweep)
            left[:] = [
                child["metadata"]["name"] for kind in (*_KINDS, "pods") for child in self.api.find(kind, **_OURS)
            ]
            return not left

        try:
            wait_for(everything_goes, seconds=60)
        except AssertionError:
            raise AssertionError(f"stays when all is suspended: {left}") from None

    def wrong(self) -> list[str]:
        """What is not as it should be in the end."""
        api, status, found = self.api, self.api.status(), []
        conditions = {c["type"]: c["status"] for c in status["conditions"]}
        for kind in ("TeachersTrained", "TeachersReady", "Trained", "Evaluated", "Deployed", "Serving", "Ready"):
            if conditions[kind] != "True":
                found.append(f"{kind} is {conditions[kind]}")
        stable = status.get("endpoint", {}).get("stable", {})
        if not status.get("student", {}).get("digest") == stable.get("digest") == self.digest():
            found.append("another student serves")
        serving = [each["metadata"]["name"] for each in api.find("deployments", **_OURS)]
        if serving != [names.endpoint("tiny", stable.get("revision", ""))]:
            found.append(f"deployments {serving}")
        if len(api.pods(names.ENDPOINT)) != self.spec["endpoint"]["replicas"]:
            found.append(f"{len(api.pods(names.ENDPOINT))} endpoint pods")
        jobs = api.find("jobs", **_OURS)
        found += [f"job {job['metadata']['name']} works" for job in jobs if not ended(job)]
        for_whom = [
            (job["metadata"]["labels"][names.ROLE], job["metadata"]["labels"].get(names.TEACHER)) for job in jobs
        ]
        if len(for_whom) != len(set(for_whom)):
            found.append(f"several finished jobs {for_whom}")
        parents = {job["metadata"]["name"] for job in jobs}
        for pod in api.find("pods"):
            labels = pod["metadata"]["labels"]
            if labels[names.ROLE] != names.ENDPOINT and labels.get("job-name") not in parents:
                found.append(f"pod {pod['metadata']['name']}")
        mounted = {
            volume["configMap"]["name"]
            for job in jobs
            for volume in job["spec"]["template"]["spec"]["volumes"]
            if "configMap" in volume
        }
        kept = {child["metadata"]["name"] for child in api.find("configmaps", **_OURS)}
        found += [f"configmap {name}" for name in kept - mounted]
        found += [f"run.{name}" for name in {"queued", "evicted", "failed"} & status["run"].keys()]
        return found


def ended(job: dict[str, Any]) -> bool:
    return any(
        c["type"] in ("Complete", "Failed") and c["status"] == "True" for c in job["status"].get("conditions", [])
    )


# ------------------------------------------------------------------------------------------------ what may happen

Happening = Callable[[LiveFate], None]


def pods_run(fate: LiveFate) -> None:
    fate.api.ready(fate.api.pods(fate.random.choice((names.TEACHERS, names.ENDPOINT, *_JOBS))))


def all_is_done_that_waits(fate: LiveFate) -> None:
    fate.work()


def a_job_ends_well(fate: LiveFate) -> None:
    role, passed = fate.random.choice(_JOBS), fate.random.random() < 0.7
    for pod in fate.api.pods(role):
        fate.ends_well(pod, role, passed=passed)


def pods_leave(fate: LiveFate) -> None:
    fate.api.sweep()


def a_job_fails(fate: LiveFate) -> None:
    role, code = fate.random.choice(_JOBS), fate.random.choice(CODES)
    for pod in fate.api.pods(role):
        fate.api.ended(pod, code, "broken", "OOMKilled" if code == 137 else "Error")


def a_job_says_nothing(fate: LiveFate) -> None:
    for pod in fate.api.pods(fate.random.choice(_JOBS)):
        fate.api.ended(pod)


def a_node_is_lost(fate: LiveFate) -> None:
    for pod in fate.api.pods(fate.random.choice((names.TEACHERS, names.ENDPOINT, *_JOBS)))[:1]:
        name = pod["metadata"]["name"]
        marked = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}
        fate.api.patch("pods", name, {"status": {"conditions": [marked]}}, "status")
        fate.api.delete("pods", name, gracePeriodSeconds=0)


def something_is_deleted_by_hand(fate: LiveFate) -> None:
    plural = fate.random.choice(_KINDS)
    found = sorted(child["metadata"]["name"] for child in fate.api.find(plural, **_OURS))
    if found:
        fate.api.delete(plural, fate.random.choice(found), propagationPolicy="Background")


def a_queue_preempts(fate: LiveFate) -> None:
    jobs = [job for job in fate.api.find("jobs", **_OURS) if not ended(job)]
    if jobs:
        fate.api.patch("jobs", jobs[0]["metadata"]["name"], {"spec": {"suspend": True}})


def the_operator_is_killed(fate: LiveFate) -> None:
    fate.operator.crash()


def spec_is_edited(fate: LiveFate) -> None:
    part, key, values = fate.random.choice(_EDITS)
    place = fate.spec[part] if part else fate.spec
    place[key] = fate.random.choice(values)
    fate.api.edit(**fate.spec)


_EDITS: list[tuple[str, str, list[Any]]] = [
    ("training", "seed", [42, 7]),
    ("training", "pod", [{"nodeSelector": None}, {"nodeSelector": {"disk": "ssd"}}]),
    ("evaluation", "seed", [1, 2]),
    ("endpoint", "replicas", [1, 2]),
    ("endpoint", "suspend", [True, False, False]),
    ("", "suspend", [True, False, False]),
]
_WORK: tuple[Happening, ...] = (pods_run, all_is_done_that_waits, a_job_ends_well, pods_leave)
_FAULTS: tuple[Happening, ...] = (
    a_job_fails, a_job_says_nothing, a_node_is_lost, something_is_deleted_by_hand, a_queue_preempts,
    the_operator_is_killed,
)  # fmt: skip
_OTHERS: tuple[Happening, ...] = (spec_is_edited,)
