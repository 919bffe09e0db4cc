"""From a teacher of a spec to the run that trains it: a training like the student's, with one task and rewards."""

from dataclasses import replace
from pathlib import Path
from threading import Event

from opd_core.api.teachers import completed
from opd_core.api.types import Spec, Teacher

from opd_trainer.engine import World
from opd_trainer.evaluation.sampling import student_scales
from opd_trainer.prompts import held_out_prompts
from opd_trainer.reinforcement_setup import build_reinforcement
from opd_trainer.rewards.registry import load_rewards
from opd_trainer.run import Run


def teacher_spec(spec: Spec, teacher: Teacher) -> Spec:
    """The spec of the teacher's training: the same base, resolution, precision and ranks, and what the teacher's own
    `training` says of all else. The base keeps the guidance that it is evaluated with."""
    assert teacher.training is not None
    settings = completed(teacher.training)
    training = spec.training.model_copy(
        update={
            "rounds": settings.rounds,
            "images_per_task": settings.images_per_round,
            "seed": settings.seed,
            "guidance_scale": teacher.guidance_scale,
            "true_cfg_scale": teacher.true_cfg_scale,
            "sampler": settings.sampler,
            "optimizer": settings.optimizer,
            "ema": settings.ema,
            "checkpoint": settings.checkpoint,
        }
    )
    of_base = student_scales(spec)
    evaluation = {
        "every_rounds": settings.validate_every_rounds,
        "guidance_scale": of_base.guidance,
        "true_cfg_scale": of_base.true_cfg,
    }
    start = {"init_from": settings.init_from, "init_from_teachers": False}
    student = spec.student.model_copy(update={"adapter": settings.adapter, **start})
    return spec.model_copy(
        update={
            "training": training,
            "teachers": [teacher.model_copy(update={"weight": 1.0})],
            "student": student,
            "evaluation": spec.evaluation.model_copy(update=evaluation),
        }
    )


def build_teacher_run(spec: Spec, claims: Path, device: str, world: World) -> Run:
    """The run of a `teacher_spec`. Its validation is the whole evaluation of its task."""
    (teacher,) = spec.teachers
    assert teacher.training is not None
    # First of all: a wrong name ends here and not at the first image.
    hurry = Event()
    prompts, rewards = held_out_prompts(spec, claims), load_rewards(spec, device, hurry)
    settings = completed(teacher.training)
    run = build_reinforcement(spec, claims, device, world, settings, prompts, rewards, hurry)
    assert run.validation is not None
    run.validation = replace(run.validation, scales=teacher.scales)
    return run
