"""The stage Evaluated: a Job that scores base, teachers and student, and what its gate says. Pure."""

import functools

from opd_core.api.digests import evaluation_digest
from opd_core.brief import lost, others, worst
from opd_core.stages import Reason, Stage

from opd_operator import names
from opd_operator.draft import Draft, timestamp
from opd_operator.jobs import Work, ask_again, ended, in_queue, pods_of, start
from opd_operator.words import Words
from opd_operator.workloads import evaluation_pod

KEY_LENGTH = 12
_HISTORY = 10  # students that are remembered


def evaluate(d: Draft) -> bool:
    """Whether the student is compared and passed its gate."""
    student = d.status["student"]
    key = evaluation_key(d, student["digest"])
    if student.get("evaluation") == key:
        return _judge(d)
    if d.completed(Stage.EVALUATED):  # judged before, and over: this is work of its own
        del d.times[Stage.EVALUATED]
        d.status["startTime"] = timestamp(d.now)
    d.begin(Stage.EVALUATED)

    name = functools.partial(names.evaluator, d.name, key)
    work = Work(names.EVALUATOR, Stage.EVALUATED, evaluation_pod(d.spec), name, begun=_runs(d))
    this = start(d, work)
    if this.number is not None:
        d.wanted.evaluator = (key, this.number)
        if this.job and in_queue(d, work, this.job):
            d.wait_in_queue()
            del d.times[Stage.EVALUATED]  # its time begins at its admission
            return False
        if this.job and ended(d, this.job):
            d.wanted.evaluator = None
            words = next((pod.ended for pod in pods_of(d, this.job) if pod.ended), None)
            if words is None or words.facts.gate_passed is None:
                ask_again(d, work, this.job)
                return False
            _record(d, words, key)
            return _judge(d)
        reason, message = d.observed.trouble(names.EVALUATOR) or (Reason.RUNNING, "base, teachers and student")
        d.mark(Stage.EVALUATED, False, reason, message)
    return False


def evaluation_key(d: Draft, student: str) -> str:
    """Names what the scores of a student (a digest) depend on."""
    return evaluation_digest(d.distillation, student)[:KEY_LENGTH]


def _runs(d: Draft) -> bool:
    return any(pod.phase == "Running" for pod in d.observed.pods_of(names.EVALUATOR))


def _record(d: Draft, words: Words, key: str) -> None:
    student = d.status["student"]
    said, tasks = words.facts.scores, len(d.spec.teachers)
    least, rest = worst([row for row in said if row.kept is not None], lambda row: lost(row.kept))
    kept = [f"{row.task} {row.kept:.2f}" for row in least]
    if rest:
        kept.append(f"and of {others(len(rest))} no less")
    if 0 < len(said) < tasks:  # a kubelet keeps 4096 bytes
        kept.insert(
            0, f"{tasks - len(said)} of {tasks} tasks did not fit into the pod's last words: see its summary.json"
        )
    student.update(
        scores=[row.model_dump(mode="json", by_alias=True, exclude_none=True) for row in said],
        gatePassed=words.facts.gate_passed,
        verdict=words.message[:1024],
        evaluation=key,
        summary=", ".join(kept)[:1024],
    )
    d.complete(Stage.EVALUATED)
    d.starts(names.EVALUATOR)["failures"] = 0
    entry = {
        **{name: student[name] for name in ("digest", "key", "uri", "gatePassed")},
        "time": timestamp(d.now),
        "image": d.run["images"][names.ENDPOINT],
    }
    known = [before for before in d.status.get("students", []) if before["digest"] != student["digest"]]
    d.status["students"] = _recent(d, [*known, entry])


def _recent(d: Draft, students: list[dict[str, object]]) -> list[dict[str, object]]:
    """The newest ones, and whoever serves or is asked for by name."""
    endpoint = d.status.get("endpoint", {})
    held = {endpoint[kind]["digest"] for kind in ("stable", "canary") if kind in endpoint}
    held.add(d.spec.endpoint.student_digest)
    oldest = [student for student in students if student["digest"] not in held]
    gone = {id(student) for student in oldest[: max(0, len(students) - _HISTORY)]}
    return [student for student in students if id(student) not in gone]


def _judge(d: Draft) -> bool:
    student = d.status["student"]
    if student["gatePassed"]:
        d.mark(Stage.EVALUATED, True, Reason.COMPLETED, student.get("summary", ""))
        return True
    d.stop(Reason.GATE_MISSED, student.get("verdict", ""), Stage.EVALUATED, evaluation=student["evaluation"])
    return False
