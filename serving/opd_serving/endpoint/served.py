"""What an endpoint serves: a student on its base, or a bare model."""

from dataclasses import dataclass
from pathlib import Path

import torch
from opd_core.artifacts import SamplingDefaults, read_student
from opd_core.errors import RefusedError
from opd_core.models.adapter_file import read_adapter_file
from opd_core.models.adapters import load_adapter, use_adapter
from opd_core.models.fingerprint import fingerprint
from opd_core.models.outline import read_outline
from opd_core.models.pipeline import Model, load_model
from opd_core.uris import resolve

_ADAPTER = "student"


@dataclass(frozen=True)
class Served:
    """`digest` names the weights in service; `fingerprint` is what the base must have, empty if nobody said."""

    name: str
    digest: str
    created: int
    base: Path
    adapter: Path | None
    fingerprint: str
    defaults: SamplingDefaults


def open_student(directory: Path, claims: Path) -> Served:
    """A student directory and the base that its manifest names.

    Raises:
        InvalidError: not a student directory, or its base is not there. RefusedError: altered weights.
    """
    manifest, weights = read_student(directory)
    return Served(
        name=manifest.name,
        digest=manifest.digest,
        created=int(weights.stat().st_mtime),
        base=resolve(manifest.base.uri, claims),
        adapter=weights,
        fingerprint=manifest.base.fingerprint,
        defaults=manifest.sampling,
    )


def open_model(uri: str, claims: Path) -> Served:
    """A model without a student, sampled as its pipeline in diffusers does.

    Raises:
        InvalidError: no model that can be served.
    """
    path = resolve(uri, claims) if "://" in uri else Path(uri)
    native = read_outline(path).native
    return Served(
        name=path.resolve().name,
        digest=fingerprint(path),
        created=int(path.stat().st_mtime),
        base=path,
        adapter=None,
        fingerprint="",
        defaults=SamplingDefaults(
            width=native.width,
            height=native.height,
            frames=native.frames,
            steps=native.steps,
            guidance_scale=native.guidance_scale,
            max_sequence_length=native.max_sequence_length,
        ),
    )


def load(served: Served, device: str, dtype: torch.dtype) -> Model:
    """The model, ready to sample.

    Raises:
        RefusedError: the base is not the one that the student was trained on.
    """
    if served.fingerprint:
        found = fingerprint(served.base)
        if found != served.fingerprint:
            raise RefusedError(
                f"{served.base} has fingerprint {found}, but {served.name} was trained on {served.fingerprint}; "
                "serve it with the base it was trained on"
            )
    model = load_model(served.base, device=device, dtype=dtype)
    if served.adapter is not None:
        load_adapter(model.transformer, read_adapter_file(served.adapter), _ADAPTER)
        use_adapter(model.transformer, _ADAPTER)
    return model
