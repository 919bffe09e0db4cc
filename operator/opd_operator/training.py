"""The stages TeachersReady and Trained: servers first, then the trainer's Jobs until there is a student. Pure."""

from opd_core import roles
from opd_core.exit_codes import ExitCode
from opd_core.stages import Reason, Stage

from opd_operator import names
from opd_operator.draft import TRAINER_READY, Draft, timestamp
from opd_operator.jobs import ask_again, ended, start
from opd_operator.observe import JobView
from opd_operator.outcome import deadline

FIRST_ROUND = "FirstRound"  # a time that is kept beside those of the stages: how long nothing was learnt
_LIVE = ("teachers", "teachersReady", "workers", "workersReady")  # status of what exists only while training goes on


def train(d: Draft) -> bool:
    """Whether there is a student. The teachers live exactly as long as the training."""
    if student := d.status.get("student"):
        d.mark(Stage.TEACHERS_READY, True, Reason.FREED, "training is done")
        d.mark(Stage.TRAINED, True, Reason.COMPLETED, f"student {student['digest'][:19]}")
        for part in _LIVE:
            d.status.pop(part, None)
        return True
    _teachers(d)
    if "stopping" in d.status:
        return False
    limits = d.spec.run_policy.stage_deadlines
    if not d.completed(Stage.TEACHERS_READY):
        d.mark(Stage.TRAINED, False, Reason.WAITING, "for the teachers")
        if d.late(d.times[Stage.TEACHERS_READY]["startTime"], limits.teachers_ready):
            deadline(d, Stage.TEACHERS_READY, "stageDeadlines.teachersReady", names.TEACHERS)
        return False
    d.begin(Stage.TRAINED)
    _trainer(d)
    if "student" in d.status:
        d.wanted.teachers, d.wanted.trainer = False, None
        return train(d)
    if "stopping" not in d.status and d.late(d.times[Stage.TRAINED]["startTime"], limits.trained):
        deadline(d, Stage.TRAINED, "stageDeadlines.trained", names.TRAINER)
    return False


def _teachers(d: Draft) -> None:
    d.begin(Stage.TEACHERS_READY)
    servers = [names.teachers(d.name, i) for i in range(len(roles.teacher_servers(d.spec)))]
    d.wanted.teachers = True
    views = [d.observed.deployments.get(server) for server in servers]
    ready = [bool(view and view.available) for view in views]
    d.status["teachers"] = [{"name": server, "ready": up} for server, up in zip(servers, ready, strict=True)]
    d.status["teachersReady"] = f"{sum(ready)}/{len(ready)}"
    if not servers:
        d.complete(Stage.TEACHERS_READY)
        d.mark(Stage.TEACHERS_READY, True, Reason.DISABLED, "teachers live inside the trainer")
    elif all(ready):
        d.complete(Stage.TEACHERS_READY)
        d.mark(Stage.TEACHERS_READY, True, Reason.COMPLETED, f"{len(ready)} of {len(ready)} servers answer")
    elif refusal := _refusal(d):
        d.stop(Reason.USER_ERROR, refusal, Stage.TEACHERS_READY)
    else:
        default = Reason.RESTARTING if d.completed(Stage.TEACHERS_READY) else Reason.STARTING
        reason, message = d.observed.trouble(names.TEACHERS) or (default, "")
        text = f"{sum(ready)} of {len(ready)} servers answer"
        d.mark(Stage.TEACHERS_READY, False, reason, f"{text}; {message}" if message else text)


def _refusal(d: Draft) -> str:
    """What a teacher server said when it refused its model or adapters: no restart changes that."""
    for pod in d.observed.pods_of(names.TEACHERS):
        words = pod.ended or pod.before
        if words and words.facts.exit_code in (ExitCode.INVALID, ExitCode.REFUSED):
            return f"{pod.name} ended with exit code {words.facts.exit_code}: {words.message}"
    return ""


def _trainer(d: Draft) -> None:
    nodes, attempt = d.spec.training.nodes, d.run["attempt"]

    def name(number: int) -> str:
        return names.trainer(d.name, attempt, number)

    this = start(d, names.TRAINER, Stage.TRAINED, d.spec.training.pod, name, begun=d.completed(TRAINER_READY))
    job = this.job
    d.wanted.trainer = this.number
    counts = (job.ready, job.succeeded, job.failed) if job else (0, 0, 0)
    d.status["workers"] = {"desired": nodes, **dict(zip(("ready", "succeeded", "failed"), counts, strict=True))}
    d.status["workersReady"] = f"{counts[0]}/{nodes}"
    if this.number is None:
        d.times.pop(TRAINER_READY, None)
        return
    d.begin(TRAINER_READY)
    if job is not None and ended(d, job):
        _finish(d, job)
    elif job is not None and job.ready >= nodes:
        d.complete(TRAINER_READY)
        _progress(d)
    else:
        trouble = d.observed.trouble(names.TRAINER)
        if d.completed(TRAINER_READY):
            _progress(d)  # a pod that turns unready for a moment is no new start
        else:
            default = Reason.RESUMED if this.number > 0 else Reason.STARTING
            d.mark(Stage.TRAINED, False, default, _missing(d, job) or f"{counts[0]} of {nodes} training pods run")
            if d.late(d.times[TRAINER_READY]["startTime"], d.spec.run_policy.stage_deadlines.trainer_ready):
                deadline(d, Stage.TRAINED, "stageDeadlines.trainerReady", names.TRAINER)
                return
        if trouble:
            d.mark(Stage.TRAINED, False, *trouble)


def _missing(d: Draft, job: JobView | None) -> str:
    """Of a Job that makes no pods, which says why in events alone."""
    if job is None or job.finished or any(pod.job == job.name for pod in d.observed.pods):
        return ""
    if job.suspended:
        return f"Job {job.name} is suspended, as by a queue that has not admitted it"
    return f"Job {job.name} has no pods; `kubectl describe job {job.name}` shows a quota or rule that refuses them"


def _progress(d: Draft) -> None:
    if said := d.observed.progress:
        fresh = {
            "round": said.round,
            "totalRounds": said.total_rounds,
            "percentage": int(said.percentage),
            "remainingSeconds": int(said.remaining_seconds or 0),
            "metrics": [
                {"name": f"{key}/{row.task}"[:253], "value": f"{value:.4g}"}
                for row in said.metrics
                for key, value in row.figures.items()
            ][:64],
        }
        if {**d.status.get("progress", {}), **fresh} != d.status.get("progress"):
            d.status["progress"] = {**fresh, "lastUpdateTime": timestamp(d.now)}
        if said.round > 0:
            first = {"startTime": d.status["startTime"], "completionTime": timestamp(d.now)}
            d.times.setdefault(FIRST_ROUND, first)
        if said.checkpoint:
            d.status["checkpoint"] = {"round": said.checkpoint.round}
    at = d.status.get("progress")
    # The rounds are in status.progress; here they would change the condition every few seconds.
    d.mark(Stage.TRAINED, False, Reason.RUNNING, f"{at['totalRounds']} rounds" if at else "loading")


def _finish(d: Draft, job: JobView) -> None:
    first = next((pod for pod in d.observed.pods if pod.job == job.name and pod.index == 0 and pod.ended), None)
    said = first.ended.facts.digest if first and first.ended else None
    if said is None:
        ask_again(d, names.TRAINER)
        d.times.pop(TRAINER_READY, None)
        _trainer(d)
        return
    rounds = d.spec.training.rounds
    d.status["student"] = {
        "digest": said,
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
