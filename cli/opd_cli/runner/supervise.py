"""Programs that are started again where that may help: the part of a Deployment and a Job on one machine."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from opd_core.errors import OPDError, RefusedError
from opd_core.exit_codes import ExitCode
from opd_core.roles import Recipe
from opd_core.stages import Reason, Stage

from opd_cli.runner.display import Display
from opd_cli.runner.program import Program
from opd_cli.runner.stop import StopSignal

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
_GRACE_SECONDS = 15.0
_STABLE_SECONDS = 600.0  # a server that was well for so long has its restarts forgotten


class ProgramError(OPDError):
    """A role ended for good; carries its exit code where that is one of ours."""

    def __init__(self, program: Program, code: int) -> None:
        name = program.recipe.name
        super().__init__(f"the {name} ended with code {code}: {program.last_words()}")
        self.exit_code = ExitCode(code) if code in set(ExitCode) else ExitCode.INTERNAL  # type: ignore[misc]


@dataclass(frozen=True)
class Supervision:
    """What supervising needs from the run: where logs go, how often to restart, whom to tell."""

    logs: Callable[[str], Path]
    backoff_limit: int
    display: Display
    stop: StopSignal
    keep_open: tuple[int, ...] = ()


class Job:
    """A program that ends by itself. Use as a context manager; poll `finished`."""

    def __init__(self, supervision: Supervision, stage: Stage, make_recipe: Callable[[], Recipe]) -> None:
        """`make_recipe` is called at every start, so that a port taken by somebody else is not insisted on."""
        self.stage = stage
        self._supervision = supervision
        self._make_recipe = make_recipe
        self._restarts = 0
        self._start_at: float | None = None  # the end of the pause before a restart
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.program.close(0.0 if self._supervision.stop.twice else _GRACE_SECONDS)

    @property
    def recipe(self) -> Recipe:
        return self.program.recipe

    def finished(self) -> bool:
        """Whether it ended well; starts it again after an end that may be retried.

        Raises:
            ProgramError: it failed for good.
        """
        if self._pausing():
            return False
        code = self.program.exit_code
        if code:
            self._restart_or_raise(code)
        return code == ExitCode.OK

    def failure(self) -> ProgramError:
        """The program's end as an error, also where its code says that all was well."""
        return ProgramError(self.program, self.program.exit_code or ExitCode.INTERNAL)

    def _start(self) -> None:
        recipe = self._make_recipe()
        self.program = Program(recipe, self._supervision.logs(recipe.name), self._supervision.keep_open)

    def _pausing(self) -> bool:
        """Whether it waits to be started again; starts it when the pause is over."""
        if self._start_at is None:
            return False
        if time.monotonic() < self._start_at:
            return True
        self._start_at = None
        self._start()
        return False

    def _restart_or_raise(self, code: int, *, always: bool = False) -> None:
        """Plan another start, unless the code forbids it or there were enough.

        Args:
            always: any end may be retried: the program should not end at all.
        """
        ours = {int(known) for known in ExitCode}
        retryable = always or (ExitCode(code).retryable if code in ours else code > 128)  # beyond 128: killed
        if not retryable or self._restarts >= self._supervision.backoff_limit:
            after = f" after {self._restarts} restarts" if self._restarts else ""
            self._tell(Reason.FAILED, f"{self.recipe.name} ended with code {code}{after}")
            raise ProgramError(self.program, code)
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**self._restarts)
        self._restarts += 1
        self._tell(Reason.RESTARTING, f"{self.recipe.name} ended with code {code}; again in {pause:.0f} s")
        self.program.close(grace=0)
        self._start_at = time.monotonic() + pause

    def _tell(self, reason: Reason, message: str) -> None:
        self._supervision.display.stage(self.stage, reason, message)


class Server(Job):
    """A program that answers until it is told to end. Poll `keep_alive`."""

    def __init__(self, supervision: Supervision, stage: Stage, make_recipe: Callable[[], Recipe]) -> None:
        self._prober = ThreadPoolExecutor(1)
        self._answer: Future[bool] | None = None
        self._ready_since: float | None = None
        self._was_ready = False
        self._ask_at = 0.0
        self._misses = 0
        super().__init__(supervision, stage, make_recipe)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        super().__exit__(kind, error, _)
        self._prober.shutdown(wait=False, cancel_futures=True)

    @property
    def ready(self) -> bool:
        return self._ready_since is not None

    def keep_alive(self) -> None:
        """Restart it if it has ended or no longer answers; notice when it begins to answer.

        Raises:
            ProgramError: it failed for good. RefusedError: its answers must not be used, and will not change.
        """
        if self._pausing():
            return
        if (code := self.program.exit_code) is not None:
            # Before it was ready once, its code says whether another start may help.
            self._lost(code, always=self._was_ready)
            return
        probe = self.recipe.liveness if self.ready else self.recipe.readiness
        if self._answer is None:
            if time.monotonic() >= self._ask_at:
                self._answer = self._prober.submit(self.program.answers, probe)
            return
        if not self._answer.done():
            return
        answer, self._answer = self._answer, None
        try:
            well = answer.result()
        except RefusedError as error:
            self._tell(Reason.FAILED, str(error))
            raise
        self._ask_at = time.monotonic() + (probe.period if probe and self.ready else 0.5)
        if well:
            self._found_well()
        elif self.ready and probe:
            self._misses += 1
            if self._misses >= probe.failures:
                self.program.close(grace=2)
                self._lost(int(ExitCode.UNAVAILABLE), always=True)

    def _found_well(self) -> None:
        self._misses = 0
        if self._ready_since is None:
            self._ready_since, self._was_ready = time.monotonic(), True
            # Its address is known from now on: another start must come back at the same ports.
            recipe = self.recipe
            self._make_recipe = lambda: recipe
            if self._restarts:
                self._tell(Reason.COMPLETED, f"{self.recipe.name} answers again")
        elif time.monotonic() - self._ready_since > _STABLE_SECONDS:
            self._restarts = 0

    def _lost(self, code: int, *, always: bool) -> None:
        self._ready_since, self._answer, self._misses = None, None, 0
        self._restart_or_raise(code, always=always)
