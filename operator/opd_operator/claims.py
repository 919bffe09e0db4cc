"""What claims can bear, seen before anything waits or trains for them. Pure."""

from collections.abc import Collection, Mapping
from typing import Any

from opd_core import roles
from opd_core.api.digests import claims_of
from opd_core.api.teachers import trained_teachers
from opd_core.api.types import Spec
from opd_core.errors import InvalidError
from opd_core.stages import Stage
from opd_core.uris import parse

Modes = Mapping[str, Collection[str]]  # access modes by claim, of those that are there
_ALONE, _ONE_NODE, _READ = "ReadWriteOncePod", "ReadWriteOnce", "ReadOnlyMany"


def asked_for(obj: Mapping[str, Any]) -> set[str]:
    """The claims whose modes the next look has to know: those of a run that has nothing yet."""
    status = obj.get("status") or {}
    fresh = status.get("observedGeneration") != obj["metadata"]["generation"]
    times = status.get("stageTimes", {})
    begun = "student" in status or Stage.TEACHERS_TRAINED in times or Stage.TEACHERS_READY in times
    if obj["spec"].get("suspend") or (begun and not fresh):
        return set()
    try:
        return claims_of([obj["spec"].get(part) for part in ("model", "teachers", "student")])
    except InvalidError:
        return set()  # the spec is refused, with its own words


def modes(claim: Mapping[str, Any]) -> list[str]:
    """Of a PersistentVolumeClaim: those of its volume, which may have more than were asked for."""
    found = (claim.get("status") or {}).get("accessModes") or (claim.get("spec") or {}).get("accessModes") or []
    return [str(mode) for mode in found]


def problem(spec: Spec, known: Modes) -> str:
    """Why no student can come of it; empty if one can, as far as is known."""
    output = parse(spec.student.output.uri).place
    if set(known.get(output, ())) == {_READ}:
        return (
            f"spec.student.output.uri: claim {output} is {_READ}, and the student is written to it; "
            "use a claim that is ReadWriteMany, then suspend and resume, or change the spec"
        )
    alone = [name for name, found in sorted(known.items()) if set(found) == {_ALONE}]
    if alone and _shared(spec):
        return (
            f"claim {alone[0]} is {_ALONE}, and several pods use it at once; use one that is ReadWriteMany, or "
            f"{_ONE_NODE} where all pods run on one node, then suspend and resume, or change the spec"
        )
    return ""


def of_one_node(spec: Spec, known: Modes) -> list[str]:
    """Claims whose pods run on one node, whatever the scheduler would like."""
    return [name for name, found in sorted(known.items()) if set(found) == {_ONE_NODE}] if _shared(spec) else []


def _shared(spec: Spec) -> bool:
    """Whether pods of this object may be there at once: a student serves while the next one is trained."""
    side_by_side = min(spec.run_policy.parallel_teachers, len(trained_teachers(spec))) > 1
    return bool(roles.teacher_servers(spec)) or side_by_side or spec.training.nodes > 1 or spec.endpoint.enabled
