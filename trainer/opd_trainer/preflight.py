"""What is wrong with a spec's prompts and rewards, found before the first round and not after the last."""

from collections.abc import Iterator
from pathlib import Path

from opd_core.api.types import Spec
from opd_core.errors import InvalidError
from opd_core.models.preflight import Find, attempt

from opd_trainer.prompts import held_out_prompts, load_prompts
from opd_trainer.rewards.registry import find_reward


def data_problems(spec: Spec, claims: Path, find: Find) -> list[str]:
    """Each names a field, its value, what is wrong and what to do."""
    return [*_prompts(spec, claims, find), *_rewards(spec)]


def _prompts(spec: Spec, claims: Path, find: Find) -> Iterator[str]:
    for i, teacher in enumerate(spec.teachers):
        found: list[str] = []
        read = []
        for field, uri in (("uri", teacher.prompts.uri), ("heldOutUri", teacher.prompts.held_out_uri)):
            if uri:
                read.append(attempt(f"spec.teachers[{i}].prompts.{field}", uri, find, load_prompts, found))
        yield from found
        if all(read):
            try:
                held_out_prompts(spec.model_copy(update={"teachers": [teacher]}), claims)
            except InvalidError as error:
                yield f"spec.evaluation.promptsPerTask is {spec.evaluation.prompts_per_task}: {error}"


def _rewards(spec: Spec) -> Iterator[str]:
    for i, teacher in enumerate(spec.teachers):
        for j, name in enumerate(teacher.rewards):
            try:
                find_reward(name)
            except InvalidError as error:
                yield f"spec.teachers[{i}].rewards[{j}] is {name}: {error}"
