"""`opd models`: what a model or an adapter is, and adapters in one."""

from pathlib import Path
from typing import Annotated

import typer

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
    from opd_core.uris import resolve

    echo(compute(resolve(uri, claims) if "://" in uri else Path(uri)))


@app.command()
def merge(
    adapters: Annotated[
        list[str], typer.Argument(metavar="LORA...", help="Two or more LoRAs of one base: paths or URIs.")
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for the merged one; made if it is not there.")
    ],
    claims: Annotated[Path, typer.Option(help="Folder with one entry per claim.")] = Path(),
) -> None:
    """Write the mean of several LoRAs as one, for a student to start from; exact, since their ranks add up.

    Example: opd models merge teachers/geneval teachers/ocr --out start
    """
    from opd_core.models.merge import merge as write
    from opd_core.uris import resolve

    config = write([resolve(uri, claims) if "://" in uri else Path(uri) for uri in adapters], out)
    echo(f"{out}: rank {config.r}, alpha {config.lora_alpha}. In a spec, with the folder on the claim `students`:\n")
    echo("  student:")
    echo(f"    initFrom: pvc://students/{out.name}")
    echo(f"    adapter: {{type: LoRA, rank: {config.r}, alpha: {config.lora_alpha}}}")
