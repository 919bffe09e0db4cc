"""What a teacher is on disk: a LoRA on the student's base, or a model of its own that can teach on that base."""

from collections.abc import Callable
from pathlib import Path

from opd_core.api.teachers import adapter_of
from opd_core.api.training import Resolution
from opd_core.api.types import Spec, Teacher
from opd_core.errors import InvalidError
from opd_core.families.family import Outline
from opd_core.models.adapter_file import AdapterFile, read_teacher
from opd_core.models.fingerprint import adapter_fingerprint, components_fingerprint
from opd_core.models.outline import PARTS, Component, components, read_outline

TeacherFiles = AdapterFile | Path  # a Path is the folder of a model in diffusers' format

_KINDS = ("_class_name", "prediction_type")  # of a scheduler's configuration: what the network's answer is


def teacher_files(spec: Spec, teacher: Teacher, find: Callable[[str], Path]) -> TeacherFiles:
    """Raises InvalidError: nothing where the spec says, or no LoRA."""
    if teacher.model:
        return find(teacher.model.uri)
    adapter = adapter_of(spec, teacher)
    return read_teacher(find(adapter.uri), adapter.alpha)


def teacher_fingerprint(files: TeacherFiles) -> str:
    """ "sha256:..." of what a teacher brings: its LoRA, or of its own model the transformer; the rest is the base's
    (`check_teacher_model`)."""
    if isinstance(files, AdapterFile):
        return adapter_fingerprint(files)
    return components_fingerprint([part for part in components(files) if _teaches(part)], read_outline(files).boundary)


def check_teacher_model(place: Path, base: Path | None, resolution: Resolution) -> None:
    """Whether the transformer of the model in `place` can teach a student of `base` (None: it is not here to compare).

    It is asked at the student's latents about the student's prompts, as the base's own text encoders encode them, and
    answers a velocity. So latents and conditionings must be the same, not just as large: text encoders, tokenizers and
    VAE are compared by their fingerprints, file contents and all. The scheduler says only what kind of answer it is:
    which noise levels are visited is the student's business.

    Raises:
        InvalidError: it cannot.
    """
    theirs = read_outline(place)
    parts = {part.name: part for part in components(place)}
    theirs.latent_shape(*resolution.size)
    if base is None:
        return
    if place.samefile(base):
        raise InvalidError("it is the base itself, which teaches nothing")
    ours = read_outline(base)
    wanted = _compared(ours)
    for what, value in _compared(theirs).items():
        if value != wanted[what]:
            raise InvalidError(
                f"its {what} is {value}, the base's is {wanted[what]}: its velocity means nothing to a student of this "
                "base; use a teacher of the base's family and latents"
            )
    if theirs.distilled_steps not in (None, ours.distilled_steps):
        own = f"to {ours.distilled_steps}" if ours.distilled_steps else "to none"
        raise InvalidError(
            f"it was distilled to {theirs.distilled_steps} steps, the base {own}, and a student visits other noise "
            "levels than it answers at; use the model that it was distilled from"
        )
    shared = {part.name: part for part in components(base) if _is_shared(part)}
    for name in sorted(shared.keys() | {part.name for part in parts.values() if _is_shared(part)}):
        own, of_base = (components_fingerprint([of[name]]) if name in of else "none" for of in (parts, shared))
        if own != of_base:
            raise InvalidError(
                f"its {name} is {own}, the base's is {of_base}: a teacher is told, and answers, in the base's own "
                f"encodings; if it was trained with the base's {name}, saved in another precision say, put the base's "
                f"folder {name} in its place"
            )


def _compared(outline: Outline) -> dict[str, object]:
    scheduler = {f"scheduler's {key}": outline.scheduler_config.get(key) for key in _KINDS}
    latents = f"{outline.latent_channels} channels of {outline.latent_scale} pixels a side"
    return {
        "pipeline": outline.family.pipeline,
        "latent": latents,
        "conditioning": dict(outline.conditioning),
        **scheduler,
    }


def _teaches(part: Component) -> bool:
    return part.name.startswith(PARTS["transformer"])


def _is_shared(part: Component) -> bool:
    return not _teaches(part) and part.name != "scheduler"
