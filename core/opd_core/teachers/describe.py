"""What a server says of itself, from the files that it shall load."""

from collections.abc import Mapping
from pathlib import Path

from opd_core.artifacts import installed_versions
from opd_core.models.adapter_file import AdapterFile
from opd_core.models.fingerprint import adapter_fingerprint, fingerprint
from opd_core.models.outline import read_outline
from opd_core.teachers.contract import FREE, ServiceInfo


def service_info(
    base: Path, teachers: Mapping[str, AdapterFile], precision: str, max_sequence_length: int
) -> ServiceInfo:
    """Without PyTorch: a teacher server on a CPU starts in a tenth of a second.

    Raises:
        InvalidError: `base` is no model.
    """
    outline = read_outline(base)
    return ServiceInfo(
        base=fingerprint(base),
        teachers={name: adapter_fingerprint(adapter) for name, adapter in teachers.items()},
        precision=precision,
        max_sequence_length=max_sequence_length,
        latents=(outline.latent_channels, FREE, FREE),
        conditioning=dict(outline.conditioning),
        versions=installed_versions(),
    )
