"""The student directory that a finished run leaves."""

from pathlib import Path

from opd_core.api.load import spec_digest
from opd_core.api.teachers import teacher_uri
from opd_core.api.types import OPDDistillation, Spec
from opd_core.artifacts import (
    Recipe,
    SamplingDefaults,
    Source,
    StudentManifest,
    TeacherSource,
    installed_versions,
    write_student,
)
from opd_core.models.adapters import save_adapter
from opd_core.models.pipeline import Model
from torch import Tensor

from opd_trainer.checkpoint import Identity
from opd_trainer.ema import Ema
from opd_trainer.run import STUDENT


def averaged_state(model: Model, ema: Ema) -> dict[str, Tensor]:
    """The averaged adapter by PEFT's key."""
    names = [name for name, _ in model.transformer.named_parameters() if f".{STUDENT}." in name]
    return {name.replace(f".{STUDENT}.", "."): tensor for name, tensor in zip(names, ema.tensors, strict=True)}


def save_student(
    directory: Path, distillation: OPDDistillation, model: Model, ema: Ema, identity: Identity
) -> StudentManifest:
    """The averaged weights, in float32, with where they come from."""
    spec = distillation.spec
    state = averaged_state(model, ema)

    def describe(digest: str) -> StudentManifest:
        return StudentManifest(
            name=distillation.metadata.name,
            digest=digest,
            base=Source(uri=spec.model.uri, fingerprint=identity.base),
            teachers=[
                TeacherSource(
                    name=teacher.name,
                    uri=teacher_uri(spec, teacher),
                    fingerprint=identity.teachers[teacher.name],
                    guidance_scale=teacher.guidance_scale,
                    true_cfg_scale=teacher.true_cfg_scale,
                    prompts_uri=teacher.prompts.uri,
                    prompts_digest=identity.prompts[teacher.name],
                )
                for teacher in spec.teachers
                if teacher.name in identity.teachers  # nobody teaches who learns from rewards
            ],
            spec_digest=spec_digest(distillation),
            round=spec.training.rounds,
            recipe=_recipe(spec),
            sampling=SamplingDefaults(
                width=spec.training.resolution.width,
                height=spec.training.resolution.height,
                frames=spec.training.resolution.frames,
                steps=spec.evaluation.sampler.steps,
                guidance_scale=spec.training.guidance_scale,
                true_cfg_scale=spec.training.true_cfg_scale,
                max_sequence_length=spec.model.max_sequence_length,
            ),
            license=f"that of the base model {spec.model.uri}",
            versions=installed_versions(),
        )

    return write_student(directory, lambda folder: save_adapter(model.transformer, folder, STUDENT, state), describe)


def _recipe(spec: Spec) -> Recipe:
    training, adapter = spec.training, spec.student.adapter
    learning = training.reinforcement
    return Recipe(
        method=training.method.value,
        objective=training.objective.type if learning is None else learning.algorithm.value,
        sampler=f"{training.sampler.solver} {training.sampler.type.value}",
        steps=training.sampler.steps,
        rank=adapter.rank,
        alpha=adapter.alpha,
        init_from=spec.student.init_from or ("the mean of the teachers" if spec.student.init_from_teachers else ""),
        learning_rate=training.optimizer.learning_rate,
        seed=training.seed,
        evaluation_seed=spec.evaluation.seed,
    )
