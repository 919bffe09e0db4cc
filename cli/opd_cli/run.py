"""`opd run`: a whole distillation on this machine."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from opd_core import roles
from opd_core.api.load import load_spec
from opd_core.api.types import Spec
from opd_core.errors import GateError, InvalidError
from opd_core.stages import Stage
from opd_core.uris import is_valid

from opd_cli.options import Changes
from opd_cli.runner.context import Run
from opd_cli.runner.display import Display, gate_lines, kept_lines, result_table, teacher_lines
from opd_cli.runner.run import run as run_stages
from opd_cli.runner.stop import StopSignal
from opd_cli.runner.workfolder import WorkFolder


class Until(StrEnum):
    TRAINED = "trained"
    EVALUATED = "evaluated"
    DEPLOYED = "deployed"


def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An OPDDistillation, YAML or JSON.")],
    work: Annotated[
        Path | None, typer.Option(help="Folder of this run; the same folder continues it. Default: runs/NAME.")
    ] = None,
    claim: Annotated[
        list[str] | None, typer.Option(metavar="NAME=DIR", help="Folder behind a pvc:// claim; repeatable.")
    ] = None,
    changes: Changes = None,
    until: Annotated[Until, typer.Option(help="The last stage of this command.")] = Until.DEPLOYED,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads to use in all; default: every core this process may use.")
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Keep the endpoint up at the end, until Ctrl-C.")] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write the curves for TensorBoard, too: WORK/train/tensorboard.")
    ] = False,
) -> None:
    """Teachers in Triton, DeepSpeed training, evaluation, gate and image endpoint, as processes of this machine.

    Ctrl-C once saves a checkpoint and leaves; the same command continues there.

    A claim `pvc://NAME/...` is the folder NAME beside FILE unless --claim says otherwise.

    Example: opd run examples/tiny/quickstart.yaml --work runs/quickstart
    """
    if serve and until != Until.DEPLOYED:
        raise InvalidError(f"--serve keeps the endpoint up, --until {until.value} starts none; leave one out")
    with session(file, work, claim, changes, device, threads, tensorboard=tensorboard) as run:
        began, missed = time.monotonic(), None
        with run.display:
            try:
                run_stages(run, until=Stage(until.value.capitalize()), serve=serve)
            except GateError as error:
                missed = error
            run.display.note(f"done in {time.monotonic() - began:.0f} s")
        if until != Until.TRAINED:
            _conclude(run.work, run.display, _picture(run.work) if until == Until.DEPLOYED and not missed else None)
        if missed:
            raise missed


@contextmanager
def session(
    file: Path,
    work: Path | None,
    claim: list[str] | None,
    changes: list[str] | None,
    device: str,
    threads: int | None,
    *,
    tensorboard: bool = False,
) -> Iterator[Run]:
    """A run of the spec in `file`, in its work folder, which nobody else uses meanwhile; for the options see `run`."""
    distillation = load_spec(file, changes or [])
    _check_machine(distillation.spec, ["tensorboard"] if tensorboard else [])
    folder = WorkFolder((work or Path("runs", distillation.metadata.name)).resolve())
    with folder.locked():
        folder.prepare(distillation, file, _claims(claim or []))
        place = roles.Place(
            python=sys.executable,
            spec=folder.spec,
            claims=folder.claims,
            work=folder.path,
            device=device,
            threads=threads or len(os.sched_getaffinity(0)),
        )
        stop, display = StopSignal(), Display(folder.path / "events.jsonl")
        display.note(f"{distillation.metadata.name}: work folder {folder.path}, logs in {folder.path / 'logs'}")
        with stop.listening():
            yield Run(distillation, folder, place, display, stop, time.monotonic(), tensorboard)


def _check_machine(spec: Spec, more: list[str]) -> None:
    """Refuse what one machine cannot do, before anything starts. `more`: packages that this run needs, too."""
    if spec.suspend:
        raise InvalidError("spec.suspend is true, so nothing may run; set it to false")
    if spec.training.nodes > 1:
        raise InvalidError(
            f"spec.training.nodes is {spec.training.nodes}, and `opd run` is one machine; "
            "set it to 1 and spec.training.processesPerNode to the ranks you want"
        )
    for module in ("torch", "deepspeed", "tritonclient", "fastapi", *more):
        if find_spec(module) is None:
            raise ModuleNotFoundError(name=module)


def _conclude(folder: WorkFolder, display: Display, picture: str | None) -> None:
    from opd_trainer.evaluation.summary import task_means

    from opd_cli.report import write_report

    summary = json.loads((folder.path / "summary.json").read_text())
    report = write_report(folder.path)
    display.console.print(result_table(summary, task_means(load_spec(folder.spec).spec, summary)))
    for line in (
        *teacher_lines(summary),
        *kept_lines(summary),
        *gate_lines(summary),
        f"report:  {report}",
        f"student: {folder.student}",
    ):
        display.console.print(line, markup=False)
    if picture:
        display.console.print(f"picture: {picture}", markup=False)


def _picture(folder: WorkFolder) -> str | None:
    deployed = folder.done(Stage.DEPLOYED)
    return deployed["picture"] if deployed else None


def _claims(options: list[str]) -> dict[str, Path]:
    claims = {}
    for option in options:
        name, separator, folder = option.partition("=")
        if not separator or not is_valid(f"pvc://{name}/x"):
            raise InvalidError(f"--claim {option}: write NAME=DIR")
        claims[name] = Path(folder)
    return claims
