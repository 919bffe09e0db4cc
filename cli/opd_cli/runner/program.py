"""A recipe as a process: started under a guardian, probed, ended."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from opd_core import termination
from opd_core.errors import RefusedError
from opd_core.exit_codes import ExitCode
from opd_core.roles import Probe, Recipe

from opd_cli.runner import guardian
from opd_cli.web import open_url

_TAIL_LINES = 15


class Program:
    """One running recipe. Its output goes to `log`, its last words to the .json beside it; closing it ends it and all
    its descendants."""

    def __init__(self, recipe: Recipe, log: Path, keep_open: Sequence[int] = ()) -> None:
        """`keep_open`: file descriptors that stay open until the last of its processes is gone."""
        self.recipe = recipe
        self.log = log
        self._asked = False
        self._words = log.with_suffix(".json")
        log.parent.mkdir(parents=True, exist_ok=True)
        self._words.unlink(missing_ok=True)  # an earlier start's
        with log.open("ab") as output:
            output.write(f"\n# {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(recipe.argv)}\n".encode())
            output.flush()
            self._process = subprocess.Popen(
                [sys.executable, "-P", guardian.__file__, *recipe.argv],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment({**recipe.env, termination.VARIABLE: str(self._words)}),
                pass_fds=keep_open,
                start_new_session=True,  # Ctrl-C in the terminal reaches the runner alone
            )

    @property
    def exit_code(self) -> int | None:
        """None while it runs; 128 + N where signal N ended it."""
        code = self._process.poll()
        return 128 - code if code is not None and code < 0 else code

    def terminate(self) -> None:
        """Ask the program to end in its own way; once, because the trainer takes a second time as a kill."""
        if not self._asked and self._process.poll() is None:
            self._asked = True
            self._process.terminate()

    def close(self, grace: float) -> None:
        """End it: politely for `grace` seconds, then for good."""
        assert self._process.stdin is not None
        if grace:
            self.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace)
        with contextlib.suppress(BrokenPipeError):  # it may end meanwhile
            if self._process.poll() is None:
                self._process.stdin.write(b"!")
            self._process.stdin.close()
        self._process.wait()

    def answers(self, probe: Probe | None) -> bool:
        """Whether `probe` succeeds now; without a probe it does.

        Raises:
            RefusedError: it will not succeed later either, in the probe's own words.
        """
        if probe is None:
            return True
        if probe.argv:
            try:
                done = subprocess.run(probe.argv, capture_output=True, text=True, timeout=probe.timeout, check=False)
            except subprocess.TimeoutExpired:
                return False
            if done.returncode == ExitCode.REFUSED:
                raise RefusedError(f"the {self.recipe.name} cannot be used: {done.stderr.strip()}")
            return done.returncode == 0
        url = f"http://127.0.0.1:{self.recipe.ports[probe.port]}{probe.http_path}"
        try:
            with open_url(url, probe.timeout) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def last_words(self) -> str:
        """Why it ended: what it said itself, as pods do, or else the end of its log."""
        if words := termination.read_last_words(self._words):
            return f"{words['message']}\n    (log: {self.log})"
        lines = self.log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
        return "\n    ".join([f"the end of {self.log} is", *lines])


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    # DeepSpeed looks for its tools (ninja) on the PATH: beside this interpreter.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, **extra}
