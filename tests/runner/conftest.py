"""Small real programs to supervise, and what the tests wait for."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from opd_core.roles import Recipe

# A program whose descendants leave its session and ignore SIGTERM, as ranks and stubs may; it writes all their pids.
TREE = """
import os, signal, sys, time
file = sys.argv[1]
def note():
    with open(file, "a") as f:
        f.write(f"{os.getpid()}\\n")
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        os.setsid()
    note()
    time.sleep(600)
note()
time.sleep(600)
"""


@pytest.fixture
def python() -> Callable[..., Recipe]:
    """A recipe of a Python program."""

    def make(source: str, *arguments: object, name: str = "role", **parts: object) -> Recipe:
        return Recipe(name, (sys.executable, "-c", source, *map(str, arguments)), **parts)  # type: ignore[arg-type]

    return make


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def read_pids(file: Path, count: int) -> list[int]:
    """The processes that wrote themselves into `file`, once they are `count`."""
    wait_for(lambda: file.exists() and len(file.read_text().splitlines()) >= count)
    return [int(line) for line in file.read_text().splitlines()]


def alive(pids: list[int]) -> list[int]:
    def runs(pid: int) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        return False

    return [pid for pid in pids if runs(pid)]


@pytest.fixture
def pids_file(tmp_path: Path) -> Iterator[Path]:
    """A file that processes write their pids into; whoever is left is killed after the test."""
    file = tmp_path / "pids"
    yield file
    for pid in map(int, file.read_text().split()) if file.exists() else []:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).kill()
