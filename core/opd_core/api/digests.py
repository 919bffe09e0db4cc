"""What a spec stands for: names for its parts, so that a change of one part repeats no more than that part's work.

Names are of what a spec says beyond the defaults: a release that adds a field gives no object a new name, and nothing
is trained or rolled out again because the operator was upgraded. So a default never changes within v1alpha1.
"""

import hashlib
import json
from typing import Any

from pydantic import BaseModel

from opd_core.api.training import LearningRateSchedule, Method
from opd_core.api.types import OPDDistillation
from opd_core.uris import parse

# No weight of the student depends on these.
_NOT_WEIGHTS = {
    "spec.evaluation",
    "spec.endpoint",
    "spec.suspend",
    "spec.managedBy",
    "spec.runPolicy",
    "spec.student.output",
    "spec.rewardServers",
    "spec.teacherServing.placement",
    "spec.teacherServing.replicas",
    "spec.teacherServing.pod",
    "spec.training.pod",
    "spec.training.checkpoint",
    "spec.training.passes",
    "spec.training.gradientCheckpointing",
    "spec.teachers.rewards",
    "spec.teachers.training.checkpoint",
    "spec.teachers.training.validateEveryRounds",
    "spec.teachers.training.mustBeatBase",
}
_ROUNDS = "spec.training.rounds"


def digest(*parts: Any) -> str:
    """SHA-256 of plain data, in hex."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def said(part: BaseModel) -> dict[str, Any]:
    """What a part says beyond the defaults, as plain data with camelCase keys."""
    return part.model_dump(mode="json", by_alias=True, exclude_defaults=True)


def weights_digest(distillation: OPDDistillation) -> str:
    """Names the spec as far as the student's weights depend on it, the number of rounds included."""
    return digest(weights_fields(distillation), distillation.spec.training.rounds)


def evaluation_digest(distillation: OPDDistillation, student: str) -> str:
    """Names everything that the scores of `student` (a digest) depend on."""
    spec = distillation.spec
    tasks = [said(teacher) for teacher in spec.teachers]
    evaluation = {key: value for key, value in said(spec.evaluation).items() if key not in ("everyRounds", "pod")}
    return digest(student, weights_digest(distillation), evaluation, tasks)


def weights_fields(distillation: OPDDistillation) -> dict[str, Any]:
    """Values by path, of the fields that may not change between two starts of one run; defaults are not there.

    More rounds are allowed while the learning rate does not depend on their number.
    """
    spec = distillation.spec
    extendable = spec.training.optimizer.schedule == LearningRateSchedule.CONSTANT
    found: dict[str, Any] = {}

    def visit(value: Any, path: str, rule: str) -> None:
        if rule in _NOT_WEIGHTS or (rule == _ROUNDS and extendable):
            return
        if isinstance(value, dict):
            for key, item in value.items():
                visit(item, f"{path}.{key}", f"{rule}.{key}")
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            for i, item in enumerate(value):
                visit(item, f"{path}[{i}]", rule)
        else:
            found[path] = value

    visit(said(spec), "spec", "spec")
    # Whoever learns from rewards depends on them.
    of_all = spec.training.method == Method.RL
    found |= {
        f"spec.teachers[{i}].rewards": teacher.rewards
        for i, teacher in enumerate(spec.teachers)
        if teacher.training or of_all
    }
    if not all(teacher.prompts.held_out_uri for teacher in spec.teachers):
        # The evaluation's prompts are held out of the training's.
        found["spec.evaluation.promptsPerTask"] = spec.evaluation.prompts_per_task
        found["spec.evaluation.seed"] = spec.evaluation.seed
    return found


def claims_of(value: Any) -> set[str]:
    """Names of the claims in all `pvc://` URIs of plain data."""
    if isinstance(value, dict):
        return {claim for item in value.values() for claim in claims_of(item)}
    if isinstance(value, list):
        return {claim for item in value for claim in claims_of(item)}
    if isinstance(value, str) and value.startswith("pvc://"):
        return {parse(value).place}
    return set()
