"""`opd teach`: only the teachers of a spec, on this machine."""

from pathlib import Path
from typing import Annotated

import typer
from opd_core.api.load import load_spec
from opd_core.api.teachers import trained_teachers
from opd_core.errors import InvalidError
from opd_core.stages import Stage

from opd_cli.options import Changes
from opd_cli.run import session
from opd_cli.runner.run import run as run_stages


def teach(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An OPDDistillation, YAML or JSON.")],
    teacher: Annotated[
        list[str] | None, typer.Argument(metavar="[TEACHER]...", help="Their names; default: all that FILE trains.")
    ] = None,
    work: Annotated[Path | None, typer.Option(help="Folder of this run, as of `opd run`. Default: runs/NAME.")] = None,
    claim: Annotated[
        list[str] | None, typer.Option(metavar="NAME=DIR", help="Folder behind a pvc:// claim; repeatable.")
    ] = None,
    changes: Changes = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads to use in all; default: every core this process may use.")
    ] = None,
) -> None:
    """Train the teachers that a spec makes from its base by reinforcement learning, and compare each with the base.

    `opd run` does this first, too, and takes those that are there: a teacher is trained again only if something that it
    depends on has changed. Ctrl-C once saves a checkpoint and leaves; the same command continues there.

    Example: opd teach examples/tiny/from-base.yaml aesthetic
    """
    names = teacher or []
    known = [each.name for each in trained_teachers(load_spec(file, changes or []).spec)]
    if not known:
        raise InvalidError(
            f"{file} trains no teacher: all of spec.teachers have an adapter; give one a training instead"
        )
    if unknown := [name for name in names if name not in known]:
        raise InvalidError(f"{file} trains no teacher {unknown[0]}; it trains {', '.join(known)}")
    with session(file, work, claim, changes, device, threads) as run, run.display:
        run_stages(run, until=Stage.TEACHERS_TRAINED, teachers=names)
