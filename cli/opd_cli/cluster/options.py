"""What the commands have in common: options, completion, output."""

import json
import re
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from opd_core.errors import OPDError

from opd_cli.cluster.client import LATEST, Distillations
from opd_cli.cluster.distillation import Distillation
from opd_cli.cluster.students import known
from opd_cli.terminal import echo

_COMPLETION_SECONDS = 2.0
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Output(StrEnum):
    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


def parse_duration(text: str) -> float:
    """Seconds of 90s, 10m, 24h, 1h30m; of a bare number, too."""
    if re.fullmatch(r"\d+(?:\.\d+)?", text):
        return float(text)
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise typer.BadParameter(f"{text!r} is no duration; write e.g. 90s, 10m, 24h or 1h30m")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def complete_name(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of the objects that the options before it lead to; none where the cluster does not answer at once."""
    try:
        return [each.name for each in _hasty(ctx).list() if each.name.startswith(incomplete)]
    except OPDError:
        return []


def complete_digest(ctx: typer.Context, incomplete: str) -> list[str]:
    try:
        students = known(_hasty(ctx).get(ctx.params["name"]))
    except OPDError:
        return []
    return [word for word in (LATEST, *(each.digest for each in students)) if word.startswith(incomplete)]


def _hasty(ctx: typer.Context) -> Distillations:
    cluster = Distillations(
        ctx.params.get("namespace"), kubeconfig=ctx.params.get("kubeconfig"), context=ctx.params.get("context")
    )
    cluster.connection = replace(cluster.connection, timeout=_COMPLETION_SECONDS)
    return cluster


Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the distillation.", autocompletion=complete_name)]
Namespace = Annotated[
    str | None, typer.Option("--namespace", "-n", help="Namespace; default: the kubeconfig context's own.")
]
Kubeconfig = Annotated[
    Path | None, typer.Option("--kubeconfig", help="Kubeconfig file; default: $KUBECONFIG, then ~/.kube/config.")
]
Context = Annotated[str | None, typer.Option("--context", help="Context of the kubeconfig; default: its current one.")]
Timeout = Annotated[
    float | None,
    typer.Option(
        "--timeout", parser=parse_duration, metavar="DURATION", help="Give up after 90s, 10m, 24h, ...; default: never."
    ),
]
OutputOption = Annotated[Output, typer.Option("--output", "-o", help="How the object is printed.")]


def flags(cluster: Distillations) -> str:
    """What leads another command to the same namespace of the same cluster."""
    elsewhere = cluster.namespace != cluster.connection.namespace
    return (f" -n {cluster.namespace}" if elsewhere else "") + cluster.connection.flags


def print_document(content: Any, output: Output) -> None:
    """One object, or a list of them, as the API server has it."""
    if output == Output.JSON:
        echo(json.dumps(content, indent=2))
    else:
        echo(yaml.safe_dump(content, sort_keys=False).rstrip())


def document(distillation: Distillation) -> dict[str, Any]:
    """Without the bookkeeping of who has set which field."""
    metadata = {key: value for key, value in distillation.manifest["metadata"].items() if key != "managedFields"}
    return {**distillation.manifest, "metadata": metadata}
