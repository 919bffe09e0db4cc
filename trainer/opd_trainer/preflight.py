"""What is wrong with a spec's prompts, rewards and objective, found before the first round and not after the last."""

from collections.abc import Iterator
from pathlib import Path

from opd_core.api.types import Spec
from opd_core.errors import InvalidError
from opd_core.models.outline import read_outline
from opd_core.models.preflight import Find, attempt, model_notes
from opd_core.models.tokens import longer_prompts

from opd_trainer.objectives.registry import find_objective
from opd_trainer.prompt_files import load_prompts
from opd_trainer.prompts import held_out_prompts, task_prompts
from opd_trainer.rewards.registry import find_reward


def data_problems(spec: Spec, claims: Path, find: Find) -> list[str]:
    """Each names a field, its value, what is wrong and what to do."""
    return [*_prompts(spec, claims, find), *_rewards(spec), *_objective(spec)]


def data_notes(spec: Spec, claims: Path, find: Find) -> list[str]:
    """What is no fault but should be known of model and prompts: one line each. For a spec without problems."""
    base = find(spec.model.uri)
    of_model = [] if base is None else [*model_notes(spec, read_outline(base))]
    return [*of_model, *_notes(spec, claims, find)]


def _notes(spec: Spec, claims: Path, find: Find) -> Iterator[str]:
    base = find(spec.model.uri)
    for i, teacher in enumerate(spec.teachers):
        uris = [teacher.prompts.uri, *filter(None, [teacher.prompts.held_out_uri])]
        if any(find(uri) is None for uri in uris):
            continue
        path = f"spec.teachers[{i}].prompts"
        prompts = task_prompts(teacher, spec.evaluation, claims)
        if prompts.overlap:
            yield f"{path}: {prompts.overlap} prompts are in heldOutUri too; they are left out of training"
        if prompts.repeated:
            yield (
                f"{path}: {prompts.repeated} of {len(prompts.training)} training lines repeat a prompt, which is then "
                "trained on as often as it stands there"
            )
        if base is not None:
            texts = list(dict.fromkeys(record.prompt for record in (*prompts.training, *prompts.held_out)))
            for limit in longer_prompts(base, texts, spec.model.max_sequence_length):
                yield f"{path}: {limit.count} of {len(texts)} prompts {limit.words}"


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
    served = {servers.reward for servers in spec.reward_servers}
    for i, teacher in enumerate(spec.teachers):
        for j, name in enumerate(teacher.rewards):
            if name in served:
                continue
            try:
                find_reward(name)
            except InvalidError as error:
                yield f"spec.teachers[{i}].rewards[{j}] is {name}: {error}"


def _objective(spec: Spec) -> Iterator[str]:
    name = spec.training.objective.type
    try:
        find_objective(name)
    except InvalidError as error:
        yield f"spec.training.objective.type is {name}: {error}"
