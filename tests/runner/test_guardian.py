"""No process survives the runner, whatever happens to it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from opd_cli.runner.program import Program
from opd_core.roles import Recipe

from .conftest import TREE, alive, read_pids, wait_for

Python = Callable[..., Recipe]

RUNNER = """
import sys, time
from pathlib import Path
from opd_cli.runner.program import Program
from opd_core.roles import Recipe
Program(Recipe("role", (sys.executable, "-c", sys.argv[1], sys.argv[2])), Path(sys.argv[3]))
keep = Program(Recipe("role", (sys.executable, "-c", sys.argv[1], sys.argv[2])), Path(sys.argv[3]))
time.sleep(600)
"""


def test_all_descendants_end_with_a_killed_runner(tmp_path: Path, pids_file: Path) -> None:
    runner = subprocess.Popen([sys.executable, "-c", RUNNER, TREE, str(pids_file), str(tmp_path / "log")])
    pids = read_pids(pids_file, 6)
    assert len(alive(pids)) == 6
    runner.kill()
    runner.wait()
    wait_for(lambda: not alive(pids))


def test_closing_ends_all_descendants(tmp_path: Path, pids_file: Path, python: Python) -> None:
    program = Program(python(TREE, pids_file), tmp_path / "log")
    pids = read_pids(pids_file, 3)
    program.close(grace=10)
    assert not alive(pids)
    assert program.exit_code == 128 + signal.SIGTERM


def test_closing_without_grace_does_not_wait_for_a_program_that_ignores_signals(
    tmp_path: Path, pids_file: Path, python: Python
) -> None:
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + TREE
    program = Program(python(stubborn, pids_file), tmp_path / "log")
    pids = read_pids(pids_file, 3)
    began = time.monotonic()
    program.close(grace=0)
    assert not alive(pids)
    assert time.monotonic() - began < 3


def test_children_of_a_killed_program_end_with_it(tmp_path: Path, pids_file: Path, python: Python) -> None:
    program = Program(python(TREE, pids_file), tmp_path / "log")
    pids = read_pids(pids_file, 3)
    guardians = psutil.Process().children()  # and what other tests keep running, such as a control plane
    (first,) = [child for guardian in guardians for child in guardian.children() if child.pid in pids]
    first.kill()
    wait_for(lambda: program.exit_code is not None)
    assert program.exit_code == 128 + signal.SIGKILL
    assert not alive(pids)


def test_program_dies_with_a_killed_guardian(tmp_path: Path, pids_file: Path, python: Python) -> None:
    source = "import os, sys, time; open(sys.argv[1], 'w').write(f'{os.getpid()}\\n'); time.sleep(600)"
    program = Program(python(source, pids_file), tmp_path / "log")
    (pid,) = read_pids(pids_file, 1)
    os.kill(psutil.Process(pid).ppid(), signal.SIGKILL)
    # The kernel ends the program before its guardian can be waited for.
    wait_for(lambda: not alive([pid]) and program.exit_code is not None)
    assert program.exit_code == 128 + signal.SIGKILL


def test_sigterm_reaches_the_program_and_its_code_comes_back(tmp_path: Path, pids_file: Path, python: Python) -> None:
    source = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "open(sys.argv[1], 'w').write('1\\n')\ntime.sleep(600)"
    )
    program = Program(python(source, pids_file.with_name("ready")), tmp_path / "log")
    wait_for(pids_file.with_name("ready").exists)
    program.terminate()
    wait_for(lambda: program.exit_code is not None)
    assert program.exit_code == 75


def test_command_that_does_not_exist_says_so_in_its_log(tmp_path: Path) -> None:
    program = Program(Recipe("role", ("/no/such/program",)), tmp_path / "log")
    wait_for(lambda: program.exit_code is not None)
    assert program.exit_code == 127
    assert "cannot start /no/such/program" in program.last_words()
