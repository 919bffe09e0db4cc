"""`opd eval`: scores a student on a spec's held-out prompts."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from opd_cli.serve import claims_around
from opd_cli.terminal import echo, make_console


def evaluate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The OPDDistillation whose prompts and rewards count.")],
    student: Annotated[Path | None, typer.Option(help="Student directory; its manifest gets the scores.")] = None,
    claims: Annotated[
        Path | None,
        typer.Option(
            help="Folder with one entry per claim; default: the one of the run around --student, or the folder of FILE."
        ),
    ] = None,
    models: Annotated[
        str | None, typer.Option(help="Which of base,teachers,student; default: all that there are.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for scores and images; what is there is not computed again.")
    ] = Path("evaluation"),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    output: Annotated[Literal["text", "json"], typer.Option("--output", "-o", help="text or json.")] = "text",
) -> None:
    """Compare base, teachers and a student on held-out prompts with the same noise.

    Example: opd eval examples/tiny/quickstart.yaml --student runs/quickstart/student
    """
    from opd_core.api.load import load_spec
    from opd_core.device import choose_device
    from opd_trainer.evaluate import evaluate as score
    from opd_trainer.evaluation.summary import task_means

    from opd_cli.runner.display import kept_lines, result_table, teacher_lines

    spec = load_spec(file).spec
    summary = score(
        spec,
        claims=claims or (claims_around(str(student)) if student else file.resolve().parent),
        student=student,
        kinds=(models or ("base,teachers,student" if student else "base,teachers")).split(","),
        output=out,
        device=choose_device(device),
        quiet=output == "json",
    )
    if output == "json":
        echo(json.dumps(summary, indent=2))
        return
    console = make_console()
    console.print(result_table(summary, task_means(spec, summary)))
    for line in (*teacher_lines(summary), *kept_lines(summary)):
        console.print(line, markup=False)
