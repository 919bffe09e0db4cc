"""`opd wait`: until a condition is True, or cannot become so."""

from typing import Annotated

import typer
from opd_core.stages import Condition

from opd_cli.cluster.client import Distillations
from opd_cli.cluster.options import (
    Context,
    Kubeconfig,
    Name,
    Namespace,
    Output,
    OutputOption,
    Timeout,
    document,
    print_document,
)
from opd_cli.terminal import echo


def wait(
    name: Name,
    condition: Annotated[
        Condition,
        typer.Option("--for", case_sensitive=False, metavar="CONDITION", help=f"One of {', '.join(Condition)}."),
    ],
    timeout: Timeout = None,
    output: OutputOption = Output.TABLE,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Wait until a condition is True of the newest spec; end at once when it cannot become True any more.

    Ends with 0 when it is True, 75 when time is up, and after a failure with the exit code that says why (4: gate).

    Example: opd wait tiny-three-tasks --for=Deployed --timeout=24h
    """
    cluster = Distillations(namespace, kubeconfig=kubeconfig, context=context)
    distillation = cluster.wait(name, condition, timeout=timeout)
    if output != Output.TABLE:
        print_document(document(distillation), output)
    else:
        found = distillation.condition(condition)
        assert found is not None
        why = f"{found.reason}: {found.message}" if found.message else found.reason
        echo(f"opd/{name} is {condition.value} ({why})")
