"""`opd suspend`, `resume`, `promote`, `rollback` and `delete`."""

from typing import Annotated

import typer
from opd_core.errors import InvalidError

from opd_cli.cluster.client import LATEST, Distillations
from opd_cli.cluster.distillation import Distillation
from opd_cli.cluster.options import (
    Context,
    Kubeconfig,
    Name,
    Namespace,
    Output,
    OutputOption,
    Timeout,
    complete_digest,
    document,
    flags,
    print_document,
)
from opd_cli.cluster.students import short
from opd_cli.terminal import echo

OfEndpoint = Annotated[bool, typer.Option("--endpoint", help="The endpoint instead of the training.")]


def suspend(
    name: Name,
    endpoint: OfEndpoint = False,
    output: OutputOption = Output.TABLE,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Free what trains and evaluates; the trainer saves a checkpoint first, and what serves goes on serving.

    With --endpoint free the endpoint's pods instead.

    Example: opd suspend tiny-three-tasks
    """
    cluster = Distillations(namespace, kubeconfig=kubeconfig, context=context)
    what, how = ("endpoint suspended", " --endpoint") if endpoint else ("suspended", "")
    then = "brings the same student back" if endpoint else "goes on at the last checkpoint"
    text = f"{what}; opd resume {name}{how}{flags(cluster)} {then}"
    _say(cluster.suspend(name, endpoint=endpoint), text, output)


def resume(
    name: Name,
    endpoint: OfEndpoint = False,
    output: OutputOption = Output.TABLE,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Let a suspended distillation go on at its last checkpoint, or with --endpoint serve the same student again.

    Example: opd resume tiny-three-tasks
    """
    cluster = Distillations(namespace, kubeconfig=kubeconfig, context=context)
    _say(cluster.resume(name, endpoint=endpoint), f"goes on; opd status {name} -w{flags(cluster)} follows it", output)


def promote(
    name: Name,
    digest: Annotated[
        str,
        typer.Argument(
            metavar="DIGEST",
            help="A student of status.students by the first 7 hexadecimal digits or more; or `latest`: the newest that "
            "passes its gate, now and later.",
            autocompletion=complete_digest,
        ),
    ],
    output: OutputOption = Output.TABLE,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Serve this student, whether or not it passed its gate, and keep to it (spec.endpoint.studentDigest).

    Example: opd promote tiny-three-tasks 993586d
    """
    cluster = Distillations(namespace, kubeconfig=kubeconfig, context=context)
    _say_pinned(cluster, cluster.promote(name, digest), output)


def rollback(
    name: Name,
    output: OutputOption = Output.TABLE,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Serve the student before the one that serves now, and keep to it; during a rollout, the one that it replaces.

    `opd promote NAME latest` returns to the newest.

    Example: opd rollback tiny-three-tasks
    """
    cluster = Distillations(namespace, kubeconfig=kubeconfig, context=context)
    _say_pinned(cluster, cluster.rollback(name), output)


def delete(
    name: Name,
    wait: Annotated[bool, typer.Option("--wait", help="Until its pods are gone, too.")] = False,
    timeout: Timeout = None,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Delete a distillation and everything that belongs to it; students and checkpoints stay in their claim.

    Example: opd delete tiny-three-tasks --wait --timeout=10m
    """
    if timeout is not None and not wait:
        raise InvalidError("--timeout limits --wait, which is missing")
    cluster = Distillations(namespace, kubeconfig=kubeconfig, context=context)
    output = cluster.get(name).spec["student"]["output"]["uri"]
    cluster.delete(name, wait=wait, timeout=timeout)
    echo(f"opd/{name} deleted; its students and checkpoints stay in {output} and {output}.runs")


def _say_pinned(cluster: Distillations, distillation: Distillation, output: Output) -> None:
    pinned = distillation.spec["endpoint"]["studentDigest"]
    what = f"student {short(pinned)}" if pinned else f"the {LATEST} student that passes its gate"
    _say(distillation, f"shall serve {what}; opd status {distillation.name} -w{flags(cluster)} follows it", output)


def _say(distillation: Distillation, text: str, output: Output) -> None:
    if output == Output.TABLE:
        echo(f"opd/{distillation.name} {text}")
    else:
        print_document(document(distillation), output)
