"""How a run ends: stopping, the verdict, the aggregated conditions, the events. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opd_core.api.types import CleanPodPolicy
from opd_core.stages import Condition, Reason, Stage

from opd_operator import names
from opd_operator.draft import TRAINER_READY, Draft, timestamp

TRAINING = (names.TEACH, names.TEACHERS, names.TRAINER, names.EVALUATOR)


@dataclass(frozen=True)
class Event:
    type: str
    reason: str
    condition: str
    message: str


def late(d: Draft, since: str | None, stage: Stage, field: str, role: str, teacher: str = "") -> bool:
    """Whether a limit of runPolicy, counted from `since`, is over, which ends the run; `role`, `teacher`: whose trouble
    explains it."""
    limits = d.spec.run_policy.model_dump(by_alias=True)
    limit = limits["stageDeadlines"][field.split(".")[1]] if "." in field else limits[field]
    if not d.late(since, limit):
        return False
    why = d.observed.trouble(role, teacher)
    message = f"took longer than spec.runPolicy.{field} = {limit} s" + (f"; {why[0].value}: {why[1]}" if why else "")
    d.stop(Reason.DEADLINE_EXCEEDED, message, stage)
    return True


def stop(d: Draft) -> None:
    """Pods first, the verdict after: what is called failed holds nothing (kubeflow/trainer#3994)."""
    d.wanted.teachers, d.wanted.trainer, d.wanted.evaluator = False, None, None
    d.wanted.teach.clear()
    running = [pod.name for pod in d.observed.active(*TRAINING)]
    servers = [view.name for view in d.observed.deployments.values() if view.role == names.TEACHERS]
    jobs = [job.name for job in d.observed.jobs.values() if not job.finished]
    if "stopping" in d.status and not (running or servers or jobs):
        d.run["failed"] = d.status.pop("stopping")
    verdict = d.run.get("failed") or d.status["stopping"]
    stage, reason = Stage(verdict["stage"]), Reason(verdict["reason"])
    before = True
    for each in Stage:
        if each == stage:
            before = False
            d.mark(each, False, reason, verdict["message"])
        elif each != Stage.DEPLOYED:
            d.mark(each, before, Reason.COMPLETED if before else Reason.WAITING)
    if "failed" in d.run:
        d.mark(Condition.FAILED, True, reason, verdict["message"])
    else:
        d.mark(Condition.FAILED, False, Reason.STOPPING, f"{verdict['message']}; {len(running)} pods are still ending")


def keep_finished(d: Draft) -> None:
    """Of trainer, evaluator and every teacher's training the last Job that has ended stays for its log; it holds
    nothing."""
    if d.spec.run_policy.clean_pod_policy == CleanPodPolicy.ALL:
        return
    teachers = [(names.TEACH, row["name"]) for row in d.status.get("teaching", [])]
    for work in ((names.TRAINER, ""), (names.EVALUATOR, ""), *teachers):
        finished = [job for job in d.observed.jobs_of(*work) if job.finished]
        if finished:
            d.wanted.keep.add(("Job", max(finished, key=lambda job: (job.created, job.name)).name))


def conclude(d: Draft) -> None:
    """Failed and Ready from what the stages said, and the word for people."""
    for kind in Condition:
        if kind not in d.marks and kind not in (Condition.FAILED, Condition.STALLED, Condition.READY):
            d.mark(kind, False, Reason.WAITING)
    d.marks.setdefault(Condition.FAILED, ("False", Reason.NOT_FAILED, ""))
    # `kubectl wait --for=condition=Ready` ends when all is done; each stage says what is missing until then.
    wanted = [Stage.EVALUATED] + ([Stage.DEPLOYED] if d.spec.endpoint.enabled else [])
    pinned = d.spec.endpoint.enabled and d.spec.endpoint.student_digest
    if pinned and d.holds(Condition.DEPLOYED) and "stopping" not in d.status:
        wanted = [Stage.DEPLOYED]  # asked for by name: served whatever became of the run
        if d.run.get("failed", {}).get("reason") == Reason.GATE_MISSED.value:
            d.mark(Condition.FAILED, False, Reason.NOT_FAILED, "promoted by spec.endpoint.studentDigest")
    missing = [stage for stage in wanted if not d.holds(stage)]
    failed = d.marks[Condition.FAILED]
    if failed[0] == "True":
        d.mark(Condition.READY, False, failed[1], failed[2])
    elif d.spec.suspend:
        d.mark(Condition.READY, False, Reason.SUSPENDED)
    elif missing:
        first = next(stage for stage in Stage if not d.holds(stage))
        _, reason, message = d.marks[Condition(first.value)]
        d.mark(Condition.READY, False, reason, f"{first.value}: {message}")
    else:
        d.mark(Condition.READY, True, Reason.COMPLETED)
    d.mark(Condition.STALLED, failed[0] == "True", failed[1], failed[2])
    d.status["phase"] = _phase(d)
    # The work is done although the pods that served it are put away.
    put_away = d.spec.endpoint.suspend and not d.spec.suspend and d.holds(Condition.EVALUATED)
    if d.holds(Condition.FAILED) or d.holds(Condition.READY) or put_away:
        d.status.setdefault("completionTime", timestamp(d.now))
    else:
        d.status.pop("completionTime", None)


def expired(d: Draft) -> bool:
    """Whether the object's time after its end is over; what serves, or holds a place for what serves, has none."""
    ttl, endpoint = d.spec.run_policy.ttl_seconds_after_finished, d.spec.endpoint
    over = d.holds(Condition.FAILED) or not endpoint.enabled or endpoint.suspend
    if ttl is None or not over or d.wanted.served or "completionTime" not in d.status:
        return False
    return d.late(d.status["completionTime"], ttl)


def _phase(d: Draft) -> str:
    """For people only; nothing reads it back."""
    if d.holds(Condition.FAILED):
        return "Failed"
    if d.spec.suspend:
        return "Suspended" if d.holds(Condition.SUSPENDED) else "Suspending"
    if "stopping" in d.status:
        return "Stopping"
    if d.holds(Condition.READY):
        return "Ready"
    if not d.holds(Stage.TEACHERS_TRAINED):
        return "TrainingTeachers"
    if not d.holds(Stage.TRAINED):
        return "Training" if d.completed(TRAINER_READY) else "Starting"
    return "Deploying" if d.holds(Stage.EVALUATED) else "Evaluating"


_WARNINGS = {
    Reason.FAILED, Reason.DEADLINE_EXCEEDED, Reason.GATE_MISSED, Reason.INVALID, Reason.UNSCHEDULABLE, Reason.CRASHING,
    Reason.IMAGE_PULL_FAILED, Reason.OUT_OF_MEMORY, Reason.DISRUPTED, Reason.BACKOFF_LIMIT_EXCEEDED, Reason.USER_ERROR,
    Reason.REJECTED, Reason.ROLLED_BACK, Reason.RESTARTING, Reason.UNAVAILABLE, Reason.UNKNOWN_STUDENT,
    Reason.NOT_ROUTED, Reason.NO_FIGURES,
}  # fmt: skip
_SILENT = {Reason.WAITING, Reason.ACCEPTED, Reason.ACTIVE, Reason.NOT_FAILED}


def events(old: Mapping[str, Any], conditions: list[dict[str, Any]]) -> tuple[Event, ...]:
    """One event per condition that turned to another reason; Ready and Stalled only repeat what others say."""
    before = {c["type"]: (c["status"], c["reason"]) for c in old.get("conditions", [])}
    return tuple(
        Event("Warning" if c["reason"] in _WARNINGS else "Normal", c["reason"], c["type"], c["message"])
        for c in conditions
        if before.get(c["type"]) != (c["status"], c["reason"])
        and c["reason"] not in _SILENT
        and c["type"] != Condition.STALLED.value
        and (c["type"] != Condition.READY.value or c["status"] == "True")
    )
