"""TeachersReady and Trained: the teachers live exactly as long as the training."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

from opd_core import roles
from opd_core.api.digests import weights_digest
from opd_core.brief import named
from opd_core.ports import free_ports
from opd_core.stages import Reason, Stage

from opd_cli.runner.context import Run
from opd_cli.runner.follow import follow
from opd_cli.runner.gpus import Placement
from opd_cli.runner.gpus import place as gpu_placement
from opd_cli.runner.supervise import Job, Server


def is_trained(run: Run) -> bool:
    """Whether the folder holds the student of this spec."""
    trained = run.work.done(Stage.TRAINED)
    return (
        trained is not None
        and trained["spec"] == weights_digest(run.distillation)
        and trained["digest"] == run.student_digest()
    )


def train(run: Run, gpus: Sequence[str] = ()) -> None:
    """Serve the teachers, train the student, stop the teachers; nothing where that is done.

    Args:
        gpus: those to spread over, as CUDA_VISIBLE_DEVICES names them; none leaves it to the programs.
    """
    if is_trained(run):
        run.display.stage(Stage.TEACHERS_READY, Reason.UP_TO_DATE, "not needed")
        run.display.stage(Stage.TRAINED, Reason.UP_TO_DATE, f"student {str(run.student_digest())[:19]}")
        return
    groups, training = roles.teacher_servers(run.spec), run.spec.training
    place = replace(run.place, threads=_share(run.place.threads, len(groups) + training.processes_per_node))
    placement = gpu_placement(gpus, training.processes_per_node, len(groups))
    if gpus:
        run.display.note(str(placement))
    with ExitStack() as stack:
        teachers = _start_teachers(run, place, groups, placement, stack)
        addresses = [f"127.0.0.1:{teacher.recipe.ports['grpc']}" for teacher in teachers]
        began = time.monotonic()
        resumed = (run.work.checkpoints / "latest").exists()
        run.display.stage(Stage.TRAINED, Reason.RESUMED if resumed else Reason.STARTING, "trainer starts")

        def recipe() -> roles.Recipe:
            started = roles.trainer(place, addresses, *free_ports(1), tensorboard=run.tensorboard)
            return replace(started, env={**started.env, **placement.env_of_trainer})

        trainer = stack.enter_context(Job(run.supervision, Stage.TRAINED, recipe))
        follow(run, trainer, run.work.checkpoints, teachers)
        seconds = time.monotonic() - began
        student = run.student_digest()
        if student is None:
            raise trainer.failure()
        for teacher in teachers:
            teacher.program.terminate()  # all at once; leaving the stack waits for each
    run.work.finish(Stage.TRAINED, digest=student, spec=weights_digest(run.distillation), seconds=seconds)
    run.display.stage(Stage.TRAINED, Reason.COMPLETED, f"student {student[:19]} in {seconds:.0f} s")
    if teachers:
        run.display.stage(Stage.TEACHERS_READY, Reason.FREED, "teacher servers stopped")


def _start_teachers(
    run: Run, place: roles.Place, groups: tuple[tuple[str, ...], ...], placement: Placement, stack: ExitStack
) -> list[Server]:
    if not groups:
        run.display.stage(Stage.TEACHERS_READY, Reason.DISABLED, roles.no_servers(run.spec))
        return []
    names = named([teacher.name for teacher in run.spec.teachers])
    run.display.stage(Stage.TEACHERS_READY, Reason.STARTING, f"{len(groups)} Triton server(s) for {names}")
    began = time.monotonic()

    def recipe_of(number: int, group: tuple[str, ...]) -> Callable[[], roles.Recipe]:
        def make() -> roles.Recipe:
            ports = dict(zip(("grpc", "http", "metrics"), free_ports(3), strict=True))
            started = roles.teacher_server(place, f"teachers-{number}", group, ports)
            return replace(started, env={**started.env, **placement.env_of_server(number)})

        return make

    servers = [
        stack.enter_context(Server(run.supervision, Stage.TEACHERS_READY, recipe_of(number, group)))
        for number, group in enumerate(groups)
    ]
    run.wait_ready(servers, Stage.TEACHERS_READY)
    seconds = time.monotonic() - began
    run.work.finish(Stage.TEACHERS_READY, seconds=seconds)
    run.display.stage(Stage.TEACHERS_READY, Reason.COMPLETED, f"{names} answer after {seconds:.0f} s")
    return servers


def _share(cores: int, processes: int) -> int:
    """Threads of each process where several compute at once: more would take turns, slowly."""
    return max(1, cores // processes)
