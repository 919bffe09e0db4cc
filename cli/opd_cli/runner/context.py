"""What the stages of one run share: where it works, for how long, and what it has reached."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opd_core import roles
from opd_core.api.types import OPDDistillation, Spec
from opd_core.artifacts import MANIFEST, read_student
from opd_core.errors import UnavailableError
from opd_core.stages import Reason, Stage

from opd_cli.runner.display import Display
from opd_cli.runner.stop import StopSignal
from opd_cli.runner.supervise import Server, Supervision
from opd_cli.runner.workfolder import WorkFolder

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Run:
    """`place.threads` is for a program that has the machine to itself; `tensorboard`: whether curves go there, too."""

    distillation: OPDDistillation
    work: WorkFolder
    place: roles.Place
    display: Display
    stop: StopSignal
    began: float
    tensorboard: bool = False

    @property
    def spec(self) -> Spec:
        return self.distillation.spec

    @property
    def supervision(self) -> Supervision:
        return Supervision(
            self.work.log, self.spec.run_policy.backoff_limit, self.display, self.stop, self.work.lock_descriptors
        )

    def student_digest(self) -> str | None:
        """The student of this folder, if there is one."""
        if not (self.work.student / MANIFEST).exists():
            return None
        return read_student(self.work.student)[0].digest

    def deadline(self, stage: Stage) -> Callable[[], None]:
        """A check that raises UnavailableError once the stage, or the whole run, has taken longer than allowed."""
        policy, began = self.spec.run_policy, time.monotonic()
        limits = {
            Stage.TEACHERS_TRAINED: ("teachersTrained", policy.stage_deadlines.teachers_trained),
            Stage.TEACHERS_READY: ("teachersReady", policy.stage_deadlines.teachers_ready),
            Stage.TRAINED: ("trained", policy.stage_deadlines.trained),
            Stage.EVALUATED: ("evaluated", policy.stage_deadlines.evaluated),
            Stage.DEPLOYED: ("deployed", policy.stage_deadlines.deployed),
        }
        field, seconds = limits[stage]

        def check() -> None:
            for name, limit, start in (
                (f"stageDeadlines.{field}", seconds, began),
                ("activeDeadlineSeconds", policy.active_deadline_seconds, self.began),
            ):
                if limit is not None and time.monotonic() - start > limit:
                    self.display.stage(stage, Reason.DEADLINE_EXCEEDED, f"spec.runPolicy.{name} is {limit} s")
                    raise UnavailableError(
                        f"{stage.value} took longer than spec.runPolicy.{name} = {limit} s; raise it, or run again "
                        f"to go on. Logs: {self.work.path / 'logs'}"
                    )

        return check

    def wait_ready(self, servers: Sequence[Server], stage: Stage) -> None:
        """Until all of them answer.

        Raises:
            ProgramError, RefusedError: one never will. UnavailableError: it took too long.
        """
        check_deadline = self.deadline(stage)
        while not all(server.ready for server in servers):
            self.stop.check()
            check_deadline()
            for server in servers:
                server.keep_alive()
            time.sleep(POLL_SECONDS)
