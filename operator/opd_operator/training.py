"""The stages TeachersReady and Trained: servers first, then the trainer's Jobs until there is a student. Pure."""

import functools

from opd_core import roles
from opd_core.exit_codes import ExitCode
from opd_core.stages import Reason, Stage

from opd_operator import names
from opd_operator.context import teachers_revision
from opd_operator.draft import TRAINER_READY, Draft, timestamp
from opd_operator.jobs import (
    Work,
    ask_again,
    ended,
    in_queue,
    no_pods,
    outdated,
    pauses,
    pods_of,
    result,
    start,
    taken_out,
)
from opd_operator.observe import JobView
from opd_operator.outcome import late

FIRST_ROUND = "FirstRound"  # a time that is kept beside those of the stages: how long nothing was learnt
LIVE = ("teachers", "teachersReady", "workers", "workersReady")  # status of what exists only while training goes on


def have_teachers(d: Draft) -> bool:
    """Whether there are teachers for the trainer. They live exactly as long as the training works or is about to, and
    one that is at work waits for teachers that come back."""
    if "student" in d.status:
        return True
    work = _work(d)
    job = d.observed.jobs.get(work.name(d.starts(names.TRAINER)["number"]))
    stays = job and not job.succeeded and (work.begun or not outdated(d, work))
    if job and stays and in_queue(d, work, job):
        _wait_in_queue(d, job)
        return False
    ready = _teachers(d)
    if "stopping" in d.status:
        return False
    if ready or job:
        return True
    if not pauses(d, work):
        d.mark(Stage.TRAINED, False, Reason.WAITING, "for the teachers")
    return False


def train(d: Draft) -> bool:
    """Whether there is a student."""
    if "student" not in d.status:
        d.begin(Stage.TRAINED)
        _trainer(d)
        if "student" not in d.status:
            return False
        d.wanted.teachers, d.wanted.trainer = False, None
    d.mark(Stage.TEACHERS_READY, True, Reason.FREED, "training is done")
    d.mark(Stage.TRAINED, True, Reason.COMPLETED, f"student {d.status['student']['digest'][:19]}")
    for part in LIVE:
        d.status.pop(part, None)
    return True


def _wait_in_queue(d: Draft, job: JobView) -> None:
    """The trainer holds nothing. Teachers that answer wait for it up to trainerReady, those of a trainer that was taken
    out of work no longer than it asks them: they would hold what their own trainer waits for."""
    d.wait_in_queue()
    if d.completed(TRAINER_READY):
        d.run["evicted"] = True
        taken_out(d, _work(d))
    for stage in (TRAINER_READY, Stage.TRAINED):
        d.times.pop(stage, None)
    d.wanted.trainer = d.starts(names.TRAINER)["number"]
    _workers(d, job)
    limit = d.spec.run_policy.stage_deadlines.trainer_ready
    if any(pod.active for pod in pods_of(d, job)) or not ("evicted" in d.run or d.late(d.run["queued"], limit)):
        _teachers(d)
        return
    for part in ("teachers", "teachersReady"):
        d.status.pop(part, None)
    d.times.pop(Stage.TEACHERS_READY, None)
    d.mark(Stage.TEACHERS_READY, False, Reason.QUEUED, f"freed until Job {job.name} is admitted by {d.queue}")


def _teachers(d: Draft) -> bool:
    """Whether all servers answer, as the spec wants them now."""
    servers = [names.teachers(d.name, i) for i in range(len(roles.teacher_servers(d.spec)))]
    d.wanted.teachers = True
    revision = teachers_revision(d.distillation, d.run["images"][names.TEACHERS])
    views = [d.observed.deployments.get(server) for server in servers]
    # A Deployment that is not applied yet is available with the pods of the spec before.
    ready = [bool(view and view.available and view.revision == revision) for view in views]
    d.status["teachers"] = [{"name": server, "ready": up} for server, up in zip(servers, ready, strict=True)]
    d.status["teachersReady"] = f"{sum(ready)}/{len(ready)}"
    if all(ready):
        d.complete(Stage.TEACHERS_READY)
        done = (Reason.COMPLETED, f"{len(ready)} of {len(ready)} servers answer")
        inside = (Reason.DISABLED, roles.no_servers(d.spec))
        d.mark(Stage.TEACHERS_READY, True, *(done if servers else inside))
        return True
    if d.completed(Stage.TEACHERS_READY) and not d.observed.active(names.TRAINER):
        del d.times[Stage.TEACHERS_READY]  # nobody has them yet: their time begins anew
    again = d.completed(Stage.TEACHERS_READY)
    if any(pod.queued for pod in d.observed.pods_of(names.TEACHERS)) and not d.completed(Stage.TEACHERS_READY):
        d.times.pop(Stage.TEACHERS_READY, None)
        d.wait_in_queue()
    else:
        d.begin(Stage.TEACHERS_READY)
    if refusal := _refusal(d):
        d.stop(Reason.USER_ERROR, refusal, Stage.TEACHERS_READY)
        for row in d.status.get("teaching", []):
            row.pop("digest", None)  # one that is trained may be gone: the next start looks again
        return False
    reason, message = d.observed.trouble(names.TEACHERS) or (Reason.RESTARTING if again else Reason.STARTING, "")
    if reason == Reason.QUEUED:
        message += f" by {d.queue}"
    text = f"{sum(ready)} of {len(ready)} servers answer"
    d.mark(Stage.TEACHERS_READY, False, reason, f"{text}; {message}" if message else text)
    return False


