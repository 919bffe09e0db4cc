"""The stages of a distillation: what is so, and therefore what shall be. Pure: dicts in, dicts out, clock passed in.

Everything that must survive a crash is in the status, and the status is written before the children: after a crash at
any point, the next look comes to the same decision again. No decision waits for an event that it causes itself: what a
look decides, its `Wanted` already has.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from opd_core.api.digests import weights_digest
from opd_core.api.load import SpecError, check_spec
from opd_core.api.types import OPDDistillation
from opd_core.stages import Condition, Reason, Stage

from opd_operator import claims, names
from opd_operator.draft import TRAINER_READY, Draft, Wanted, draft, timestamp
from opd_operator.evaluation import KEY_LENGTH, evaluate, evaluation_key
from opd_operator.jobs import advance_number
from opd_operator.observe import Observed
from opd_operator.outcome import TRAINING, Event, conclude, events, expired, keep_finished, late, stop
from opd_operator.rollout import serve
from opd_operator.teaching import remember, teach, there
from opd_operator.training import have_teachers, train
from opd_operator.words import printable

# Of a run; the next one has its own.
_OF_A_RUN = ("student", "stopping", "lastFailure", "completionTime", "stageTimes", "progress", "checkpoint")


@dataclass(frozen=True)
class Row:
    """A stage of a run: whose pods do its work, its limit in runPolicy.stageDeadlines, and whether it is `done`, which
    wants what is missing for it."""

    stage: Stage
    role: str
    limit: str
    done: Callable[[Draft], bool]


# In this order: none begins before the one above it is done. What serves, does so whatever becomes of a run: `rollout`.
STAGES = (
    Row(Stage.TEACHERS_TRAINED, names.TEACH, "teachersTrained", teach),
    Row(Stage.TEACHERS_READY, names.TEACHERS, "teachersReady", have_teachers),
    Row(Stage.TRAINED, names.TRAINER, "trained", train),
    Row(Stage.EVALUATED, names.EVALUATOR, "evaluated", evaluate),
)


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
    _same_run(d)
    remember(d)
    _see_claims(d)
    _see_begun(d)
    if d.spec.suspend:
        _suspend(d)
    else:
        d.mark(Condition.SUSPENDED, False, Reason.ACTIVE)
        _resume(d)
        _play(d)
        keep_finished(d)
    there(d)
    serve(d)
    conclude(d)
    conditions = d.conditions()
    d.status.update(observedGeneration=d.generation, conditions=conditions)
    said = events(obj.get("status") or {}, conditions)
    delete = expired(d)
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


def _see_claims(d: Draft) -> None:
    """Before anything is made: what cannot be written, or used by several pods, is told now, not after hours."""
    said = "the spec is valid"
    if known := d.observed.claims:
        why = claims.problem(d.spec, known)
        begun = "student" in d.status or not d.times.keys().isdisjoint((Stage.TEACHERS_TRAINED, Stage.TEACHERS_READY))
        if why and not (begun or d.run.get("failed") or "stopping" in d.status):
            d.stop(Reason.USER_ERROR, why, Stage.TEACHERS_TRAINED if "teaching" in d.status else Stage.TEACHERS_READY)
        if narrow := claims.of_one_node(d.spec, known):
            said += f"; pods run on one node only, since ReadWriteOnce is all that {', '.join(narrow)} has; "
            said += "ReadWriteMany lets them spread"
    else:  # they were looked at before
        same = (c for c in d.status.get("conditions", []) if c["observedGeneration"] == d.generation)
        said = next((c["message"] for c in same if c["type"] == Condition.ACCEPTED and c["status"] == "True"), said)
    d.mark(Condition.ACCEPTED, True, Reason.ACCEPTED, said)


def _see_begun(d: Draft) -> None:
    """From the first student, or the first trainer that runs, on there is something that belongs to the base and lies
    in the output; the API server then refuses to change them."""
    training = (pod for role in (names.TEACH, names.TRAINER) for pod in d.observed.pods_of(role))
    ran = any(pod.phase != "Pending" for pod in training)
    if ran or "student" in d.status or d.status.get("students"):
        d.status["begun"] = True


def _suspend(d: Draft) -> None:
    """Free what trains and evaluates. The next resume starts with a clean slate of retries, at the last checkpoint."""
    for part in ("stopping", "workers", "workersReady", "teachers", "teachersReady"):
        d.status.pop(part, None)
    for part in ("failed", "queued", "evicted"):
        d.run.pop(part, None)
    d.run["suspended"] = True
    for starts in _all_starts(d):
        starts.update(failures=0)
        starts.pop("nextStart", None)
    for stage in list(d.times):
        if stage in (Stage.TEACHERS_READY, TRAINER_READY) or (stage != Stage.DEPLOYED and not d.completed(stage)):
            del d.times[stage]
    pods = d.observed.active(*TRAINING)
    # A trainer that was told to stop finishes its round, and asks about it.
    there = any(view.role == names.TEACHERS for view in d.observed.deployments.values())
    d.wanted.teachers = there and bool(d.observed.active(names.TRAINER))
    if pods or d.observed.jobs or there:
        d.mark(Condition.SUSPENDED, False, Reason.STOPPING, f"{len(pods)} pods are still ending")
    else:
        d.mark(Condition.SUSPENDED, True, Reason.SUSPENDED, "the run holds nothing; suspend: false goes on")
    student = d.status.get("student", {})
    judged = bool(student) and student.get("evaluation") == evaluation_key(d, student["digest"])
    for stage_, done in (
        (Stage.TEACHERS_TRAINED, bool(student)),
        (Stage.TEACHERS_READY, bool(student)),
        (Stage.TRAINED, bool(student)),
        (Stage.EVALUATED, judged and student["gatePassed"]),
    ):
        d.mark(stage_, done, Reason.UP_TO_DATE if done else Reason.SUSPENDED)


def _resume(d: Draft) -> None:
    if d.run.pop("suspended", False):
        for starts in _all_starts(d):
            advance_number(starts)
        d.status.update(restarts=0, startTime=timestamp(d.now))


def _all_starts(d: Draft) -> list[dict[str, Any]]:
    return [d.starts(names.TRAINER), d.starts(names.EVALUATOR), *d.run.get(names.TEACH, {}).values()]


def _play(d: Draft) -> None:
    """The stages, in their order, as far as they go today."""
    verdict = d.run.get("failed") or d.status.get("stopping")
    student = d.status.get("student")
    if verdict and student and verdict.get("evaluation", "") not in ("", evaluation_key(d, student["digest"])):
        d.run.pop("failed", None)  # another gate, or other prompts: judged again
        d.status.pop("stopping", None)
        verdict = None
    if verdict is None:
        at = next((row for row in STAGES if not row.done(d)), None)
        if not d.in_queue and d.run.pop("queued", None):
            d.run.pop("evicted", None)
            d.status["startTime"] = timestamp(d.now)  # admitted
        if at and not d.in_queue and "stopping" not in d.status:
            _see_limits(d, at)
    if "failed" in d.run or "stopping" in d.status:
        stop(d)


def _see_limits(d: Draft, at: Row) -> None:
    """Of each stage that has begun, and of the whole run, which is `at` a stage."""
    for row in STAGES:
        since = None if d.completed(row.stage) else d.times.get(row.stage, {}).get("startTime")
        if late(d, since, row.stage, f"stageDeadlines.{row.limit}", row.role):
            return
    late(d, d.status["startTime"], at.stage, "activeDeadlineSeconds", at.role)


def _refuse(obj: Mapping[str, Any], now: float, error: SpecError) -> Plan:
    """A spec that the API server let through and this version cannot run: nothing is touched."""
    old = dict(obj.get("status") or {})
    message = printable("; ".join(str(problem) for problem in error.problems))[:1024]
    before = {condition["type"]: condition for condition in old.get("conditions", [])}
    conditions = []
    stopped = {
        Condition.ACCEPTED: {"status": "False", "reason": Reason.INVALID.value, "message": message},
        Condition.READY: {"status": "False", "reason": Reason.INVALID.value, "message": message},
        Condition.STALLED: {"status": "True", "reason": Reason.INVALID.value, "message": message},
    }
    for kind in Condition:
        known = before.get(kind.value, {"type": kind.value, "status": "False", "reason": Reason.WAITING.value})
        changed = {"message": "", "lastTransitionTime": timestamp(now), **known}
        if said := stopped.get(kind):
            since = changed["lastTransitionTime"] if known["status"] == said["status"] else timestamp(now)
            changed = {**changed, **said, "lastTransitionTime": since}
        conditions.append({**changed, "observedGeneration": obj["metadata"]["generation"]})
    status = {**old, "phase": "Invalid", "observedGeneration": obj["metadata"]["generation"], "conditions": conditions}
    return Plan(status, events=events(old, conditions))
