"""`opd events`: what Kubernetes tells about a distillation."""

import dataclasses
from datetime import UTC, datetime

from rich.table import Table
from rich.text import Text

from opd_cli.cluster.client import Distillations
from opd_cli.cluster.distillation import parse_time
from opd_cli.cluster.options import Context, Kubeconfig, Name, Namespace, Output, OutputOption, print_document
from opd_cli.cluster.page import ago
from opd_cli.terminal import echo, make_console


def events(
    name: Name,
    output: OutputOption = Output.TABLE,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Print the events of a distillation and of its pods, oldest first; a cluster keeps them for an hour or so.

    Example: opd events tiny-three-tasks
    """
    found = Distillations(namespace, kubeconfig=kubeconfig, context=context).events(name)
    if output != Output.TABLE:
        print_document([dataclasses.asdict(event) for event in found], output)
        return
    if not found:
        echo(f"no events of {name}")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("LAST SEEN", "TYPE", "REASON", "OBJECT", "MESSAGE"):
        table.add_column(title)
    now = datetime.now(UTC)
    for event in found:
        seen = ago(parse_time(event.time), now) + (f" (x{event.count})" if event.count > 1 else "")
        style = "yellow" if event.type == "Warning" else ""
        cells = (event.type, event.reason, event.object, event.message)
        table.add_row(seen, *(Text(cell) for cell in cells), style=style)
    make_console().print(table)
