"""A real teacher server for tests, started as `opd run` starts it."""

import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil
from opd_cli.runner.program import Program
from opd_core import roles
from opd_core.errors import OPDError
from opd_core.ports import free_ports
from opd_serving.teacher.probe import probe


class TeacherServer:
    """Ports of its own; `start` again after `kill` uses the same ones."""

    def __init__(
        self, folder: Path, spec: Path, claims: Path, teachers: Sequence[str] = (), options: Sequence[str] = ()
    ) -> None:
        self.ports = dict(zip(("grpc", "http", "metrics"), free_ports(3), strict=True))
        place = roles.Place(sys.executable, spec, claims, folder, device="cpu", threads=1)
        recipe = roles.teacher_server(place, "teachers", teachers, self.ports)
        self.recipe = replace(recipe, argv=(*recipe.argv, *options))
        self.folder = folder
        self._log = folder / "teachers.log"
        self._program: Program | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.ports['grpc']}"

    @property
    def http(self) -> str:
        return f"127.0.0.1:{self.ports['http']}"

    @property
    def log(self) -> str:
        return self._log.read_text()

    def launch(self) -> Program:
        self._program = Program(self.recipe, self._log)
        return self._program

    def start(self) -> "TeacherServer":
        """Until it answers. One that aborts on its way up is started once more, as `opd run` and the kubelet do: on busy
        cores it sometimes throws boost::interprocess::lock_exception, like the ones in
        https://github.com/triton-inference-server/server/issues/8882."""
        program, again = self.launch(), True
        deadline = time.monotonic() + 240
        while True:
            try:
                probe(self.http, 5)
                return self
            except OPDError as error:
                if program.exit_code == 128 + signal.SIGABRT and again:
                    program, again = self.launch(), False
                if program.exit_code is not None or time.monotonic() > deadline:
                    raise RuntimeError(self.log) from error
                time.sleep(0.2)

    def wait(self, seconds: float = 180.0) -> int:
        """Its exit code, once it has ended."""
        assert self._program is not None
        deadline = time.monotonic() + seconds
        while (code := self._program.exit_code) is None:
            assert time.monotonic() < deadline, self.log
            time.sleep(0.1)
        return code

    def stub(self) -> psutil.Process:
        """The Python process behind the model."""
        (stub,) = [
            process
            for process in psutil.process_iter(["cmdline"])
            if "triton_python_backend_stub" in " ".join(process.info["cmdline"] or [])
            and f"opd_teacher_{self.ports['grpc']}_" in " ".join(process.info["cmdline"])
        ]
        return stub

    def kill(self) -> None:
        """The server and its stub at once, as when a pod is lost."""
        if self._program is not None:
            self._program.close(grace=0)

    def stop(self) -> None:
        if self._program is not None:
            self._program.close(grace=15)
