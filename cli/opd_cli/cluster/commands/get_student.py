"""`opd get-student`: a student directory out of the cluster."""

from pathlib import Path
from typing import Annotated

import typer

from opd_cli.cluster.client import Distillations
from opd_cli.cluster.options import Context, Kubeconfig, Name, Namespace, complete_digest
from opd_cli.terminal import echo


def get_student(
    name: Name,
    directory: Annotated[Path, typer.Option("--out", metavar="DIR", help="A folder that is not there yet.")],
    digest: Annotated[
        str | None,
        typer.Argument(
            metavar="DIGEST",
            help="A student of status.students by the first 7 hexadecimal digits or more; default: the newest.",
            autocompletion=complete_digest,
        ),
    ] = None,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Copy a student's LoRA and manifest out of its claim, through a running pod that mounts it; checks the digest.

    Example: opd get-student tiny-three-tasks --out students/tiny
    """
    cluster = Distillations(namespace, kubeconfig=kubeconfig, context=context)
    manifest = cluster.get_student(name, directory, digest)
    echo(f"{directory}: student {manifest.digest}, round {manifest.round}")
