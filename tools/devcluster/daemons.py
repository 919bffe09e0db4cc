"""Programs that are started together, logged to files, and never outlive the process that started them."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path


class Daemons:
    """The running programs of one cluster, by name, in order of their start.

    The kernel kills each when the thread that started it ends (setpriv --pdeathsig), so a starter that was itself
    killed leaves none behind.
    """

    def __init__(self, logs: Path, binaries: Path) -> None:
        self.logs = logs
        self._path = f"{binaries}:{os.environ.get('PATH', '')}"
        self._commands: dict[str, list[str]] = {}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, command: Sequence[str | Path] | None = None) -> None:
        """Start `command` as `name`; without one, what was last started as `name`."""
        if command is not None:
            self._commands[name] = [str(part) for part in command]
        with (self.logs / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *self._commands[name]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PATH": self._path},
            )

    def names(self) -> list[str]:
        return list(self._running)

    def pid(self, name: str) -> int:
        return self._running[name].pid

    def stop(self, name: str, sig: int = signal.SIGTERM, grace: float = 10) -> None:
        """Send `sig` and wait; after `grace` seconds kill."""
        process = self._running.pop(name)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(sig)
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def stop_all(self, sig: int = signal.SIGTERM) -> None:
        """Last started first: an API server without its etcd would take a minute to stop."""
        for name in reversed(list(self._running)):
            self.stop(name, sig)

    def exited(self) -> list[str]:
        """Names of programs that ended by themselves."""
        return [name for name, process in self._running.items() if process.poll() is not None]

    def wait(self, what: str, ready: Callable[[], bool], seconds: float) -> None:
        """Until `ready`.

        Raises:
            RuntimeError: it took longer, or a program ended; with the last lines of the logs.
        """
        deadline = time.monotonic() + seconds
        while not ready():
            late = time.monotonic() > deadline
            if self.exited() or late:
                reason = f"not there after {seconds:g} s" if late else f"{', '.join(self.exited())} ended"
                raise RuntimeError(f"waiting for {what}: {reason}\n{self._last_words()}")
            time.sleep(0.05)

    def _last_words(self) -> str:
        words = []
        for name in self.exited() or list(self._running):
            lines = (self.logs / f"{name}.log").read_text(errors="replace").splitlines()[-8:]
            words += [f"--- {name}", *lines]
        return "\n".join(words)
