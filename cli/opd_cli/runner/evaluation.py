"""Evaluated: base, teachers and student on the same held-out prompts; the evaluator publishes a student that passes."""

import json
import time
from pathlib import Path
from typing import Any

from opd_core import roles
from opd_core.api.digests import evaluation_digest
from opd_core.artifacts import read_student
from opd_core.errors import InvalidError, RefusedError
from opd_core.stages import Reason, Stage
from opd_core.uris import claim_path
from opd_trainer.evaluation.checks import failures

from opd_cli.runner.context import POLL_SECONDS, Run
from opd_cli.runner.supervise import Job


def is_evaluated(run: Run) -> bool:
    """Whether the scores in the folder are of this student under this spec, and a student that passed is published."""
    evaluated = run.work.done(Stage.EVALUATED)
    if evaluated is None or evaluated["key"] != _key(run) or not _file(run).exists():
        return False
    return bool(failures(_scored(run)["gate"])) or _published(run)


def evaluate(run: Run) -> dict[str, Any]:
    """Scores, kept shares and gate. The evaluator reads back what it has scored before."""
    if is_evaluated(run):
        run.display.stage(Stage.EVALUATED, Reason.UP_TO_DATE, f"scores in {_file(run).parent}")
        return _scored(run)
    run.stop.check()
    models = "base, teachers and student" if any(each.teaches for each in run.spec.teachers) else "base and student"
    run.display.stage(Stage.EVALUATED, Reason.RUNNING, f"{models} on held-out prompts")
    began, check_deadline = time.monotonic(), run.deadline(Stage.EVALUATED)
    with Job(run.supervision, Stage.EVALUATED, lambda: roles.evaluator(run.place)) as evaluator:
        while not evaluator.finished():
            run.stop.check()
            check_deadline()
            time.sleep(POLL_SECONDS)
    seconds = time.monotonic() - began
    run.work.finish(Stage.EVALUATED, key=_key(run), seconds=seconds)
    run.display.stage(Stage.EVALUATED, Reason.COMPLETED, f"in {seconds:.0f} s")
    return _scored(run)


def _file(run: Run) -> Path:
    return run.work.path / "evaluation" / "summary.json"


def _key(run: Run) -> str:
    return evaluation_digest(run.distillation, str(run.student_digest()))


def _scored(run: Run) -> dict[str, Any]:
    scored: dict[str, Any] = json.loads(_file(run).read_text())
    return scored


def _published(run: Run) -> bool:
    """Whether the student lies where the spec wants it, whole."""
    place = claim_path(run.spec.student.output.uri, run.work.claims)
    assert place is not None, "types.Output allows claims only"
    try:
        return read_student(place)[0].digest == run.student_digest()
    except (InvalidError, RefusedError):  # none, or a damaged one: the evaluator replaces it
        return False
