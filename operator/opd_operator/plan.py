"""The stages of a distillation: what is so, and therefore what shall be. Pure: dicts in, dicts out, clock passed in.

Everything that must survive a crash is in the status, and the status is written before the children: after a crash at
any point, the next look comes to the same decision again. No decision waits for an event that it causes itself: what a
look decides, its `Wanted` already has.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opd_core.api.digests import weights_digest
from opd_core.api.load import SpecError, check_spec
from opd_core.api.types import OPDDistillation
from opd_core.stages import Condition, Reason, Stage

from opd_operator import names
from opd_operator.draft import TRAINER_READY, Draft, Wanted, draft, timestamp
from opd_operator.evaluation import KEY_LENGTH, evaluate, evaluation_key
from opd_operator.observe import Observed
from opd_operator.outcome import Event, conclude, deadline, events, keep_finished, stop
from opd_operator.rollout import serve
from opd_operator.training import train
from opd_operator.words import printable

# Of a run; the next one has its own.
_OF_A_RUN = ("student", "stopping", "lastFailure", "completionTime", "stageTimes", "progress", "checkpoint")


@dataclass(frozen=True)
class Plan:
    """What to write, in this order: the status, then the workloads. `wake`: when to look again without an event."""

    status: dict[str, Any]
    distillation: OPDDistillation | None = None
    wanted: Wanted | None = None  # None: leave the children as they are
    events: tuple[Event, ...] = ()
    wake: float | None = None
    delete: bool = False


def advance(obj: Mapping[str, Any], observed: Observed, images: Mapping[str, str], now: float) -> Plan:
    """The next status of `obj` and the workloads that belong to it.

    Args:
        obj: an OPDDistillation as the API server has it.
        images: of the roles, for a run or revision that begins now; those that run keep theirs.
        now: seconds since 1970.
    """
    try:
        distillation = check_spec({key: obj[key] for key in ("apiVersion", "kind", "metadata", "spec")})
    except SpecError as error:
        return _refuse(obj, now, error)
    d = draft(obj, distillation, observed, images, now)
    d.mark(Condition.ACCEPTED, True, Reason.ACCEPTED, "the spec is valid")
    _same_run(d)
    if d.spec.suspend:
        _suspend(d)
    else:
        d.mark(Condition.SUSPENDED, False, Reason.ACTIVE)
        _resume(d)
        _play(d)
        keep_finished(d)
        serve(d)
    conclude(d)
    conditions = d.conditions()
    d.status.update(observedGeneration=d.generation, conditions=conditions)
    said = events(obj.get("status") or {}, conditions)
    ttl = d.spec.run_policy.ttl_seconds_after_finished
    delete = ttl is not None and "completionTime" in d.status and d.late(d.status["completionTime"], ttl)
    return Plan(d.status, distillation, d.wanted, said, min(d.wake, default=None), delete)


def _same_run(d: Draft) -> None:
    """A change of what the weights depend on begins a new run; a student that serves goes on serving."""
    key = weights_digest(d.distillation)[:KEY_LENGTH]
    run = d.status.get("run")
    if run and run["key"] == key:
        return
    for part in _OF_A_RUN:
        d.status.pop(part, None)
    d.status.update(
        run={"key": key, "attempt": run["attempt"] + 1 if run else 1, "images": dict(d.images)},
        startTime=timestamp(d.now),
        restarts=0,
        disruptions=0,
    )
    known = next((student for student in d.status.get("students", []) if student["key"] == key), None)
    if known:
        d.status["student"] = {name: known[name] for name in ("digest", "key", "uri")}


def _suspend(d: Draft) -> None:
    """Free everything. The next resume starts with a clean slate of retries, at the last checkpoint."""
    for part in ("stopping", "workers", "workersReady", "teachers", "teachersReady"):
        d.status.pop(part, None)
    d.run.pop("failed", None)
    d.run["suspended"] = True
    for role in (names.TRAINER, names.EVALUATOR):
        d.starts(role).update(failures=0)
        d.starts(role).pop("nextStart", None)
    for stage in list(d.times):
        if stage in (Stage.TEACHERS_READY, TRAINER_READY) or not d.completed(stage):
            del d.times[stage]
    if endpoint := d.status.get("endpoint"):
        for part in ("canary", "rejected"):
            endpoint.pop(part, None)
        if "deployed" not in endpoint.get("stable", {}):
            endpoint.pop("stable", None)  # its time to come up begins anew
        endpoint.update(replicas=0, readyReplicas=0)
    pods = [pod for pod in d.observed.pods if pod.active]
    # A trainer that was told to stop finishes its round, and asks about it.
    there = any(view.role == names.TEACHERS for view in d.observed.deployments.values())
    d.wanted.teachers = there and bool(d.observed.active(names.TRAINER))
    if pods or d.observed.jobs or d.observed.deployments:
        d.mark(Condition.SUSPENDED, False, Reason.STOPPING, f"{len(pods)} pods are still ending")
    else:
        d.mark(Condition.SUSPENDED, True, Reason.SUSPENDED, "everything is freed; suspend: false goes on")
    trained = "student" in d.status
    for stage_ in Stage:
        done = trained and stage_ in (Stage.TEACHERS_READY, Stage.TRAINED)
        d.mark(stage_, done, Reason.UP_TO_DATE if done else Reason.SUSPENDED)
    d.mark(Condition.SERVING, False, Reason.SUSPENDED)


def _resume(d: Draft) -> None:
    if d.run.pop("suspended", False):
        for role in (names.TRAINER, names.EVALUATOR):
            d.starts(role)["number"] += 1
        d.status.update(restarts=0, startTime=timestamp(d.now))


def _play(d: Draft) -> None:
    """The stages, in their order, as far as they go today."""
    verdict = d.run.get("failed") or d.status.get("stopping")
    student = d.status.get("student")
    if verdict and student and verdict.get("evaluation", "") not in ("", evaluation_key(d, student["digest"])):
        d.run.pop("failed", None)  # another gate, or other prompts: judged again
        d.status.pop("stopping", None)
        verdict = None
    if verdict is None:
        trained = train(d)
        evaluated = trained and evaluate(d)
        if not evaluated and "stopping" not in d.status:
            limit = d.spec.run_policy.active_deadline_seconds
            if d.late(d.status["startTime"], limit):
                stage, role = (Stage.EVALUATED, names.EVALUATOR) if trained else (Stage.TRAINED, names.TRAINER)
                deadline(d, stage, "activeDeadlineSeconds", role)
    if "failed" in d.run or "stopping" in d.status:
        stop(d)


def _refuse(obj: Mapping[str, Any], now: float, error: SpecError) -> Plan:
    """A spec that the API server let through and this version cannot run: nothing is touched."""
    old = dict(obj.get("status") or {})
    message = printable("; ".join(str(problem) for problem in error.problems))[:1024]
    before = {condition["type"]: condition for condition in old.get("conditions", [])}
    conditions = []
    for kind in Condition:
        known = before.get(kind.value, {"type": kind.value, "status": "False", "reason": Reason.WAITING.value})
        changed = {"message": "", "lastTransitionTime": timestamp(now), **known}
        if kind in (Condition.ACCEPTED, Condition.READY):
            since = changed["lastTransitionTime"] if known["status"] == "False" else timestamp(now)
            refused = {"status": "False", "reason": Reason.INVALID.value, "message": message}
            changed = {**changed, **refused, "lastTransitionTime": since}
        conditions.append({**changed, "observedGeneration": obj["metadata"]["generation"]})
    status = {**old, "phase": "Invalid", "observedGeneration": obj["metadata"]["generation"], "conditions": conditions}
    return Plan(status, events=events(old, conditions))
