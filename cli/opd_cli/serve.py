"""`opd serve`: the image API on a student."""

from pathlib import Path
from typing import Annotated

import typer


def serve(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="Student directory, or its URI.")],
    claims: Annotated[
        Path | None, typer.Option(help="Folder with one entry per claim; default: the one of the run around STUDENT.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8080,
    served_name: Annotated[str | None, typer.Option(help="Name of the model in the API.")] = None,
    api_keys: Annotated[Path | None, typer.Option(help="File with SHA-256 digests of API keys, one per line.")] = None,
    max_batch_size: Annotated[int, typer.Option(min=1, help="Images that one tick advances at once.")] = 16,
    max_queued_images: Annotated[int, typer.Option(min=1, help="Images admitted beyond those, before 429.")] = 64,
    precision: Annotated[str, typer.Option(help="auto, BF16, FP16 or FP32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Serve a student over OpenAI's Images API until Ctrl-C, which finishes what is in flight.

    Example: opd serve runs/quickstart/student --port 8080
    """
    from opd_serving.endpoint.engine import Limits
    from opd_serving.endpoint.server import Settings, log_to_stderr, run

    settings = Settings(
        student=student,
        claims=claims or claims_around(student),
        host=host,
        port=port,
        served_name=served_name,
        api_keys=api_keys,
        limits=Limits(max_batch_size, max_queued_images),
        precision=precision,
        device=device,
    )
    log_to_stderr()
    raise typer.Exit(int(run(settings)))


def claims_around(student: str) -> Path:
    """The claims folder of the run that a student directory lies in, else ./claims."""
    for folder in Path(student).absolute().parents:
        if folder.name == "claims":
            return folder
        if (folder / "claims").is_dir():
            return folder / "claims"
    return Path("claims")
