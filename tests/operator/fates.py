"""Seeded random lives of an object: faults, edits, queues, crashes of the operator, and then a cluster that works again.

Each fate ends where its last spec says, whatever happened on the way, with nothing left that belongs to nothing. What must
hold at every moment is checked after every event.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from opd_core.api.status import Status
from opd_core.exit_codes import ExitCode
from opd_operator import names
from opd_operator.observe import Requests
from opd_operator.outcome import TRAINING

from tests.operator.world import World, adapter, teachers

CODES = (1, 137, *(int(code) for code in ExitCode if code not in (ExitCode.OK, ExitCode.GATE)))
_JOBS = (names.TEACH, names.TRAINER, names.EVALUATOR)
_ROUNDS = 40  # of a cluster that works again, until all is well


def lived(fate: Any, events: int) -> None:
    """Play a life, on paper or live, and judge it; a failure tells what happened in it."""
    try:
        fate.play(events)
        fate.mend()
        fate.judge()
    except Exception as error:
        raise AssertionError(f"fate {fate.seed}: {', '.join(fate.log)}: {error}") from error


@dataclass
class Fate:
    """One life; `log` says what happened, so that a failure can be told."""

    seed: int
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        pick = self.random.choice
        self.spec: dict[str, Any] = {
            "training__nodes": pick([1, 1, 2]),
            "endpoint__replicas": pick([1, 2, 3]),
            "teacherServing": {"placement": pick(["Shared", "Dedicated", "InProcess"])},
            "runPolicy": {
                "backoffLimit": pick([0, 1, 3]),
                "cleanPodPolicy": pick(["Running", "All"]),
                "parallelTeachers": pick([1, 2]),
            },
        }
        self.spec["teachers"] = pick([teachers(), teachers("ocr"), teachers("geneval", "ocr", "aesthetic")])
        if pick([True, False]):
            self.spec["endpoint__route"] = {"gateway": "web", "hostnames": ["images.example.com"]}
        self.world = world = World(**self.spec)
        if pick([True, False]):
            world.obj["metadata"]["labels"] = {names.QUEUE_LABELS[0]: "gpus"}
            world.queues = True
        world.injected = pick([(), (), ("istio-proxy",)])

    def play(self, events: int) -> None:
        self.do(self.world.settle)
        for _ in range(events):
            if self.random.random() < 0.15:
                self.world.crash_at = self.world.writes + self.random.randint(1, 3)
            if self.random.random() < 0.1:
                self.world.linger = not self.world.linger
            kind = self.random.choices((_WORK, _FAULTS, _OTHERS), weights=(5, 3, 2))[0]
            able = [event for event in kind if event(self, False)] or [time_passes]
            event = self.random.choice(able)
            self.log.append(event.__name__)
            self.do(lambda event=event: event(self, True))

    def do(self, work: Callable[[], Any]) -> None:
        work()
        if self.world.settled_at != self.world.child_writes:
            self.world.settle()
        self.check()

    # -------------------------------------------------------------------------------------------- at every moment

    def check(self) -> None:
        world = self.world
        failed, ready, suspended = (world.condition(kind)[0] == "True" for kind in ("Failed", "Ready", "Suspended"))
        working = [pod for pod in world.active() if pod["metadata"]["labels"][names.ROLE] in TRAINING]
        assert not (failed and ready)
        assert world.condition("Stalled")[0] == world.condition("Failed")[0]
        if suspended:
            assert not working
            assert not world.of("Job")
            assert not world.of("Deployment", names.TEACHERS)
        if failed and world.condition("Failed")[1] not in ("RolledBack",) and world.status["run"].get("failed"):
            assert not working, "what is called failed holds nothing"
        teaching = [pod for pod in working if pod["metadata"]["labels"][names.ROLE] == names.TEACH]
        writers = {pod["parent"] for pod in working if pod["metadata"]["labels"][names.ROLE] == names.TRAINER}
        assert len(writers) <= 1, "two trainers in one folder"
        writers = {(pod["metadata"]["labels"][names.TEACHER], pod["parent"]) for pod in teaching}
        taught = [teacher for teacher, _ in writers]
        assert len(taught) == len(set(taught)), "two trainers in one teacher's folder"
        if world.jobs(names.TEACH):
            assert not world.of("Deployment", names.TEACHERS), "they hold what teachers are trained on"
            assert not world.jobs(names.TRAINER)
            assert len(world.jobs(names.TEACH)) <= self.spec["runPolicy"]["parallelTeachers"]
        endpoint = world.status.get("endpoint", {})
        if "deployed" in endpoint.get("stable", {}) and not world.obj["spec"]["endpoint"].get("suspend"):
            name = names.endpoint("tiny", endpoint["stable"]["revision"])
            assert ("Deployment", name) in world.children, "what serves went away"
        assert world.plan
        assert not world.plan.delete

    # -------------------------------------------------------------------------------------------- all is well again

    def mend(self) -> None:
        """Nobody suspends, preempts or breaks anything any more; whoever looks after it tries again what has failed."""
        world = self.world
        world.linger, world.crash_at, world.requests = False, 0, Requests(failed=0, total=100)
        self.spec["suspend"], self.spec["endpoint__suspend"] = False, False
        self.spec["training__seed"] = 42  # a student of this one may be known
        self.spec["evaluation__seed"] = 3  # and may have missed its gate with another one
        self.do(lambda: world.edit(**self.spec))
        for _ in range(_ROUNDS):
            if world.condition("Ready")[0] == "True":
                return
            if world.condition("Failed")[0] == "True":
                self.do(lambda: world.edit(**{**self.spec, "suspend": True, "endpoint__suspend": True}))
                self.do(lambda: world.edit(**self.spec))
            self._work()
        raise AssertionError(f"it never becomes Ready: {world.status['conditions']}")

    def _work(self) -> None:
        """What kubelets, controllers, queues and programs do within a minute or two."""
        world = self.world
        self.do(world.leave)
        for role in _JOBS:
            for job in world.jobs(role):
                if job["spec"].get("suspend"):
                    self.do(lambda role=role, job=job: world.admit(role, teacher_of(job)))
        for job in world.jobs(names.TEACH):
            if not job["spec"].get("suspend"):
                self.do(lambda teacher=teacher_of(job): world.taught(teacher))
        self.do(lambda: world.up(names.TEACHERS))
        if world.jobs(names.TRAINER) and not world.jobs(names.TRAINER)[0]["spec"].get("suspend"):
            self.do(lambda: world.run().finish(names.TRAINER, digest=self.digest()))
        if world.jobs(names.EVALUATOR) and not world.jobs(names.EVALUATOR)[0]["spec"].get("suspend"):
            self.do(lambda: world.finish(names.EVALUATOR, digest=self.digest(), gatePassed=True, scores=[]))
        self.do(lambda: world.up(names.ENDPOINT))
        self.do(lambda: world.wait(70))

    def digest(self) -> str:
        """Of the student that this run makes: the same for the same spec."""
        return "sha256:" + hashlib.sha256(self.world.status["run"]["key"].encode()).hexdigest()

    def judge(self) -> None:
        """The right state, and nothing that belongs to nothing."""
        world = self.world
        self.do(lambda: world.wait(60))
        status, replicas = world.status, self.spec["endpoint__replicas"]
        Status.model_validate(status)
        for kind in ("TeachersTrained", "TeachersReady", "Trained", "Evaluated", "Deployed", "Serving", "Ready"):
            assert world.condition(kind)[0] == "True", (kind, world.condition(kind))
        assert status["student"]["digest"] == status["endpoint"]["stable"]["digest"] == self.digest()
        (serving,) = world.of("Deployment")
        assert serving["metadata"]["labels"][names.REVISION] == status["endpoint"]["stable"]["revision"]
        assert serving["spec"]["replicas"] == replicas
        assert len(world.of("Pod", names.ENDPOINT)) == replicas
        assert not world.jobs()
        assert len(world.of("Job", names.TRAINER)) <= 1
        assert len(world.of("Job", names.EVALUATOR)) <= 1
        finished = [teacher_of(job) for job in world.of("Job", names.TEACH)]
        assert len(finished) == len(set(finished))
        known = {row["name"]: row.get("digest") for row in status.get("teaching", [])}
        trained = [each["name"] for each in self.spec["teachers"] if "training" in each]
        assert known == {name: adapter(name) for name in trained}
        kept = {job["metadata"]["name"] for job in world.of("Job")}
        assert {pod["parent"] for pod in world.of("Pod")} <= kept | {serving["metadata"]["name"]}
        mounted = {
            volume["configMap"]["name"]
            for job in world.of("Job")
            for volume in job["spec"]["template"]["spec"]["volumes"]
            if "configMap" in volume
        }
        assert {child["metadata"]["name"] for child in world.of("ConfigMap")} <= mounted
        assert "leaving" not in status["endpoint"]
        left = {"queued", "evicted", "failed"} & status["run"].keys()
        assert not left, left
        self.do(lambda: world.edit(**{**self.spec, "suspend": True, "endpoint__suspend": True}))
        assert not world.children, "everything goes"

    def run(self, events: int) -> None:
        lived(self, events)

    # -------------------------------------------------------------------------------------------- what may happen

    def job(self, role: str) -> dict[str, Any] | None:
        return next(iter(self.world.jobs(role)), None)

    def working(self, role: str) -> bool:
        """Whether a Job of the role has all its pods."""
        job = self.job(role)
        name = job["metadata"]["name"] if job else ""
        pods = [pod for pod in self.world.active() if pod["parent"] == name]
        return bool(job) and bool(pods) and not any("deletionTimestamp" in pod["metadata"] for pod in pods)

    def startable(self, role: str) -> bool:
        job = self.job(role)
        return job is not None and not job["spec"].get("suspend")

    def pupil(self, role: str) -> str:
        """The teacher whose training `job` finds."""
        job = self.job(role)
        return teacher_of(job) if job else ""

    def role(self) -> str:
        return self.random.choice(_JOBS)


def teacher_of(job: dict[str, Any]) -> str:
    """The teacher that a Job trains, if any."""
    return str(job["metadata"]["labels"].get(names.TEACHER, ""))


# Each says whether it may happen, and makes it happen if `now`.
Happening = Callable[[Fate, bool], bool]


def teachers_answer(fate: Fate, now: bool) -> bool:
    if now:
        fate.world.up(names.TEACHERS)
    return bool(fate.world.of("Deployment", names.TEACHERS))


def teachers_refuse(fate: Fate, now: bool) -> bool:
    found = fate.world.of("Deployment", names.TEACHERS)
    if now:
        before = {"exitCode": 2, "reason": "Error", "message": '{"exitCode": 2, "message": "no such adapter"}'}
        name = f"{found[0]['metadata']['name']}-0"
        fate.world.pod(found[0], name, "Running", waiting={"reason": "CrashLoopBackOff"}, before=before, restarts=1)
    return bool(found) and fate.random.random() < 0.2


def endpoint_answers(fate: Fate, now: bool) -> bool:
    if now:
        fate.world.up(names.ENDPOINT)
    return bool(fate.world.of("Deployment", names.ENDPOINT))


def teacher_is_trained_on(fate: Fate, now: bool) -> bool:
    if now:
        teacher, round_ = fate.pupil(names.TEACH), fate.random.randint(0, 100)
        said = {"round": round_, "totalRounds": 100, "percentage": round_, "checkpoint": {"round": round_ // 2}}
        fate.world.progress_of = {teacher: said}
        fate.world.run(names.TEACH, teacher)
    return fate.startable(names.TEACH)


def teacher_is_trained(fate: Fate, now: bool) -> bool:
    if now:
        teacher = fate.pupil(names.TEACH)
        fate.world.finish(names.TEACH, teacher, digest=adapter(teacher))
    return fate.startable(names.TEACH) and fate.working(names.TEACH)


def teachers_training_fails(fate: Fate, now: bool) -> bool:
    if now:
        code, gone = fate.random.choice(CODES), fate.random.random() < 0.3
        fate.world.fail(names.TEACH, code, gone=gone, teacher=fate.pupil(names.TEACH))
    return fate.startable(names.TEACH) and fate.working(names.TEACH)


def teachers_training_says_nothing(fate: Fate, now: bool) -> bool:
    if now:
        fate.world.finish(names.TEACH, fate.pupil(names.TEACH))
    return fate.startable(names.TEACH) and fate.working(names.TEACH)


def trainer_runs(fate: Fate, now: bool) -> bool:
    if now:
        fate.world.run()
    return fate.startable(names.TRAINER)


def trainer_ends_well(fate: Fate, now: bool) -> bool:
    if now:
        fate.world.finish(names.TRAINER, digest=fate.digest())
    return fate.startable(names.TRAINER) and fate.working(names.TRAINER)


def trainer_says_nothing(fate: Fate, now: bool) -> bool:
    if now:
        fate.world.finish(names.TRAINER)
    return fate.startable(names.TRAINER) and fate.working(names.TRAINER)


def trainer_fails(fate: Fate, now: bool) -> bool:
    if now:
        code = fate.random.choice(CODES)
        reason = "OOMKilled" if code == 137 else "Error"
        fate.world.fail(names.TRAINER, code, reason, gone=fate.random.random() < 0.3)
    return fate.startable(names.TRAINER) and fate.working(names.TRAINER)


def trainer_loses_its_node(fate: Fate, now: bool) -> bool:
    if now:
        fate.world.disrupt(names.TRAINER)
        if fate.job(names.TRAINER):
            fate.world.fail(names.TRAINER, 0, gone=True)
    return fate.startable(names.TRAINER) and fate.working(names.TRAINER)


def evaluator_runs(fate: Fate, now: bool) -> bool:
    if now:
        fate.world.run(names.EVALUATOR)
    return fate.startable(names.EVALUATOR)


def evaluator_ends_well(fate: Fate, now: bool) -> bool:
    if now:
        passed = fate.random.random() < 0.7
        fate.world.finish(names.EVALUATOR, digest=fate.digest(), gatePassed=passed, scores=[])
    return fate.startable(names.EVALUATOR)


def evaluator_fails(fate: Fate, now: bool) -> bool:
    if now:
        fate.world.fail(names.EVALUATOR, fate.random.choice(CODES))
    return fate.startable(names.EVALUATOR)


def queue_admits(fate: Fate, now: bool) -> bool:
    waiting = [role for role in _JOBS if (j := fate.job(role)) and j["spec"].get("suspend")]
    if now:
        fate.world.admit(waiting[0], fate.pupil(waiting[0]))
    return bool(waiting)


def queue_preempts(fate: Fate, now: bool) -> bool:
    role = fate.role()
    able = [each for each in _JOBS if fate.startable(each)]
    if now:
        chosen = role if role in able else able[0]
        fate.world.suspend_job(chosen, fate.pupil(chosen))
    return bool(able)


def pods_leave(fate: Fate, now: bool) -> bool:
    if now:
        fate.world.leave()
    return any("deletionTimestamp" in pod["metadata"] for pod in fate.world.of("Pod"))


def something_is_deleted_by_hand(fate: Fate, now: bool) -> bool:
    found = sorted(key for key in fate.world.children if key[0] != "Pod")
    if now and found:
        fate.world.remove(*fate.random.choice(found))
    return bool(found)


def canary_fails(fate: Fate, now: bool) -> bool:
    if now:
        fate.world.requests = Requests(failed=50, total=100)
        fate.world.settle()
        fate.world.requests = Requests(failed=0, total=0)
        fate.world.settle()
    return "canary" in fate.world.status.get("endpoint", {})


def figures_come_and_go(fate: Fate, now: bool) -> bool:
    if now:
        fate.world.requests = Requests(failed=0, total=9) if fate.world.requests is None else None
        fate.world.settle()
    return True


def time_passes(fate: Fate, now: bool) -> bool:
    if now:
        fate.world.wait(fate.random.choice([7, 61, 400, 1801, 20_000]))
    return True


def spec_is_edited(fate: Fate, now: bool) -> bool:
    if now:
        key, values = fate.random.choice(_EDITS)
        fate.spec[key] = fate.random.choice(values)
        fate.world.edit(**fate.spec)
    return True


_EDITS: list[tuple[str, list[Any]]] = [
    ("training__seed", [42, 7, 8]),
    ("training__pod", [{}, {"nodeSelector": {"disk": "ssd"}}]),
    ("teacherServing", [{"placement": "Shared"}, {"placement": "Shared", "pod": {"image": "teacher:2"}}]),
    ("evaluation__seed", [1, 2]),
    ("endpoint__replicas", [1, 2, 3]),
    ("endpoint__maxQueuedImages", [5, 6]),
    ("teachers", [teachers(), teachers("ocr"), teachers("geneval", "ocr")]),
    ("suspend", [True, False, False]),
    ("endpoint__suspend", [True, False, False]),
]
_WORK: tuple[Happening, ...] = (
    teacher_is_trained_on, teacher_is_trained, teachers_answer, trainer_runs, trainer_ends_well, evaluator_runs, evaluator_ends_well, endpoint_answers,
    queue_admits, pods_leave,
)  # fmt: skip
_FAULTS: tuple[Happening, ...] = (
    teachers_training_fails, teachers_training_says_nothing, teachers_refuse, trainer_says_nothing, trainer_fails, trainer_loses_its_node, evaluator_fails, queue_preempts,
    something_is_deleted_by_hand, canary_fails, figures_come_and_go,
)  # fmt: skip
_OTHERS: tuple[Happening, ...] = (time_passes, spec_is_edited)
