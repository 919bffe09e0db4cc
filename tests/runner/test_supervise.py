"""What ends is started again where that may help, and not otherwise."""

import json
import os
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from opd_cli.runner import supervise
from opd_cli.runner.display import Display
from opd_cli.runner.stop import StopSignal
from opd_cli.runner.supervise import Job, ProgramError, Server, Supervision
from opd_core.errors import RefusedError
from opd_core.exit_codes import ExitCode
from opd_core.ports import free_ports
from opd_core.roles import Probe, Recipe
from opd_core.stages import Reason, Stage

from .conftest import wait_for

Python = Callable[..., Recipe]

# Ends with the codes it is given, one a start, then with 0.
CODES = """
import pathlib, sys
file, codes = pathlib.Path(sys.argv[1]), [int(c) for c in sys.argv[2:]]
starts = int(file.read_text()) if file.exists() else 0
file.write_text(str(starts + 1))
print(f"start {starts}", flush=True)
sys.exit(codes[starts] if starts < len(codes) else 0)
"""

# Answers 200 on its port; SIGUSR1 makes it hang.
WEB = """
import http.server, os, signal, sys, threading, time
hang = threading.Event()
signal.signal(signal.SIGUSR1, lambda *_: hang.set())
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        while hang.is_set():
            time.sleep(1)
        self.send_response(200); self.end_headers(); self.wfile.write(str(os.getpid()).encode())
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "_FIRST_PAUSE", 0.05)


@pytest.fixture
def supervision(tmp_path: Path) -> Supervision:
    display = Display(tmp_path / "events.jsonl")
    return Supervision(lambda name: tmp_path / f"{name}.log", 2, display, StopSignal())


def reasons(tmp_path: Path) -> list[str]:
    file = tmp_path / "events.jsonl"
    return [json.loads(line)["reason"] for line in file.read_text().splitlines()] if file.exists() else []


def finish(job: Job) -> None:
    wait_for(job.finished)


@pytest.mark.parametrize("code", [ExitCode.UNAVAILABLE, ExitCode.TERMINATED, 128 + signal.SIGSEGV])
def test_job_is_started_again_after_a_retryable_end(
    code: int, tmp_path: Path, supervision: Supervision, python: Python
) -> None:
    with Job(supervision, Stage.TRAINED, lambda: python(CODES, tmp_path / "starts", int(code), int(code))) as job:
        finish(job)
    assert (tmp_path / "starts").read_text() == "3"
    assert reasons(tmp_path) == [Reason.RESTARTING, Reason.RESTARTING]


def test_job_killed_by_the_kernel_is_started_again(tmp_path: Path, supervision: Supervision, python: Python) -> None:
    source = (
        "import os, pathlib, sys; f = pathlib.Path(sys.argv[1])\nif not f.exists(): f.touch(); os.kill(os.getpid(), 9)"
    )
    with Job(supervision, Stage.TRAINED, lambda: python(source, tmp_path / "once")) as job:
        finish(job)
    assert reasons(tmp_path) == [Reason.RESTARTING]


def test_job_fails_at_the_backoff_limit(tmp_path: Path, supervision: Supervision, python: Python) -> None:
    with (
        pytest.raises(ProgramError, match=r"start 2") as caught,
        Job(supervision, Stage.TRAINED, lambda: python(CODES, tmp_path / "starts", 75, 75, 75)) as job,
    ):
        finish(job)
    assert caught.value.exit_code == ExitCode.UNAVAILABLE
    assert str(tmp_path / "role.log") in str(caught.value)
    assert reasons(tmp_path) == [Reason.RESTARTING, Reason.RESTARTING, Reason.FAILED]


@pytest.mark.parametrize("code", [1, 2, 3, 5, 74])
def test_job_is_not_started_again_after_a_final_end(
    code: int, tmp_path: Path, supervision: Supervision, python: Python
) -> None:
    with (
        pytest.raises(ProgramError) as caught,
        Job(supervision, Stage.TRAINED, lambda: python(CODES, tmp_path / "starts", code)) as job,
    ):
        finish(job)
    assert caught.value.exit_code == code
    assert (tmp_path / "starts").read_text() == "1"


def test_pauses_double(
    tmp_path: Path, supervision: Supervision, python: Python, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "_FIRST_PAUSE", 0.4)
    began = time.monotonic()
    with Job(supervision, Stage.TRAINED, lambda: python(CODES, tmp_path / "starts", 75, 75)) as job:
        finish(job)
    assert time.monotonic() - began > 0.4 + 0.8


@pytest.fixture
def web(python: Python) -> Callable[[], Recipe]:
    def make() -> Recipe:
        (port,) = free_ports(1)
        ready = Probe(http_path="/", port="http", timeout=1)
        alive = Probe(http_path="/", port="http", timeout=1, period=0, failures=2)
        return python(WEB, port, name="web", ports={"http": port}, readiness=ready, liveness=alive)

    return make


def keep_until(server: Server, condition: Callable[[], object]) -> None:
    def step() -> object:
        server.keep_alive()
        return condition()

    wait_for(step)


def pid_of(server: Server) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.recipe.ports['http']}/", timeout=5) as answer:
        return int(answer.read())


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGUSR1], ids=["killed", "hangs"])
def test_server_comes_back_at_the_same_port(
    fault: int, tmp_path: Path, supervision: Supervision, web: Callable[[], Recipe]
) -> None:
    with Server(supervision, Stage.TEACHERS_READY, web) as server:
        keep_until(server, lambda: server.ready)
        before, port = pid_of(server), server.recipe.ports["http"]
        os.kill(before, fault)
        keep_until(server, lambda: not server.ready)
        keep_until(server, lambda: server.ready)
        assert server.recipe.ports["http"] == port
        assert pid_of(server) != before
    assert reasons(tmp_path) == [Reason.RESTARTING, Reason.COMPLETED]


def test_a_proxy_of_the_environment_is_not_asked_about_this_machine(
    supervision: Supervision, web: Callable[[], Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_ports(1)[0]}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server(supervision, Stage.DEPLOYED, web) as server:
        keep_until(server, lambda: server.ready)


def test_port_is_free_after_the_server_is_closed(supervision: Supervision, web: Callable[[], Recipe]) -> None:
    with Server(supervision, Stage.DEPLOYED, web) as server:
        keep_until(server, lambda: server.ready)
        port = server.recipe.ports["http"]
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_server_that_finds_its_port_taken_gets_another(
    tmp_path: Path, supervision: Supervision, web: Callable[[], Recipe]
) -> None:
    recipes = iter([replace(web(), argv=(sys.executable, "-c", "exit(75)")), web()])
    with Server(supervision, Stage.DEPLOYED, lambda: next(recipes)) as server:
        keep_until(server, lambda: server.ready)
    assert reasons(tmp_path) == [Reason.RESTARTING, Reason.COMPLETED]


def test_server_that_cannot_start_fails_with_its_own_words(supervision: Supervision, web: Callable[[], Recipe]) -> None:
    failing = (sys.executable, "-c", "print('no such teacher'); exit(2)")
    with (
        pytest.raises(ProgramError, match="no such teacher") as caught,
        Server(supervision, Stage.TEACHERS_READY, lambda: replace(web(), argv=failing)) as server,
    ):
        keep_until(server, lambda: server.ready)
    assert caught.value.exit_code == ExitCode.INVALID


def test_last_words_are_the_message_as_in_a_pod(tmp_path: Path, supervision: Supervision, python: Python) -> None:
    source = (
        "import os, pathlib\n"
        'pathlib.Path(os.environ[\'OPD_TERMINATION_LOG\']).write_text(\'{"exitCode": 3, "message": "another base"}\')\n'
        "print('a table of options'); exit(3)"
    )
    with (
        pytest.raises(ProgramError, match="the role ended with code 3: another base") as caught,
        Job(supervision, Stage.TRAINED, lambda: python(source)) as job,
    ):
        finish(job)
    assert "a table of options" not in str(caught.value)
    assert str(tmp_path / "role.log") in str(caught.value)


def test_last_words_of_an_earlier_start_are_forgotten(tmp_path: Path, supervision: Supervision, python: Python) -> None:
    """A start that says so and may be retried, then one that is killed before it can say anything."""
    source = (
        "import os, pathlib, sys\n"
        "words = pathlib.Path(os.environ['OPD_TERMINATION_LOG'])\n"
        "if pathlib.Path(sys.argv[1]).exists(): print('second start'); sys.exit(5)\n"
        'pathlib.Path(sys.argv[1]).touch(); words.write_text(\'{"message": "first start"}\'); sys.exit(75)'
    )
    with (
        pytest.raises(ProgramError, match="ended with code 5: the end of .* is") as caught,
        Job(supervision, Stage.TRAINED, lambda: python(source, tmp_path / "once")) as job,
    ):
        finish(job)
    assert str(caught.value).endswith("second start")


@pytest.mark.parametrize("code", [ExitCode.REFUSED, ExitCode.UNAVAILABLE])
def test_probe_that_refuses_ends_the_wait(
    code: ExitCode, tmp_path: Path, supervision: Supervision, python: Python
) -> None:
    """Any other failure of a probe may pass."""
    once = f"import pathlib, sys; f = pathlib.Path({str(tmp_path / 'asked')!r})\nif f.exists(): sys.exit(0)\n"
    source = f"{once}f.touch(); print('answered NaN', file=sys.stderr); sys.exit({int(code)})"
    probe = Probe(argv=(sys.executable, "-c", source), timeout=60)
    server = Server(supervision, Stage.TEACHERS_READY, lambda: python("import time; time.sleep(600)", readiness=probe))
    with server:
        if code == ExitCode.REFUSED:
            with pytest.raises(RefusedError, match="the role cannot be used: answered NaN"):
                keep_until(server, lambda: server.ready)
            assert reasons(tmp_path) == [Reason.FAILED]
        else:
            keep_until(server, lambda: server.ready)


def test_slow_probe_does_not_hold_the_runner_up(supervision: Supervision, python: Python) -> None:
    slow = Probe(argv=(sys.executable, "-c", "import time; time.sleep(3)"), timeout=2)
    with Server(supervision, Stage.DEPLOYED, lambda: python("import time; time.sleep(600)", readiness=slow)) as server:
        began = time.monotonic()
        for _ in range(5):
            server.keep_alive()
        assert time.monotonic() - began < 1
        assert not server.ready
