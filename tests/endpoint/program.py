"""The endpoint as a process, forked from one that has imported what it imports: that is nine tenths of a start.

`python -m opd_serving.endpoint` itself is started in test_server, `opd serve` in test_commands.
"""

import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path

from opd_core.process import leave

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["opd_serving.endpoint.__main__"])


def _main(arguments: Sequence[str], log: Path) -> None:
    from opd_serving.endpoint.__main__ import main

    with log.open("w") as errors:
        os.dup2(errors.fileno(), 2)
    leave(main(list(arguments)))


class Program:
    """As `subprocess.Popen`; what it says is in `log`."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self.log = log
        self._process = _FORKS.Process(target=_main, args=(arguments, log))
        self._process.start()

    def send_signal(self, number: int) -> None:
        assert self._process.pid
        os.kill(self._process.pid, number)

    def wait(self, seconds: float) -> int:
        self._process.join(seconds)
        assert self._process.exitcode is not None, "it goes on"
        return self._process.exitcode

    def close(self) -> None:
        self._process.kill()
        self._process.join()
