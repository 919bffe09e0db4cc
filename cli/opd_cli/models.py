"""`opd models`: what a model or an adapter is, adapters in one, and in the formats of others."""

from pathlib import Path
from typing import Annotated

import typer
from opd_core.models.adapter_keys import Format

from opd_cli.terminal import echo

app = typer.Typer(no_args_is_help=True, help="Look at models and adapters.")


@app.callback()
def models() -> None:
    """Look at models and adapters."""


@app.command()
def fingerprint(
    uri: Annotated[
        str, typer.Argument(metavar="URI", help="A model or adapter: hf://, pvc://, s3://, file:// or a path.")
    ],
    claims: Annotated[Path, typer.Option(help="Folder with one entry per claim.")] = Path(),
) -> None:
    """Print the digest that trainer and teachers compare: over tensors and configuration, not over files.

    Example: opd models fingerprint examples/tiny/tiny-world/base
    """
    from opd_core.models.fingerprint import fingerprint as compute

    echo(compute(_local(uri, claims)))


@app.command()
def inspect(
    uri: Annotated[str, typer.Argument(metavar="URI", help="A LoRA, its file or folder: a URI or a path.")],
    base: Annotated[str | None, typer.Option(help="A model: whether the LoRA fits it.")] = None,
    alpha: Annotated[float | None, typer.Option(help="As teachers[].adapter.alpha, where the file has none.")] = None,
    claims: Annotated[Path, typer.Option(help="Folder with one entry per claim.")] = Path(),
) -> None:
    """Print what a LoRA file is: format, rank, alpha, layers, family, and why it would be refused as a teacher.

    Nothing of a file is ignored: what cannot be used is refused, and the command ends with 2.

    Example: opd models inspect examples/tiny/tiny-world/teachers/ocr --base examples/tiny/tiny-world/base
    """
    from opd_core.errors import InvalidError
    from opd_core.models.inspect import inspect as look

    report = look(_local(uri, claims), alpha, None if base is None else _local(base, claims))
    width = max(map(len, report.facts)) + 2
    for name, fact in report.facts.items():
        echo(f"{name:{width}}" + fact.replace("\n", "\n" + " " * width))
    if report.refusal is not None:
        raise InvalidError(report.refusal)


@app.command()
def export(
    uri: Annotated[str, typer.Argument(metavar="URI", help="A LoRA, its file or folder: a URI or a path.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write; new or empty.")],
    to: Annotated[Format, typer.Option("--format", help="Whose format.")] = Format.DIFFUSERS,
    base: Annotated[
        str | None, typer.Option(help="The model that it is for: to merge, or where the file has not diffusers' names.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Where the file has none.")] = None,
    claims: Annotated[Path, typer.Option(help="Folder with one entry per claim.")] = Path(),
) -> None:
    """Write a LoRA, a student's say, in another program's format; it computes the same.

    Example: opd models export runs/tiny-three-tasks/student --format comfyui --out for-comfyui
    """
    from opd_core.models.adapter_file import read_adapter_file
    from opd_core.models.export import export as write

    path, model = _local(uri, claims), None if base is None else _local(base, claims)
    for note in read_adapter_file(path, alpha).notes:
        echo(f"note: {note}")
    echo(str(write(path, out, to, alpha=alpha, base=model)))


@app.command()
def merge(
    adapters: Annotated[
        list[str], typer.Argument(metavar="LORA...", help="Two or more LoRAs of one base: paths or URIs.")
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for the merged one; made if it is not there.")
    ],
    base: Annotated[
        str | None, typer.Option(help="The model that they are for, where a file has not diffusers' names.")
    ] = None,
    claims: Annotated[Path, typer.Option(help="Folder with one entry per claim.")] = Path(),
) -> None:
    """Write the mean of several LoRAs as one, for a student to start from; exact, since their ranks add up.

    Example: opd models merge teachers/geneval teachers/ocr --out start
    """
    from opd_core.models.adapter_file import read_adapter_file
    from opd_core.models.adapter_layers import named
    from opd_core.models.merge import merge as write
    from opd_core.models.outline import linear_layers

    linear = None if base is None else linear_layers(_local(base, claims))
    found = [named(read_adapter_file(_local(uri, claims)), linear) for uri in adapters]
    for adapter in found:
        for note in adapter.notes:
            echo(f"note: {note}")
    config = write(found, out)
    echo(f"{out}: rank {config.r}, alpha {config.lora_alpha}. In a spec, with the folder on the claim `students`:\n")
    echo("  student:")
    echo(f"    initFrom: pvc://students/{out.name}")
    echo(f"    adapter: {{type: LoRA, rank: {config.r}, alpha: {config.lora_alpha}}}")


def _local(uri: str, claims: Path) -> Path:
    from opd_core.uris import resolve

    return resolve(uri, claims) if "://" in uri else Path(uri)
