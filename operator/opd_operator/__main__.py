"""`python -m opd_operator`: watches OPDDistillation objects and brings them about."""

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from opd_core.errors import UnavailableError
from opd_core.exit_codes import ExitCode

from opd_operator import names
from opd_operator.leader import LeaseLostError
from opd_operator.runtime import run
from opd_operator.settings import Settings
from opd_operator.watch import DeadWatchError, NewKindError

log = logging.getLogger("opd_operator")

# The API server takes, and sends to all who watch, what is nested 10,000 deep, as in the managedFields of anybody's
# object; at Python's own 1000 a single one ends every operator that sees it. The parser needs 2 MiB of stack for it.
_DEPTH = 12_000

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m opd_operator", description=__doc__)
    tag = metadata.version("diffusion-opd")
    for role in ("trainer", "teacher", "endpoint"):
        options.add_argument(
            f"--{role}-image", default=f"diffusion-opd/{role}:{tag}", help=f"default image of {role} pods"
        )
    options.add_argument(
        "--pull-secret", action="append", default=[], metavar="NAME", help="repeatable; Secret in a pod's namespace"
    )
    options.add_argument(
        "--fixed-user",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="pods of distillations run as user and group 65532; without, as whom the cluster gives them",
    )
    options.add_argument(
        "--network-policies",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="close what the pods of distillations do not need",
    )
    options.add_argument(
        "--extra-egress",
        type=_rules,
        default=(),
        metavar="JSON",
        help="list of NetworkPolicyEgressRules that the policies of distillations have, too",
    )
    options.add_argument(
        "--watch-namespace", action="append", default=[], metavar="NS", help="repeatable; default: all namespaces"
    )
    options.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="what pods compute on")
    options.add_argument("--metrics-port", type=int, default=8080)
    options.add_argument("--probe-port", type=int, default=8081)
    options.add_argument("--leader-election", action=argparse.BooleanOptionalAction, default=True)
    options.add_argument("--lease-namespace", default=_own_namespace())
    options.add_argument("--lease-name", default="diffusion-opd-operator")
    options.add_argument("--workers", type=int, default=8, help="objects that are looked at side by side")
    options.add_argument("--resync-seconds", type=float, default=300.0, help="between two full listings")
    options.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    return options


def settings_of(arguments: argparse.Namespace) -> Settings:
    return Settings(
        images={
            names.TEACHERS: arguments.teacher_image,
            names.TRAINER: arguments.trainer_image,
            names.ENDPOINT: arguments.endpoint_image,
        },
        device=arguments.device,
        namespaces=tuple(arguments.watch_namespace),
        metrics_port=arguments.metrics_port,
        probe_port=arguments.probe_port,
        leader_election=arguments.leader_election,
        lease_name=arguments.lease_name,
        lease_namespace=arguments.lease_namespace,
        workers=arguments.workers,
        pull_secrets=tuple(arguments.pull_secret),
        resync_seconds=arguments.resync_seconds,
        fixed_user=arguments.fixed_user,
        network_policies=arguments.network_policies,
        extra_egress=arguments.extra_egress,
    )


def _rules(text: str) -> tuple[dict[str, Any], ...]:
    rules = json.loads(text)  # a ValueError is argparse's to tell
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise argparse.ArgumentTypeError(f'not a list of rules: {text}; write e.g. [{{"ports": [{{"port": 9000}}]}}]')
    return tuple(rules)


def _own_namespace() -> str:
    return _NAMESPACE_FILE.read_text().strip() if _NAMESPACE_FILE.exists() else "default"


async def _main(settings: Settings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await run(settings, stop)


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    sys.setrecursionlimit(_DEPTH)
    level = os.environ.get("OPD_LOG_LEVEL", arguments.log_level).upper()
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)-7s %(name)s %(message)s")
    logging.getLogger("kopf").setLevel(logging.WARNING)
    try:
        asyncio.run(_main(settings_of(arguments)))
    except (LeaseLostError, DeadWatchError, NewKindError, UnavailableError) as error:
        log.error("%s; starting anew", error)
        return ExitCode.UNAVAILABLE
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
