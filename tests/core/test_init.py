"""The first process of a container: real PID namespaces, where the kernel spares it what it has no handler for."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

INIT = (sys.executable, "-m", "opd_core.init")
DEAF = "import time; print('up', flush=True); time.sleep(60)"  # as a program that still imports torch


def container(*command: str) -> "subprocess.Popen[str]":
    unshare = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child")
    return subprocess.Popen([*unshare, *command], stdout=subprocess.PIPE, text=True)


def first(process: "subprocess.Popen[str]") -> int:
    """The process that is number 1 inside."""
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(child)


@pytest.mark.parametrize(("command", "code"), [((*INIT, sys.executable), 143), ((sys.executable,), None)])
def test_a_program_without_a_handler_ends_at_once(command: tuple[str, ...], code: int | None) -> None:
    """By itself, as number 1, it does not."""
    with container(*command, "-c", DEAF) as process:
        assert process.stdout
        assert process.stdout.readline() == "up\n"
        os.kill(first(process), signal.SIGTERM)
        try:
            assert process.wait(5 if code else 1) == code
        except subprocess.TimeoutExpired:
            assert code is None
        finally:
            process.kill()


@pytest.mark.parametrize(("ends", "code"), [("raise SystemExit(6)", 6), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_its_exit_code_is_that_of_the_program(ends: str, code: int) -> None:
    assert subprocess.run([*INIT, sys.executable, "-c", ends], check=False).returncode == code


def test_a_handler_of_the_program_has_its_say() -> None:
    says = "import signal, sys; signal.signal(15, lambda *_: sys.exit(7)); print('up', flush=True); signal.pause()"
    with subprocess.Popen([*INIT, sys.executable, "-c", says], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 7


def test_what_programs_leave_behind_is_buried() -> None:
    leaves = "import os, time\nif os.fork() == 0:\n  if os.fork(): os._exit(0)\n  os._exit(0)\nos.wait(); print('up', flush=True); time.sleep(60)"
    with subprocess.Popen([*INIT, sys.executable, "-c", leaves], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 143
