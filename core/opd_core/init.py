"""`python -m opd_core.init COMMAND...`: the first process of a container, which passes signals on and buries the dead.

The kernel spares a first process the signals that it has no handler for: a program that is told to stop while it still
imports torch would hold its GPU until the grace period ends. With one namespace for all processes of a pod, pause would
be the first, and every container that somebody adds to the pod could read our environment, secrets included.
"""

import os
import signal
import sys
from types import FrameType

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main(argv: list[str] | None = None) -> int:
    """Exit code of the command; 128 + N where signal N ended it, or came before it was started."""
    command = sys.argv[1:] if argv is None else argv
    child = 0

    def pass_on(number: int, _: FrameType | None) -> None:
        if not child:
            sys.exit(128 + number)
        os.kill(child, number)

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    child = os.posix_spawnp(command[0], command, os.environ, setsigdef=PASSED_ON)
    while True:
        ended, status = os.wait()
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
