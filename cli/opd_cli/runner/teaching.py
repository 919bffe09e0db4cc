"""TeachersTrained: the teachers that the spec trains, one after another, each with the machine to itself."""

import time
from collections.abc import Collection, Sequence
from dataclasses import replace

from opd_core import roles
from opd_core.api.teachers import ADAPTER, teacher_path, trained_teachers
from opd_core.api.types import Teacher
from opd_core.artifacts import TeacherManifest, read_trained_teacher
from opd_core.brief import named
from opd_core.ports import free_ports
from opd_core.stages import Reason, Stage

from opd_cli.runner.context import Run
from opd_cli.runner.follow import follow
from opd_cli.runner.gpus import place as gpu_placement
from opd_cli.runner.supervise import Job


def teach(run: Run, gpus: Sequence[str] = (), names: Collection[str] = ()) -> None:
    """Train the teachers `names`, by default all that the spec trains. One that is there ends at once, unless it is no
    better than the base and must be: its training then says so again.

    Args:
        gpus: those to choose from, as CUDA_VISIBLE_DEVICES names them; none leaves it to the program.
    """
    teachers = [teacher for teacher in trained_teachers(run.spec) if not names or teacher.name in names]
    if not teachers:
        given = any(teacher.teaches for teacher in run.spec.teachers)
        why = "all teachers are given" if given else "the student learns from rewards alone"
        run.display.stage(Stage.TEACHERS_TRAINED, Reason.DISABLED, why)
        return
    began, missing = time.monotonic(), [teacher for teacher in teachers if not _may_teach(run, teacher)]
    for teacher in missing:
        run.stop.check()
        _train(run, teacher, gpus)
    gains = named([f"{teacher.name} {_gain(run, teacher)}" for teacher in teachers])
    if missing:
        run.work.finish(Stage.TEACHERS_TRAINED, seconds=time.monotonic() - began)
    reason = Reason.COMPLETED if missing else Reason.UP_TO_DATE
    run.display.stage(Stage.TEACHERS_TRAINED, reason, f"gain over the base: {gains}")


def _train(run: Run, teacher: Teacher, gpus: Sequence[str]) -> None:
    training = run.spec.training
    placement = gpu_placement(gpus, training.processes_per_node, 0)
    place = replace(run.place, threads=max(1, run.place.threads // training.processes_per_node))
    folder = teacher_path(run.spec, teacher, run.work.claims)
    resumed = (folder / "checkpoints" / "latest").exists()
    reason = Reason.RESUMED if resumed else Reason.STARTING
    run.display.stage(Stage.TEACHERS_TRAINED, reason, f"teacher {teacher.name} in {folder}")

    def recipe() -> roles.Recipe:
        started = roles.teacher_trainer(place, teacher.name, *free_ports(1))
        return replace(started, env={**started.env, **placement.env_of_trainer})

    with Job(run.supervision, Stage.TEACHERS_TRAINED, recipe) as trainer:
        follow(run, trainer, folder / "checkpoints")


def _may_teach(run: Run, teacher: Teacher) -> bool:
    """Whether it is trained, and better than the base where it has to be."""
    assert teacher.training is not None
    manifest = _manifest(run, teacher)
    return manifest is not None and (manifest.gain.mean > 0 or not teacher.training.must_beat_base)


def _gain(run: Run, teacher: Teacher) -> str:
    """Of a trained teacher over the base, for people."""
    manifest = _manifest(run, teacher)
    assert manifest is not None
    return f"{manifest.gain.mean:.3f} ({manifest.gain.low:.3f} to {manifest.gain.high:.3f})"


def _manifest(run: Run, teacher: Teacher) -> TeacherManifest | None:
    return read_trained_teacher(teacher_path(run.spec, teacher, run.work.claims) / ADAPTER)
