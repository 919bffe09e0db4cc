"""The stages of one distillation on one machine, in the operator's order and words."""

from collections.abc import Collection, Mapping
from typing import Any

from opd_core.api.load import spec_digest
from opd_core.artifacts import installed_versions
from opd_core.errors import GateError
from opd_core.stages import Reason, Stage
from opd_core.uris import claim_path
from opd_trainer.evaluation.checks import failures

from opd_cli.runner.context import Run
from opd_cli.runner.endpoint import deploy
from opd_cli.runner.evaluation import evaluate, is_evaluated
from opd_cli.runner.preflight import Checked, check_files
from opd_cli.runner.stop import InterruptedRunError
from opd_cli.runner.teaching import teach
from opd_cli.runner.training import is_trained, train


def run(run: Run, *, until: Stage, serve: bool = False, teachers: Collection[str] = ()) -> None:
    """All stages up to `until`.

    Args:
        teachers: the only ones to train, of those that the spec trains; none: all.

    Raises:
        GateError: the student missed its gate; everything is written. InterruptedRunError: by the user.
        OPDError: a failure.
    """
    try:
        _run(run, until, serve, teachers)
    except InterruptedRunError as error:
        run.display.interrupted(str(error))
        raise
    except KeyboardInterrupt:
        run.display.interrupted("killed; the same command continues at the last checkpoint")
        raise


def _run(run: Run, until: Stage, serve: bool, teachers: Collection[str]) -> None:
    checked = Checked()
    if not (is_trained(run) and is_evaluated(run)):
        checked = check_files(run.distillation.metadata.name, run.work.spec, run.work.claims, run.place.device)
        for note in checked.notes:
            run.display.note(note)
        run.stop.check()
    if until == Stage.TEACHERS_TRAINED or not is_trained(run):
        teach(run, checked.gpus, teachers)
    else:
        run.display.stage(Stage.TEACHERS_TRAINED, Reason.UP_TO_DATE, "not needed")
    if until == Stage.TEACHERS_TRAINED:
        return
    train(run, checked.gpus)
    if until == Stage.TRAINED:
        run.display.note(f"student: {run.work.student}")
        return
    scored = evaluate(run)
    write_summary(run, scored)
    if words := "; ".join(failures(scored["gate"])):
        run.display.stage(Stage.EVALUATED, Reason.GATE_MISSED, words)
        raise GateError(f"the student missed its gate ({words}); it is not served. Train longer, or change the gate")
    run.display.note(f"student copied to {claim_path(run.spec.student.output.uri, run.work.claims)}")
    if until == Stage.EVALUATED:
        return
    if run.spec.endpoint.enabled:
        deploy(run, serve=serve)
        write_summary(run, scored)
    else:
        run.display.stage(Stage.DEPLOYED, Reason.DISABLED, "spec.endpoint.enabled is false")


def write_summary(run: Run, scored: Mapping[str, Any]) -> None:
    """WORK/summary.json: the evaluator's findings and where they come from."""
    summary = {
        "name": run.distillation.metadata.name,
        "specDigest": spec_digest(run.distillation),
        "versions": installed_versions(),
        "stageSeconds": {stage.value: (run.work.done(stage) or {}).get("seconds") for stage in Stage},
        "student": {"digest": run.student_digest(), "path": str(run.work.student)},
        **scored,
    }
    run.work.write_json("summary.json", summary)
