"""`python -m opd_serving.teacher`: serves the teachers of a spec from tritonserver until it is told to end."""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from opd_core.errors import OPDError
from opd_core.paths import shell_safe
from opd_core.ports import EVERYWHERE, in_url, listen
from opd_core.process import die_with_parent
from opd_core.roles import POD_IP
from opd_core.termination import last_words

from opd_serving.teacher import arguments, server
from opd_serving.teacher.server_binary import find_server

# What opens Triton's administrative protocols. Everybody on the machine can read a command line, so it is no secret but
# something that no client can send: a header ends where its line ends.
_UNSENDABLE = "\n"
_LOOPBACK = "127.0.0.1"  # its HTTP API is asked by the probe alone


def main(argv: list[str] | None = None) -> int:
    """Exit code of the server: 0 after SIGTERM."""
    argv = sys.argv[1:] if argv is None else argv
    options = arguments.parse(argv)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # by way of what cleans up
    try:
        found = find_server()
        for host, port in (
            (options.host, options.grpc_port),
            (_LOOPBACK, options.http_port),
            (options.host, options.metrics_port),
        ):
            listen(host, port).close()
        program = [sys.executable, "-m", "opd_serving.teacher.prepare", *argv]
        prepared = subprocess.run(program, check=False, preexec_fn=die_with_parent).returncode
        if prepared != 0:
            return prepared if prepared > 0 else 128 - prepared  # it has said why
        with ExitStack() as stack:
            prefix = stack.enter_context(_shared_memory(options.grpc_port))
            # Triton gives its Python backend both paths through a shell, unquoted.
            paths = (options.repository.absolute(), *found.backends)
            safe = [stack.enter_context(shell_safe(path)) for path in paths]
            command = [str(found.binary), *server_options(options, *safe, shared_memory_prefix=prefix)]
            return server.run(command, found.env)
    except OPDError as error:
        print(f"teacher server: {error}", file=sys.stderr, flush=True)
        last_words(error.exit_code, str(error))
        return int(error.exit_code)


def server_options(
    options: argparse.Namespace, repository: Path, *backends: Path, shared_memory_prefix: str
) -> list[str]:
    """Options of tritonserver. Loading models over the network is closed twice: it runs code
    (https://github.com/triton-inference-server/server/blob/main/docs/customization_guide/deploy.md)."""
    return [
        f"--model-repository={repository}",
        *(f"--backend-directory={folder}" for folder in backends),
        "--model-control-mode=none",
        "--disable-auto-complete-config",
        "--exit-on-error=true",
        f"--grpc-address={in_url(options.host)}",  # gRPC takes [::] for all addresses there are
        f"--grpc-port={options.grpc_port}",
        "--grpc-http2-max-ping-strikes=0",  # clients ping while they wait
        f"--http-address={_LOOPBACK}",
        f"--http-port={options.http_port}",
        f"--metrics-address={_metrics_address(options.host, os.environ.get(POD_IP, ''))}",
        f"--metrics-port={options.metrics_port}",
        "--allow-gpu-metrics=false",
        f"--grpc-restricted-protocol=model-repository,shared-memory,trace,logging:admin={_UNSENDABLE}",
        f"--http-restricted-api=model-repository,shared-memory,trace,logging:admin={_UNSENDABLE}",
        f"--backend-config=python,shm-region-prefix-name={shared_memory_prefix}",
        "--exit-timeout-secs=10",
    ]


def _metrics_address(host: str, pod_ip: str) -> str:
    """Triton's HTTP servers have one family, and IPv6 has to be said (libevhtp, evhtp_bind_socket)."""
    if host == EVERYWHERE and ":" not in pod_ip:
        return "0.0.0.0"  # noqa: S104
    return f"ipv6:{host}" if ":" in host else host


@contextmanager
def _shared_memory(port: int) -> Iterator[str]:
    """A prefix for the names of the server's regions in shared memory, which a killed server leaves behind."""
    prefix = f"opd_teacher_{port}_"  # nobody else uses the names of this port

    def remove() -> None:
        for region in Path("/dev/shm").glob(f"{prefix}*"):  # noqa: S108  (where the kernel keeps them)
            region.unlink(missing_ok=True)

    remove()
    try:
        yield prefix
    finally:
        remove()


if __name__ == "__main__":
    sys.exit(main())
