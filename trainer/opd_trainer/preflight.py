"""What is wrong with a spec's prompts, rewards and objective, found before the first round and not after the last."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from opd_core.api.rules import samplers
from opd_core.api.types import RewardServers, Spec
from opd_core.diffusion.transitions import find_solver
from opd_core.errors import InvalidError, RefusedError, UnavailableError
from opd_core.models.outline import read_outline
from opd_core.models.preflight import Find, attempt, model_notes, start_notes, teacher_notes
from opd_core.models.tokens import longer_prompts

from opd_trainer.objectives.registry import branch_problems, find_objective
from opd_trainer.prompt_files import PromptRecord, load_prompts
from opd_trainer.prompts import TaskPrompts, held_out_prompts, task_prompts
from opd_trainer.rewards.registry import find_reward, load_reward

_SECONDS_TO_ANSWER = 10  # of a reward server before the first round; later it has spec.rewardServers' own


def data_problems(spec: Spec, claims: Path, find: Find) -> list[str]:
    """Each names a field, its value, what is wrong and what to do."""
    found = [*_prompts(spec, claims, find), *_rewards(spec), *_objective(spec, find), *_solvers(spec)]
    if found or not spec.reward_servers:
        return found
    return [words for words, wrong in _unanswered(spec, _readable_prompts(spec, claims, find)) if wrong]


def data_notes(spec: Spec, claims: Path, find: Find) -> list[str]:
    """What is no fault but should be known of model, LoRAs and prompts: one line each. For a spec without problems."""
    base = find(spec.model.uri)
    of_model = [] if base is None else [*model_notes(spec, read_outline(base))]
    of_loras = [*teacher_notes(spec, find, [teacher.name for teacher in spec.teachers]), *start_notes(spec, find)]
    prompts = _readable_prompts(spec, claims, find)
    servers = [words for words, _ in _unanswered(spec, prompts)]
    return [*of_model, *of_loras, *_notes(spec, base, prompts), *servers]


def _readable_prompts(spec: Spec, claims: Path, find: Find) -> dict[str, TaskPrompts]:
    """By task; those whose files shall not be fetched now are not there."""
    found = {}
    for teacher in spec.teachers:
        uris = [teacher.prompts.uri, *filter(None, [teacher.prompts.held_out_uri])]
        if all(find(uri) is not None for uri in uris):
            found[teacher.name] = task_prompts(teacher, spec.evaluation, claims)
    return found


def _notes(spec: Spec, base: Path | None, tasks: dict[str, TaskPrompts]) -> Iterator[str]:
    trained_on = {task: {record.prompt for record in prompts.training} for task, prompts in tasks.items()}
    for i, teacher in enumerate(spec.teachers):
        prompts = tasks.get(teacher.name)
        if prompts is None:
            continue
        path = f"spec.teachers[{i}].prompts"
        if prompts.overlap:
            yield f"{path}: {prompts.overlap} prompts are in heldOutUri too; they are left out of training"
        held_out = {record.prompt for record in prompts.held_out}
        for task, others in trained_on.items():
            if task != teacher.name and (seen := held_out & others):
                yield (
                    f"{path}: {len(seen)} of {len(held_out)} held-out prompts are trained on by task {task}, so the "
                    "student will have seen them; leave them out there to measure what is new to it"
                )
        if repeats := len(prompts.held_out) - len(held_out):
            yield (
                f"{path}: {repeats} of {len(prompts.held_out)} held-out lines repeat a prompt; its images count "
                f"together, so intervals and gate are those of {len(held_out)} prompts"
            )
        if prompts.repeated:
            yield (
                f"{path}: {prompts.repeated} of {len(prompts.training)} training lines repeat a prompt, which is then "
                "trained on as often as it stands there"
            )
        if base is not None:
            texts = list(dict.fromkeys(record.prompt for record in (*prompts.training, *prompts.held_out)))
            for limit in longer_prompts(base, texts, spec.model.max_sequence_length):
                yield f"{path}: {limit.count} of {len(texts)} prompts {limit.words}"


def _unanswered(spec: Spec, tasks: dict[str, TaskPrompts]) -> list[tuple[str, bool]]:
    """Reward servers that do not score a grey image of a held-out prompt: the words, and whether it is wrong rather
    than not there yet. All are asked at once."""
    records = {
        name: tasks[teacher.name].held_out[0]
        for teacher in spec.teachers
        for name in teacher.rewards
        if teacher.name in tasks
    }
    image = torch.full([1, 3, spec.training.resolution.height, spec.training.resolution.width], 0.5)

    def ask(servers: RewardServers, path: str, record: PromptRecord) -> list[tuple[str, bool]]:
        reward = load_reward(servers.reward, torch.device("cpu"), servers, tries=1)
        try:
            reward(image, [record.prompt], [record.metadata])
        except (RefusedError, UnavailableError) as error:
            return [(f"{path} is {servers.urls[0]}: {error}", isinstance(error, RefusedError))]
        return []

    asked = [
        (
            servers.model_copy(
                update={"urls": [url], "timeout_seconds": min(servers.timeout_seconds, _SECONDS_TO_ANSWER)}
            ),
            f"spec.rewardServers[{i}].urls[{j}]",
            records[servers.reward],
        )
        for i, servers in enumerate(spec.reward_servers)
        if servers.reward in records
        for j, url in enumerate(servers.urls)
    ]
    if not asked:
        return []
    with ThreadPoolExecutor(len(asked)) as pool:
        return [found for each in pool.map(lambda arguments: ask(*arguments), asked) for found in each]


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


def _solvers(spec: Spec) -> Iterator[str]:
    for path, sampler in samplers(spec):
        try:
            find_solver(sampler.solver)
        except InvalidError as error:
            yield f"{path}.solver is {sampler.solver}: {error}"


def _objective(spec: Spec, find: Find) -> Iterator[str]:
    name = spec.training.objective.type
    try:
        find_objective(name)
    except InvalidError as error:
        yield f"spec.training.objective.type is {name}: {error}"
        return
    base = attempt("spec.model.uri", spec.model.uri, find, read_outline, [])  # what is wrong with it is told elsewhere
    if base is not None:
        yield from branch_problems(spec, base.guidance)
