"""What is sent of a spec, and what became of it. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_core.api.load import check_spec, load_spec
from opd_core.api.sentences import shown
from opd_core.api.types import OPDDistillation

from opd_cli.cluster.distillation import Distillation
from opd_cli.cluster.refusals import ConflictError, RejectedError

_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"


@dataclass(frozen=True)
class Submission:
    """`change`: created, configured or unchanged."""

    distillation: Distillation
    change: str


def parse(spec: str | Path | Mapping[str, Any] | OPDDistillation) -> OPDDistillation:
    """A file, its content, or the object.

    Raises:
        SpecError: with every problem of it.
    """
    if isinstance(spec, OPDDistillation):
        return spec
    return check_spec(spec) if isinstance(spec, Mapping) else load_spec(Path(spec))


def said(distillation: OPDDistillation) -> dict[str, Any]:
    """What the user wrote, without defaults and without what an API server adds to an exported object."""
    manifest = distillation.model_dump(mode="json", by_alias=True, exclude_unset=True)
    metadata = manifest["metadata"]
    annotations = {key: value for key, value in (metadata.get("annotations") or {}).items() if key != _LAST_APPLIED}
    kept = {"name": metadata["name"], "labels": metadata.get("labels"), "annotations": annotations}
    return {**manifest, "metadata": {key: value for key, value in kept.items() if value}}


def content(distillation: Distillation) -> tuple[Any, ...]:
    """What a submission can change."""
    metadata = distillation.manifest["metadata"]
    return distillation.spec, metadata.get("labels"), metadata.get("annotations")


def explain(error: ConflictError, manifest: Mapping[str, Any], before: Distillation | None) -> RejectedError:
    """A conflict with the values on both sides."""
    lines = []
    for claim in error.claims:
        here, there = _value(manifest, claim.path), _value(before.manifest if before else {}, claim.path)
        values = f" ({shown(there)} there, {shown(here)} here)" if here is not None else ""
        lines.append(f"  {claim.path.lstrip('.')}: set by {claim.manager}{values}")
    count = "1 field belongs" if len(lines) == 1 else f"{len(lines)} fields belong"
    remedy = "leave it out of the file, or take it over with --force-conflicts"
    return RejectedError("\n".join([f"{count} to somebody else; {remedy}", *lines]))


def _value(part: Any, path: str) -> Any:
    """At .spec.training.rounds; None where there is none."""
    for name in path.strip(".").split("."):
        part = part.get(name) if isinstance(part, Mapping) else None
    return part
