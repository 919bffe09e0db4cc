"""`opd submit`: a spec into the cluster."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from opd_core.api.load import load_spec, parse_spec
from opd_core.errors import InvalidError
from opd_core.stages import Condition

from opd_cli.cluster.client import Distillations
from opd_cli.cluster.options import (
    Context,
    Kubeconfig,
    Namespace,
    Output,
    OutputOption,
    Timeout,
    document,
    flags,
    print_document,
)
from opd_cli.options import Changes
from opd_cli.terminal import echo


def submit(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="An OPDDistillation, YAML or JSON; - is standard input.")
    ],
    changes: Changes = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Let the API server check it, too, and keep nothing.")
    ] = False,
    force_conflicts: Annotated[
        bool, typer.Option("--force-conflicts", help="Take over fields that somebody else has set.")
    ] = False,
    wait: Annotated[
        Condition | None,
        typer.Option("--wait", case_sensitive=False, metavar="CONDITION", help="Then wait for it, as `opd wait` does."),
    ] = None,
    timeout: Timeout = None,
    output: OutputOption = Output.TABLE,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Check a spec, then create or change its object in the cluster (server-side apply).

    The namespace is --namespace, else the file's, else the context's. Ends with 2 if it is refused.

    Example: opd submit distill.yaml --wait=Deployed --timeout=24h
    """
    if timeout is not None and wait is None:
        raise InvalidError("--timeout limits --wait=CONDITION, which is missing")
    if dry_run and wait is not None:
        raise InvalidError(f"--dry-run keeps nothing that could become {wait.value}; leave --wait out")
    if str(file) == "-":
        spec = parse_spec(sys.stdin.read(), "standard input", changes or [])
    else:
        spec = load_spec(file, changes or [])
    cluster = Distillations(namespace or spec.metadata.namespace or None, kubeconfig=kubeconfig, context=context)
    submission = cluster.submit(spec, dry_run=dry_run, force_conflicts=force_conflicts)
    distillation = submission.distillation
    if wait:
        distillation = cluster.wait(distillation.name, wait, timeout=timeout)
    if output != Output.TABLE:
        print_document(document(distillation), output)
        return
    done = f"{submission.change} in namespace {cluster.namespace}"
    echo(f"opd/{distillation.name} {done}" + (" (server dry run: nothing is kept)" if dry_run else ""))
    over = distillation.condition(Condition.FAILED)
    if submission.change == "unchanged" and over and over.status == "True":
        echo(f"  it has failed ({over.reason}: {over.message}) and stays so until something changes")
    if wait is None and not dry_run:
        for line in _next(distillation.name, suspended=bool(distillation.spec.get("suspend")), more=flags(cluster)):
            echo(line)


def _next(name: str, *, suspended: bool, more: str) -> list[str]:
    if suspended:
        return [f"  opd resume {name}{more}    it is suspended: nothing runs until then"]
    return [
        f"  opd status {name} -w{more}    follow it until it is ready",
        f"  opd logs {name} -f{more}    what the stage at work prints",
        f"  opd wait {name} --for=Ready{more}    for scripts",
    ]
