"""`opd models`: what a model or an adapter is."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Look at models and adapters.")


@app.callback()
def models() -> None:
    """Look at models and adapters."""


@app.command()
def fingerprint(
    uri: Annotated[str, typer.Argument(help="A model or adapter: hf://, pvc://, s3://, file:// or a path.")],
    claims: Annotated[Path, typer.Option(help="Folder with one entry per claim.")] = Path(),
) -> None:
    """Print the digest that trainer and teachers compare: over tensors and configuration, not over files.

    Example: opd models fingerprint examples/tiny/tiny-world/base
    """
    from opd_core.models.fingerprint import fingerprint as compute
    from opd_core.uris import resolve

    typer.echo(compute(resolve(uri, claims) if "://" in uri else Path(uri)))
