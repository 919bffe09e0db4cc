"""Teachers that a spec trains: what it leaves to the algorithm, and where the trained ones are.

A trained teacher is named by the digest of what it depends on, beside the student's folder: a change of the
distillation does not train it again, and distillations whose students are beside each other share it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from opd_core.api.digests import digest, said
from opd_core.api.training import Algorithm, ReinforcementLearning, Sampler, SamplerType, TeacherTraining
from opd_core.api.types import AdapterRef, Spec, Teacher
from opd_core.uris import claim_path

FOLDER = "opd-teachers"  # of all of them, beside the student's folder
ADAPTER = "adapter"  # of one of them, in its own: beside checkpoints and log
CLIP_NUMEL = 65_536  # numbers of the latent for which clip ranges are stated: Stable Diffusion 3.5's at 512 pixels
_KEY_LENGTH = 12
L = TypeVar("L", bound=ReinforcementLearning)
_NOT_WEIGHTS = ("checkpoint", "validateEveryRounds", "mustBeatBase")  # of a teacher's training


@dataclass(frozen=True)
class Defaults:
    """What an algorithm uses where the spec says nothing: the values of its authors, or of its best-known port."""

    sampler: Sampler
    kl_weight: float
    clip_range: float | None


_SDE = Sampler(type=SamplerType.SDE, noise_level=0.7)
DEFAULTS = {
    Algorithm.DIFFUSION_NFT: Defaults(Sampler(solver="DPM2"), 1e-4, None),
    Algorithm.FLOW_GRPO: Defaults(_SDE, 0.04, 1e-4),
    Algorithm.GRPO_GUARD: Defaults(_SDE, 0.0, 2e-6),
}


def completed(training: TeacherTraining) -> TeacherTraining:
    """With the algorithm's own values where the spec has none; `steps_per_image` is a number then."""
    sampler = training.sampler or DEFAULTS[training.algorithm].sampler
    return completed_for(training, sampler.steps).model_copy(update={"sampler": sampler})


def completed_for(learning: L, steps: int) -> L:
    """The same of what a path of `steps` solver steps is trained with."""
    defaults = DEFAULTS[learning.algorithm]
    return learning.model_copy(
        update={
            "kl_weight": defaults.kl_weight if learning.kl_weight is None else learning.kl_weight,
            "clip_range": defaults.clip_range if learning.clip_range is None else learning.clip_range,
            "steps_per_image": learning.steps_per_image or trainable_steps(steps),
        }
    )


def trainable_steps(steps: int) -> int:
    """All but the last, which has next to no noise left, as in Flow-GRPO's and DiffusionNFT's code; a single one is
    trained all the same."""
    return max(1, steps - 1)


def trained_teachers(spec: Spec) -> list[Teacher]:
    """Those that this spec trains, in its order."""
    return [teacher for teacher in spec.teachers if teacher.training is not None]


def teacher_digest(spec: Spec, teacher: Teacher) -> str:
    """Names everything that the weights of a trained teacher depend on."""
    assert teacher.training is not None
    training = {key: value for key, value in said(teacher.training).items() if key not in _NOT_WEIGHTS}
    task = {key: value for key, value in said(teacher).items() if key != "weight"}
    shared = said(spec.training)
    parts = [said(spec.model), {**task, "training": training}, shared.get("resolution"), shared.get("precision")]
    if not teacher.prompts.held_out_uri:
        parts.append([spec.evaluation.prompts_per_task, spec.evaluation.seed])  # they are held out of its prompts
    return digest(*parts)


def teacher_folder(spec: Spec, teacher: Teacher) -> str:
    """URI of the folder in the output's claim that holds all of a trained teacher: checkpoints, log, adapter."""
    beside = spec.student.output.uri.rstrip("/").rpartition("/")[0]
    return f"{beside}/{FOLDER}/{teacher.name}-{teacher_digest(spec, teacher)[:_KEY_LENGTH]}"


def teacher_path(spec: Spec, teacher: Teacher, claims: Path) -> Path:
    """`teacher_folder` on this machine, whether or not it is there."""
    path = claim_path(teacher_folder(spec, teacher), claims)
    assert path is not None, "types.Output allows claims only"
    return path


def teacher_uri(spec: Spec, teacher: Teacher) -> str:
    """Where the teacher is: its model, or its LoRA, given or trained."""
    return teacher.model.uri if teacher.model else adapter_of(spec, teacher).uri


def adapter_of(spec: Spec, teacher: Teacher) -> AdapterRef:
    """Where the LoRA is of a teacher that has no model of its own, given or trained."""
    assert teacher.teaches
    assert teacher.model is None
    return teacher.adapter or AdapterRef(uri=f"{teacher_folder(spec, teacher)}/{ADAPTER}")
