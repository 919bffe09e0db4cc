"""Holds one program so that nothing of it outlives the runner, not even when the runner is killed.

Run as its own process: `python guardian.py COMMAND...`, in a session of its own. Standard input is a pipe that the
runner holds open; when it closes, for whatever reason, the program and all its descendants end: after a grace, or at
once if a byte came first. The kernel hands orphans to the guardian (PR_SET_CHILD_SUBREAPER), so programs that leave
their process group, as ranks under torchrun and the stubs of tritonserver do, are found as well. Should somebody kill
the guardian, the program dies with it.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from types import FrameType

import psutil
from opd_core.process import die_with_parent

_PR_SET_CHILD_SUBREAPER = 36
_GRACE_SECONDS = 5.0


def main(command: list[str]) -> int:
    """Exit code of `command`; 128 + N where signal N ended it."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    received: list[int] = []
    program: subprocess.Popen[bytes] | None = None

    def forward(number: int, _: FrameType | None) -> None:
        received.append(number)
        if program is not None:
            program.send_signal(number)  # does nothing once the program has been waited for

    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGINT, forward)
    try:
        program = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent)
    except OSError as error:
        print(f"cannot start {command[0]}: {error}", file=sys.stderr)
        return 127
    if received:  # between the handler and the program
        program.send_signal(received[-1])
    threading.Thread(target=_end_with_runner, args=(program,), daemon=True).start()
    code = program.wait()
    _kill_descendants()
    return 128 - code if code < 0 else code


def _end_with_runner(program: "subprocess.Popen[bytes]") -> None:
    at_once = False
    while os.read(0, 1):
        at_once = True
    if not at_once:
        program.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.wait(_GRACE_SECONDS)
    _kill_descendants()
    os._exit(128 + signal.SIGKILL)


def _kill_descendants() -> None:
    """Until none is left: a process may fork while it is being killed."""
    while descendants := psutil.Process().children(recursive=True):
        for process in descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(descendants, timeout=1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
