"""What a user sees of one distillation: a page of all, or a line per change, laid out as `opd run` does. Pure."""

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from opd_core.api.status import EndpointStatus, LastFailure, Progress, TrainedTeacher
from opd_core.brief import named, others, worst
from opd_core.stages import Condition, Reason
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from opd_cli.cluster import students
from opd_cli.cluster.advice import Advice
from opd_cli.cluster.distillation import Distillation, parse_time
from opd_cli.runner.display import STYLES, clock, duration, losses, score_table, task_table

_BAD = (
    *(Reason.INVALID, Reason.UNSCHEDULABLE, Reason.IMAGE_PULL_FAILED, Reason.CRASHING, Reason.OUT_OF_MEMORY),
    *(Reason.BACKOFF_LIMIT_EXCEEDED, Reason.USER_ERROR, Reason.REJECTED, Reason.ROLLED_BACK, Reason.UNAVAILABLE),
    *(Reason.UNKNOWN_STUDENT, Reason.NO_FIGURES),
)
_WAITING = (Reason.DISRUPTED, Reason.SUSPENDED, Reason.STOPPING, Reason.QUEUED)
_STYLES: dict[str, str] = {
    **{reason.value: style for reason, style in STYLES.items()},
    **dict.fromkeys((reason.value for reason in _BAD), "red"),
    **dict.fromkeys((reason.value for reason in _WAITING), "yellow"),
    **dict.fromkeys((Reason.AVAILABLE.value, Reason.ACCEPTED.value), "green"),
    **dict.fromkeys((Reason.CANARY.value, Reason.RESUMED.value), "cyan"),
}
UNJUDGED = "the operator has not judged this spec yet"
# What everybody expects of an object, or what another condition says already.
_SILENT = (Reason.WAITING, Reason.ACCEPTED, Reason.ACTIVE, Reason.NOT_FAILED)


def page(distillation: Distillation, advice: Advice, now: datetime) -> Group:
    """Conditions, progress, teachers, workers, last failure, student, endpoint, and what to do next."""
    status = distillation.status
    head = Text(distillation.name, style="bold")
    head.append(f"  {status.phase or 'Pending'}, namespace {distillation.namespace}, ", style="not bold")
    head.append(f"{ago(distillation.created, now)} old", style="not bold")
    parts: list[RenderableType] = [head, _conditions(distillation, now)]
    if (status.observed_generation or 0) < distillation.manifest["metadata"]["generation"]:
        parts.append(Text(UNJUDGED, style="yellow"))
    if status.progress and not distillation.holds(Condition.TRAINED):
        parts += [Text(), _progress(status.progress), task_table(_metrics(status.progress))]
    facts = Table(box=None, pad_edge=False, show_header=False)
    for name, text in _facts(distillation, now):
        facts.add_row(Text(name, style="bold"), Text(text))
    if facts.row_count:
        parts += [Text(), facts]
    if status.student and status.student.scores:
        parts += [Text(), score_table([score.model_dump() for score in status.student.scores])]
    if advice:
        table = Table(box=None, pad_edge=False, show_header=False)
        for command, purpose in advice:
            table.add_row(Text(command), Text(purpose, style="dim"))
        parts += [Text(), Text("next", style="dim"), table]
    return Group(*parts)


def lines(before: Distillation | None, now: Distillation) -> Iterator[str]:
    """What has changed, a line each; of the first look everything."""
    if before is None and not now.status.conditions:
        yield f"{clock()}  {UNJUDGED}"
    old = {each.type: each for each in before.status.conditions or []} if before else {}
    for each in now.status.conditions or []:
        was = old.get(each.type)
        if was and (was.status, was.reason, was.message) == (each.status, each.reason, each.message):
            continue
        if (
            each.reason in _SILENT
            or each.type == Condition.STALLED
            or (each.type == Condition.READY and each.status != "True")
        ):
            continue
        yield f"{clock()}  {each.type:15} {each.reason:12} {each.message}".rstrip()
    progress = now.status.progress
    if progress and not now.holds(Condition.TRAINED) and (before is None or before.status.progress != progress):
        yield f"{clock()}  {_progress_line(progress)}  loss {losses(_metrics(progress))}"


# ---------------------------------------------------------------------------------------------------- parts of the page


def _conditions(distillation: Distillation, now: datetime) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for each in distillation.status.conditions or []:
        reason = Text(each.reason, style=_STYLES.get(each.reason, ""))
        since = Text(ago(parse_time(each.last_transition_time), now), style="dim")
        table.add_row(Text(each.type, style="bold"), each.status, reason, since, Text(each.message))
    return table


