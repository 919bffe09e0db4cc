"""Programs of ours as processes that are forked from one which has imported what they import: nine tenths of a start.

What a user types is started as such in tests/endpoint/test_server, test_commands, tests/trainer/test_program and
tests/runner.
"""

import multiprocessing
import os
import signal
import subprocess
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

from opd_core.process import leave

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["opd_serving.endpoint.__main__", "opd_trainer.train"])


class Program:
    """`python -m MODULE ARGUMENTS`, where the module has a `main`; as `subprocess.Popen`, with its output in `log`."""

    def __init__(self, module: str, arguments: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        self.log = log
        self._process = _FORKS.Process(target=_started, args=(module, list(arguments), log, dict(env or os.environ)))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.log), timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        return self.log.read_text(), None


def _started(module: str, arguments: list[str], log: Path, env: Mapping[str, str]) -> NoReturn:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    launch = import_module("opd_trainer.launch")
    launch.subprocess = SimpleNamespace(Popen=_Rank)
    _run(module, arguments, env)


def _run(module: str, arguments: list[str], env: Mapping[str, str]) -> NoReturn:
    os.environ.clear()
    os.environ.update(env)
    leave(import_module(module).main(arguments))


class _Rank:
    """What the launcher uses of `subprocess.Popen`, for `python -m MODULE ARGUMENTS`."""

    def __init__(self, command: list[str], env: Mapping[str, str], start_new_session: bool) -> None:
        self.returncode: int | None = None
        _, _, module, *arguments = command
        self.pid = os.fork()
        if self.pid == 0:
            if start_new_session:
                os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                _run(module, arguments, env)
            except BaseException:  # it must not go on as its parent would
                traceback.print_exc()
                os._exit(1)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> None:
        _, status = os.waitpid(self.pid, 0)
        self.returncode = os.waitstatus_to_exitcode(status)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
