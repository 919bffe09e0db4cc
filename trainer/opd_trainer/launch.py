"""`python -m opd_trainer.launch`: starts this node's ranks and ends with the exit code of the one that failed first.

The ranks find each other as under torchrun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; on several nodes
from torchrun's own PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT), and torchrun can start them too. This
launcher exists because torchrun exits with 1 whatever went wrong, and gives its ranks 30 seconds after SIGTERM, which
is less than a round of a large model. A rank that lost its peers ends with UNAVAILABLE (75): start again to continue.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from types import FrameType

from opd_core.api.load import load_spec
from opd_core.api.training import Training
from opd_core.errors import InvalidError, OPDError
from opd_core.exit_codes import ExitCode
from opd_core.ports import free_ports
from opd_core.roles import evaluator_processes

from opd_trainer import arguments

_POLL_SECONDS = 0.05
# For ranks that notice the loss of a peer by themselves; the others wait for it in a collective and hear no signal.
_GRACE_SECONDS = 5.0
_LEAST_TELLING = (ExitCode.UNAVAILABLE, ExitCode.INTERNAL)


def main(argv: list[str] | None = None) -> int:
    """Starts the evaluator's ranks, all on this machine, after the word `evaluate`; after `teach` this node's ranks of
    a teacher's training; else the student's."""
    argv = sys.argv[1:] if argv is None else argv
    programs = {"evaluate": arguments.evaluator, "teach": arguments.teacher_trainer}
    word = argv[0] if argv and argv[0] in programs else "train"
    options = argv[1:] if word in programs else argv
    args = programs.get(word, arguments.trainer)().parse_args(options)
    try:
        spec = load_spec(args.spec).spec
        training = spec.training
        if word == "evaluate":
            ranks = {"nodes": 1, "processes_per_node": evaluator_processes(spec)}
            training = training.model_copy(update=ranks)
        environments = rank_environments(training, os.environ)
    except OPDError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return supervise([sys.executable, "-m", f"opd_trainer.{word}", *options], environments)


def rank_environments(training: Training, environ: Mapping[str, str]) -> list[dict[str, str]]:
    """The environment of each rank on this node.

    Raises:
        InvalidError: several nodes, and the environment does not say which one this is.
    """
    if training.nodes > 1:
        missing = [name for name in ("PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT") if name not in environ]
        if missing:
            raise InvalidError(
                f"training.nodes is {training.nodes}, which needs {', '.join(missing)} in the environment"
            )
        if environ.get("PET_NNODES", str(training.nodes)) != str(training.nodes):
            raise InvalidError(
                f"PET_NNODES is {environ['PET_NNODES']}, training.nodes is {training.nodes}; make them equal"
            )
        node, address, port = int(environ["PET_NODE_RANK"]), environ["PET_MASTER_ADDR"], environ["PET_MASTER_PORT"]
    else:
        node, address, port = 0, "127.0.0.1", str(free_ports(1)[0])
    local = training.processes_per_node
    # As many as fit beside each other: left open, each rank would take all cores for its noise, prompts and checks.
    threads = max(1, len(os.sched_getaffinity(0)) // local)
    return [
        {
            "OMP_NUM_THREADS": str(threads),
            **environ,
            "RANK": str(node * local + i),
            "LOCAL_RANK": str(i),
            "LOCAL_WORLD_SIZE": str(local),
            "WORLD_SIZE": str(training.world_size),
            "MASTER_ADDR": address,
            "MASTER_PORT": port,
        }
        for i in range(local)
    ]


def supervise(command: list[str], environments: list[dict[str, str]]) -> int:
    """Run one process per environment. Stop signals are passed on; a failure ends the other ranks.

    Returns:
        0 if all ranks succeed, else the code of the rank that failed first; 128 + N where signal N ended it, but
        UNAVAILABLE for SIGABRT.
    """
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    # A session of their own: Ctrl-C in a terminal reaches the launcher alone, which passes it on once.
    ranks: list[subprocess.Popen[bytes]] = []
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for environment in environments:
            ranks.append(subprocess.Popen(command, env=environment, start_new_session=True))
            if received:
                ranks[-1].send_signal(received[-1])
        first = _first_failure(ranks)
        if first:
            _wait(ranks, _GRACE_SECONDS)
        return _cause([first, *_failures(ranks)])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
                rank.wait()


def _first_failure(ranks: list["subprocess.Popen[bytes]"]) -> int:
    while not (failures := _failures(ranks)):
        if all(rank.poll() == 0 for rank in ranks):
            return ExitCode.OK
        time.sleep(_POLL_SECONDS)
    return _cause(failures)


def _failures(ranks: list["subprocess.Popen[bytes]"]) -> list[int]:
    return [_exit_code(code) for code in (rank.poll() for rank in ranks) if code]


def _cause(codes: list[int]) -> int:
    """The first of them; but a rank that lost its peer says UNAVAILABLE, or breaks with a stack trace, and may be gone
    before the culprit is: any other code tells more."""
    return min(codes, key=lambda code: _LEAST_TELLING.index(code) if code in _LEAST_TELLING else -1)


def _wait(ranks: list["subprocess.Popen[bytes]"], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
        time.sleep(_POLL_SECONDS)


def _exit_code(code: int) -> int:
    """As a shell says it. NCCL's watchdog aborts a rank whose collective failed or timed out before Python hears of it
    (https://github.com/pytorch/pytorch/issues/126544): as under gloo, that is a lost peer."""
    if code == -signal.SIGABRT:
        return ExitCode.UNAVAILABLE
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
