"""`opd status`: all distillations, or one of them, now or live."""

import json
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from opd_core.errors import InvalidError
from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from opd_cli.cluster.advice import next_steps
from opd_cli.cluster.client import Distillations
from opd_cli.cluster.distillation import Distillation
from opd_cli.cluster.options import (
    Context,
    Kubeconfig,
    Namespace,
    Output,
    OutputOption,
    complete_name,
    document,
    flags,
    print_document,
)
from opd_cli.cluster.page import lines, page
from opd_cli.terminal import echo, make_console


def status(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="Name of one distillation; without it all are listed.", autocompletion=complete_name
        ),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Follow it until it is ready or has failed.")] = False,
    all_namespaces: Annotated[
        bool, typer.Option("--all-namespaces", "-A", help="List those of all namespaces.")
    ] = False,
    output: OutputOption = Output.TABLE,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """List distillations, or show one: conditions, progress, last failure, student, endpoint, and what to do next.

    With --watch, a live page in a terminal, a line per change elsewhere, a document per change with -o json or yaml;
    ends with 0 when it is ready, and after a failure with the exit code that says why (4: it missed its gate).

    Example: opd status tiny-three-tasks -w
    """
    if name and all_namespaces:
        raise InvalidError(f"--all-namespaces lists, and {name} names one; leave one of the two out")
    if watch and not name:
        raise InvalidError("--watch follows one distillation; name it")
    cluster = Distillations(namespace, kubeconfig=kubeconfig, context=context)
    if name is None:
        _list(cluster, all_namespaces, output)
    elif watch:
        _watch(cluster, name, output)
    elif output != Output.TABLE:
        print_document(document(cluster.get(name)), output)
    else:
        make_console().print(_page(cluster, cluster.get(name)))


def _list(cluster: Distillations, all_namespaces: bool, output: Output) -> None:
    if output != Output.TABLE:
        items = [document(each) for each in cluster.list(all_namespaces=all_namespaces)]
        print_document({"apiVersion": "v1", "kind": "List", "items": items}, output)
        return
    printed = cluster.printed(all_namespaces=all_namespaces)
    if not printed["rows"]:
        echo("no distillations" + ("" if all_namespaces else f" in namespace {cluster.namespace}"))
        return
    make_console().print(_table(printed, all_namespaces))


def _table(printed: dict[str, Any], all_namespaces: bool) -> Table:
    """The columns that kubectl shows."""
    shown = [i for i, column in enumerate(printed["columnDefinitions"]) if column["priority"] == 0]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in [
        *(["namespace"] if all_namespaces else []),
        *(printed["columnDefinitions"][i]["name"] for i in shown),
    ]:
        table.add_column(title.upper())
    for row in printed["rows"]:
        cells = [row["cells"][i] for i in shown]
        where = [row["object"]["metadata"]["namespace"]] if all_namespaces else []
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in (*where, *cells)))
    return table


def _page(cluster: Distillations, distillation: Distillation) -> RenderableType:
    now = datetime.now(UTC)
    return page(distillation, next_steps(distillation, flags(cluster), now), now)


def _watch(cluster: Distillations, name: str, output: Output) -> None:
    console = make_console()
    if output != Output.TABLE:
        last = _print_documents(cluster, name, output)
    elif console.is_terminal:
        last = _live(cluster, name, console)
    else:
        last = _print_lines(cluster, name, console)
    if last.failure:
        raise last.failure


def _print_documents(cluster: Distillations, name: str, output: Output) -> Distillation:
    for last in cluster.watch(name):
        if output == Output.JSON:
            echo(json.dumps(document(last)))
        else:
            echo("---")
            print_document(document(last), output)
    return last


def _live(cluster: Distillations, name: str, console: Console) -> Distillation:
    last = cluster.get(name)
    with Live(console=console, get_renderable=lambda: _page(cluster, last), refresh_per_second=2):
        for state in cluster.watch(name):
            last = state
    return last


def _print_lines(cluster: Distillations, name: str, console: Console) -> Distillation:
    before: Distillation | None = None
    for last in cluster.watch(name):
        for line in lines(before, last):
            console.print(line, markup=False)
        before = last
    console.print(_page(cluster, last))
    return last
