"""`opd serve`: the image API on a student."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from opd_core.ports import EVERYWHERE, in_url

from opd_cli.terminal import echo

_PROMPT = "a red 3"


def serve(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="Student directory, or its URI.")],
    claims: Annotated[
        Path | None, typer.Option(help="Folder with one entry per claim; default: the one of the run around STUDENT.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; :: is all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    metrics_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of health and metrics; default: the same.")
    ] = None,
    served_name: Annotated[
        list[str] | None,
        typer.Option(help="Name of the model in the API; repeatable: those after the first are aliases."),
    ] = None,
    api_keys: Annotated[Path | None, typer.Option(help="File with SHA-256 digests of API keys, one per line.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, BF16, FP16 or FP32.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    max_batch_size: Annotated[int | None, typer.Option(min=1, help="Images that one tick advances at once.")] = None,
    max_queued_images: Annotated[
        int | None, typer.Option(min=1, help="Images admitted beyond those, before 429.")
    ] = None,
    fixed_rows: Annotated[
        int | None,
        typer.Option(
            min=0, help="Rows of every forward pass: the same bytes in any company. 0: faster, equal to rounding."
        ),
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, help="Of requests without a size; default: the student's.")
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="The same.")] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Of requests without frames; default: the student's.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of requests without steps; default: the student's.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Of requests without guidance; default: the student's.")
    ] = None,
    true_cfg_scale: Annotated[
        float | None, typer.Option(help="Of requests without true_cfg, of FLUX.1; default: the student's.")
    ] = None,
    max_sequence_length: Annotated[
        int | None, typer.Option(min=1, help="T5 tokens of a prompt; default: the student's.")
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Pixels of the largest image, of all frames of a video.")
    ] = None,
    max_request_seconds: Annotated[float | None, typer.Option(help="Time that a request may take.")] = None,
    leave_seconds: Annotated[
        float | None, typer.Option(help="After SIGTERM: not ready, but answering, until load balancers have noticed.")
    ] = None,
    drain_seconds: Annotated[float | None, typer.Option(help="After that, at most, for what is in flight.")] = None,
) -> None:
    """Serve a student over OpenAI's Images API until Ctrl-C, which finishes what is in flight.

    Options that are not given are those of docs/endpoint.md.

    Example: opd serve runs/quickstart/student --port 8000
    """
    options = {name: value for name, value in locals().items() if value is not None}
    from opd_serving.endpoint import __main__ as endpoint
    from opd_serving.endpoint.server import log_to_stderr, run

    options["claims"] = claims or claims_around(student)
    settings = endpoint.settings(endpoint.parser().parse_args(arguments(options)))
    for line in calls(host, port, keys=api_keys is not None):
        echo(line)
    log_to_stderr()
    raise typer.Exit(int(run(settings)))


def arguments(options: Mapping[str, Any]) -> list[str]:
    """Of `python -m opd_serving.endpoint`, which has the defaults."""
    return [
        f"--{name.replace('_', '-')}={each}"
        for name, value in options.items()
        for each in (value if isinstance(value, list) else [value])
    ]


def calls(host: str, port: int, *, keys: bool) -> list[str]:
    """How to ask for an image: with curl, with OpenAI's client, with this program."""
    reached = "127.0.0.1" if host in ("0.0.0.0", EVERYWHERE) else in_url(host)  # noqa: S104
    url, key = f"http://{reached}:{port}", "$OPD_API_KEY"
    header = f" -H 'Authorization: Bearer '\"{key}\"" if keys else ""
    body = f'{{"prompt": "{_PROMPT}"}}'
    return [
        "once it takes requests:",
        f"  curl {url}/v1/images/generations -H 'Content-Type: application/json'{header} -d '{body}'",
        f"  OpenAI(base_url='{url}/v1', api_key={'KEY' if keys else repr('none')}).images.generate(prompt='{_PROMPT}')",
        f"  opd generate '{_PROMPT}' --out x.png --url {url}",
    ]


def claims_around(student: str) -> Path:
    """The claims folder of the run that a student directory lies in, else ./claims."""
    for folder in Path(student).absolute().parents:
        if folder.name == "claims":
            return folder
        if (folder / "claims").is_dir():
            return folder / "claims"
    return Path("claims")