def _refusal(d: Draft) -> str:
    """What a teacher server said when it refused its model or adapters, or its device: no restart changes that."""
    for pod in d.observed.pods_of(names.TEACHERS):
        words = pod.ended or pod.before
        if words and words.facts.exit_code in (ExitCode.INVALID, ExitCode.REFUSED, ExitCode.OUT_OF_MEMORY):
            return f"{pod.name} ended with exit code {words.facts.exit_code}: {words.message}"
    return ""


def _work(d: Draft) -> Work:
    name = functools.partial(names.trainer, d.name, d.run["attempt"])
    reached = min(d.status.get("checkpoint", {}).get("round", 0), d.spec.training.rounds)
    begun = d.completed(TRAINER_READY)
    return Work(names.TRAINER, Stage.TRAINED, d.spec.training.pod, name, begun, reached)


def _trainer(d: Draft) -> None:
    nodes, work = d.spec.training.nodes, _work(d)
    this = start(d, work)
    job = this.job
    d.wanted.trainer = this.number
    _workers(d, job)
    if this.number is None:
        d.times.pop(TRAINER_READY, None)
        return
    d.begin(TRAINER_READY)
    if job is not None and ended(d, job):
        _finish(d, work, job)
    elif job is not None and job.ready >= nodes:
        d.complete(TRAINER_READY)
        _progress(d)
    else:
        trouble = d.observed.trouble(names.TRAINER)
        if d.completed(TRAINER_READY):
            _progress(d)  # a pod that turns unready for a moment is no new start
        else:
            default = Reason.RESUMED if this.number > 0 else Reason.STARTING
            text = no_pods(d, job) or f"{job.ready if job else 0} of {nodes} training pods run"
            d.mark(Stage.TRAINED, False, default, text)
            since = d.times[TRAINER_READY]["startTime"]
            if late(d, since, Stage.TRAINED, "stageDeadlines.trainerReady", names.TRAINER):
                return
        if trouble:
            d.mark(Stage.TRAINED, False, *trouble)


def _workers(d: Draft, job: JobView | None) -> None:
    nodes = d.spec.training.nodes
    ready, succeeded, failed = (job.ready, job.succeeded, job.failed) if job else (0, 0, 0)
    d.status["workers"] = {"desired": nodes, "ready": ready, "succeeded": succeeded, "failed": failed}
    d.status["workersReady"] = f"{ready}/{nodes}"


def _progress(d: Draft) -> None:
    if said := d.observed.progress:
        d.tell_progress(
            {
                "round": said.round,
                "totalRounds": said.total_rounds,
                "percentage": int(said.percentage),
                "remainingSeconds": int(said.remaining_seconds or 0),
            },
            [said],
        )
        if said.round > 0:
            first = {"startTime": d.status["startTime"], "completionTime": timestamp(d.now)}
            d.times.setdefault(FIRST_ROUND, first)
        if said.checkpoint:
            d.status["checkpoint"] = {"round": said.checkpoint.round}
    at = d.status.get("progress")
    # The rounds are in status.progress; here they would change the condition every few seconds.
    d.mark(Stage.TRAINED, False, Reason.RUNNING, f"{at['totalRounds']} rounds" if at else "loading")


def _finish(d: Draft, work: Work, job: JobView) -> None:
    said = result(d, job)
    if said is None:
        ask_again(d, work, job)
        d.wanted.trainer = None
        d.times.pop(TRAINER_READY, None)
        return
    rounds = d.spec.training.rounds
    d.status["student"] = {
        "digest": said.digest,
        "key": d.run["key"],
        "uri": f"{d.spec.student.output.uri.rstrip('/')}.runs/{d.run['key']}/student",
    }
    d.status["checkpoint"] = {"round": rounds}
    d.status["progress"] = {
        **d.status.get("progress", {}),
        "round": rounds,
        "totalRounds": rounds,
        "percentage": 100,
        "remainingSeconds": 0,
        "lastUpdateTime": timestamp(d.now),
    }
    d.complete(Stage.TRAINED)
