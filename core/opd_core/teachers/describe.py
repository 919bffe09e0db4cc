"""What a server says of itself, from the files that it shall load."""

from collections.abc import Mapping
from pathlib import Path

from opd_core.artifacts import installed_versions
from opd_core.models.fingerprint import fingerprint
from opd_core.models.outline import read_outline
from opd_core.models.teacher_files import TeacherFiles, teacher_fingerprint
from opd_core.teachers.contract import FREE, ServiceInfo


def service_info(
    base: Path, teachers: Mapping[str, TeacherFiles], precision: str, max_sequence_length: int
) -> ServiceInfo:
    """Of teachers for students of `base`. Without PyTorch: a teacher server on a CPU starts in a tenth of a second.

    Raises:
        InvalidError: `base` is no model.
    """
    outline = read_outline(base)
    return ServiceInfo(
        base=fingerprint(base),
        teachers={name: teacher_fingerprint(files) for name, files in teachers.items()},
        precision=precision,
        max_sequence_length=max_sequence_length,
        latents=(outline.latent_channels, *[FREE] * (outline.latent_rank - 1)),
        conditioning=dict(outline.conditioning),
        versions=installed_versions(),
    )
