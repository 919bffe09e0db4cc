"""`opd logs`: what the pods of a role print."""

from typing import Annotated

import typer

from opd_cli.cluster.client import Distillations
from opd_cli.cluster.logs import Role
from opd_cli.cluster.options import Context, Kubeconfig, Name, Namespace
from opd_cli.terminal import echo


def logs(
    name: Name,
    role: Annotated[
        Role | None, typer.Argument(metavar="ROLE", help=f"One of {', '.join(Role)}; default: of the stage at work.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Wait for its pods, then print until they end.")
    ] = False,
    previous: Annotated[
        bool, typer.Option("--previous", "-p", help="Of the containers before their last restart.")
    ] = False,
    all_ranks: Annotated[bool, typer.Option("--all-ranks", help="Of every training pod, not only the first.")] = False,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Print the logs of a role's pods, each line with its pod where there are several; of Jobs, those of the newest.

    Ends with 2 and the reason if no pod has started; with --follow it waits for one instead.

    Example: opd logs tiny-three-tasks trainer -f
    """
    cluster = Distillations(namespace, kubeconfig=kubeconfig, context=context)
    lines = cluster.logs(name, role, follow=follow, previous=previous, all_ranks=all_ranks, tell=_tell)
    for line in lines:
        echo(f"{line.pod}  {line.text}" if line.pods > 1 else line.text)


def _tell(text: str) -> None:
    echo(text, err=True)