def _progress(progress: Progress) -> Table:
    row = Table.grid(padding=(0, 2))
    row.add_row(ProgressBar(total=100, completed=float(progress.percentage or 0), width=40), _progress_line(progress))
    return row


def _progress_line(progress: Progress) -> str:
    left = f"  {duration(progress.remaining_seconds)} left" if progress.remaining_seconds else ""
    return f"round {progress.round or 0}/{progress.total_rounds or 0}{left}"


def _metrics(progress: Progress) -> dict[str, Any]:
    """As the trainer says it; the status has `loss/geneval` as text."""
    tasks: dict[str, dict[str, Any]] = {}
    for metric in progress.metrics or []:
        key, _, task = metric.name.rpartition("/")
        row = tasks.setdefault(task, {"task": task, "loss": float("nan"), "velocityMse": float("nan")})
        row[key] = float(metric.value)
    return {"metrics": list(tasks.values())}


def _facts(distillation: Distillation, now: datetime) -> Iterator[tuple[str, str]]:
    status = distillation.status
    teaching, rest = worst(status.teaching or [], _is_missing)
    for taught in teaching:
        yield f"teacher {taught.name}", _taught(taught)
    if rest:
        yield "teachers", f"{others(len(rest))}, of which {sum(bool(each.digest) for each in rest)} are trained"
    if status.teachers:
        missing = [each.name for each in status.teachers if not each.ready]
        yield "teachers", f"{status.teachers_ready} answer" + (f", not {named(missing)}" if missing else "")
    if status.workers:
        yield "workers", f"{status.workers_ready} run"
    if status.restarts or status.disruptions:
        yield "restarts", f"{status.restarts or 0} after failures, {status.disruptions or 0} after disruptions"
    if status.checkpoint:
        yield "checkpoint", f"round {status.checkpoint.round}"
    if status.last_failure:
        yield from _failure(status.last_failure, now)
    if status.student:
        gate = {True: ", passed its gate", False: ", missed its gate", None: ""}[status.student.gate_passed]
        yield "student", f"{students.short(status.student.digest)}{gate}, in {status.student.uri}"
    if status.endpoint:
        yield from _endpoint(status.endpoint)


def _is_missing(teacher: TrainedTeacher) -> float:
    """What is at work before what waits, and that before what is there."""
    return 0 if teacher.digest else 2 if teacher.round else 1


def _taught(teacher: TrainedTeacher) -> str:
    if teacher.digest:
        return f"{students.short(teacher.digest)} in {teacher.uri}; {teacher.verdict or 'trained'}"
    resumes = f", checkpoint of round {teacher.checkpoint}" if teacher.checkpoint else ""
    return f"round {teacher.round or 0}/{teacher.total_rounds or 0}{resumes}"


def _failure(failure: LastFailure, now: datetime) -> Iterator[tuple[str, str]]:
    where = [f"pod {failure.pod}"] if failure.pod else []
    where += [f"container {failure.container}"] if failure.container else []
    where += [f"exit code {failure.exit_code}"] if failure.exit_code is not None else []
    when = [f"{ago(parse_time(failure.time), now)} ago"] if failure.time else []
    yield "last failure", f"{failure.stage} {failure.reason}: " + ", ".join(where + when)
    for line in (failure.message or "").splitlines():
        yield "", line


def _endpoint(endpoint: EndpointStatus) -> Iterator[tuple[str, str]]:
    yield "endpoint", f"{endpoint.url}, {endpoint.ready_replicas or 0} of {endpoint.replicas or 0} pods answer"
    if endpoint.stable:
        yield "serves", f"{students.short(endpoint.stable.digest)}, revision {endpoint.stable.revision}"
    if endpoint.canary:
        share = f"{endpoint.canary.traffic_percent or 0} % of the traffic"
        yield "canary", f"{students.short(endpoint.canary.digest)}, revision {endpoint.canary.revision}, {share}"
    if endpoint.rejected:
        yield "rejected", f"revision {endpoint.rejected.revision}: {endpoint.rejected.message}"


def ago(then: datetime, now: datetime) -> str:
    """As kubectl writes an age: the largest unit, and the next one where that is small."""
    seconds = max(0, round((now - then).total_seconds()))
    for size, unit, below, next_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= size:
            whole, rest = seconds // size, seconds % size // below
            return f"{whole}{unit}{rest}{next_unit}" if rest and whole < 10 else f"{whole}{unit}"
    return f"{seconds}s"
