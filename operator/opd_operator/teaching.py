"""The stage TeachersTrained: Jobs that train teachers, before anything else holds a device. Pure.

A trained teacher is remembered by where it is, which names all that it depends on, beyond the run that trained it.
"""

import functools
from collections.abc import Iterator
from typing import Any

from opd_core.api.teachers import adapter_of, trained_teachers
from opd_core.api.types import Teacher
from opd_core.brief import named
from opd_core.stages import Condition, Reason, Stage

from opd_operator import names
from opd_operator.draft import Draft, timestamp
from opd_operator.jobs import Work, ask_again, ended, in_queue, no_pods, result, start, taken_out
from opd_operator.outcome import late
from opd_operator.training import LIVE


def remember(d: Draft) -> None:
    """The teachers that this spec trains, in its order, with what is known of them."""
    known = {row["uri"]: row for row in d.status.get("teaching", [])}
    rows = []
    for teacher in trained_teachers(d.spec):
        uri = adapter_of(d.spec, teacher).uri
        assert teacher.training is not None
        rows.append({"name": teacher.name, "uri": uri, "round": 0, "totalRounds": teacher.training.rounds})
        rows[-1].update(known.get(uri, {}))
    if rows:
        d.status["teaching"] = rows
    else:
        d.status.pop("teaching", None)


def there(d: Draft) -> bool:
    """Whether every teacher is there, given or trained; the condition then says so."""
    rows = d.status.get("teaching", [])
    if "student" not in d.status and (any("digest" not in row for row in rows) or _refusal(d)):
        return False
    trained = named([row["name"] for row in rows if "digest" in row])
    if not rows:
        d.mark(Stage.TEACHERS_TRAINED, True, Reason.DISABLED, "no teacher is trained")
    elif d.completed(Stage.TEACHERS_TRAINED):
        d.mark(Stage.TEACHERS_TRAINED, True, Reason.COMPLETED, trained)
    else:
        d.mark(Stage.TEACHERS_TRAINED, True, Reason.UP_TO_DATE, trained)
    return True


def teach(d: Draft) -> bool:
    """Whether every teacher is there. As many as runPolicy.parallelTeachers train side by side, in the spec's order."""
    if there(d):
        return True
    if refusal := _refusal(d):
        d.stop(Reason.USER_ERROR, refusal, Stage.TEACHERS_TRAINED)
        return False
    for part in LIVE:
        d.status.pop(part, None)
    d.begin(Stage.TEACHERS_TRAINED)
    at_work: list[tuple[str, Reason, str]] = []
    waiting = []
    for index, teacher, row in _missing(d):
        if len(at_work) == d.spec.run_policy.parallel_teachers:
            waiting.append(teacher.name)
        elif not _train(d, index, teacher, row):
            if "stopping" in d.status:
                return False
            _, reason, said = d.marks[Condition.TEACHERS_TRAINED]
            at_work.append((teacher.name, reason, said))
    if not at_work:
        d.complete(Stage.TEACHERS_TRAINED)
        d.status.pop("progress", None)
        return there(d)
    _progress(d)
    rows = d.status["teaching"]
    parts = [f"{sum('digest' in row for row in rows)} of {len(rows)} teachers are trained"]
    parts += [f"{name}: {said}" for name, _, said in at_work]
    parts += [f"waiting: {', '.join(waiting)}"] if waiting else []
    reason = next((reason for _, reason, _ in at_work if reason != Reason.RUNNING), Reason.RUNNING)
    d.mark(Stage.TEACHERS_TRAINED, False, reason, "; ".join(parts))
    if all(reason == Reason.QUEUED for _, reason, _ in at_work):
        d.wait_in_queue()
        del d.times[Stage.TEACHERS_TRAINED]  # its time begins at its admission
    return False


def _refusal(d: Draft) -> str:
    """Why a teacher that is trained must not teach: mustBeatBase has become true since. Before, its own program would
    have refused it."""
    minding = {each.name for each in trained_teachers(d.spec) if each.training and each.training.must_beat_base}
    rows = d.status.get("teaching", [])
    worse = next((row for row in rows if row["name"] in minding and row.get("beatsBase") is False), None)
    return "" if worse is None else f"{worse['verdict']}; it must not teach while its training.mustBeatBase is true"


def _missing(d: Draft) -> Iterator[tuple[int, Teacher, dict[str, Any]]]:
    """Index in the spec, teacher, and what is known of it."""
    rows = {row["name"]: row for row in d.status["teaching"]}
    for index, teacher in enumerate(d.spec.teachers):
        if teacher.training is not None and "digest" not in rows[teacher.name]:
            yield index, teacher, rows[teacher.name]


def _train(d: Draft, index: int, teacher: Teacher, row: dict[str, Any]) -> bool:
    """Whether this teacher is there now; if not, the condition says how far it is, or the run is stopping."""
    starts, nodes = d.starts(names.TEACH, teacher.name), d.spec.training.nodes
    work = Work(
        role=names.TEACH,
        stage=Stage.TEACHERS_TRAINED,
        pod=d.spec.training.pod,
        name=functools.partial(names.teach, d.name, index, d.run["attempt"]),
        begun="ran" in starts,
        checkpoint=min(row.get("checkpoint", 0), row["totalRounds"]),
        teacher=teacher.name,
    )
    this = start(d, work)
    job = this.job
    if this.number is None:
        return False
    d.wanted.teach[index] = this.number
    if job and in_queue(d, work, job):
        starts.pop("since", None)
        if starts.pop("ran", False):
            taken_out(d, work)
        return False
    if job and ended(d, job):
        del d.wanted.teach[index]
        said = result(d, job)
        if said is None:
            ask_again(d, work, job)
            return False
        row.update(digest=said.digest, verdict=said.message[:1024], round=row["totalRounds"])
        if said.beats_base is False:
            row["beatsBase"] = False
        return True
    if job and job.ready >= nodes:
        starts["ran"] = True
    if "ran" in starts:
        if said_ := d.observed.taught.get(teacher.name):
            row["round"] = min(said_.round, row["totalRounds"])
            if said_.checkpoint:
                row["checkpoint"] = said_.checkpoint.round
        text = f"{row['totalRounds']} rounds" if row["round"] else "loading"
        d.mark(Stage.TEACHERS_TRAINED, False, Reason.RUNNING, text)
    else:
        text = no_pods(d, job) or f"{job.ready if job else 0} of {nodes} training pods run"
        again = Reason.RESUMED if this.number > 0 else Reason.STARTING
        d.mark(Stage.TEACHERS_TRAINED, False, again, text)
        since = starts.setdefault("since", timestamp(d.now))
        if late(d, since, work.stage, "stageDeadlines.trainerReady", work.role, work.teacher):
            return False
    if trouble := d.observed.trouble(names.TEACH, teacher.name):
        d.mark(Stage.TEACHERS_TRAINED, False, *trouble)
    return False


def _progress(d: Draft) -> None:
    """Of all of them together."""
    rows, said = d.status["teaching"], [d.observed.taught[name] for name in sorted(d.observed.taught)]
    if not said:
        return
    done, total = sum(row["round"] for row in rows), sum(row["totalRounds"] for row in rows)
    d.tell_progress({"round": done, "totalRounds": total, "percentage": 100 * done // total}, said)
