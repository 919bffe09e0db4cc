"""Prompt files, what is held out of them, and the order in which training visits the rest."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from opd_core.api.types import Evaluation, Spec, Teacher
from opd_core.diffusion.noise import keyed_seed
from opd_core.errors import InvalidError
from opd_core.uris import resolve


@dataclass(frozen=True)
class PromptRecord:
    """One prompt; `metadata` is the rest of its line, for the rewards."""

    prompt: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskPrompts:
    """A task's prompts: no held-out prompt is trained on."""

    training: list[PromptRecord]
    held_out: list[PromptRecord]


def load_prompts(path: Path) -> list[PromptRecord]:
    """Records of a prompt file: `.jsonl` with an object per line that has a `prompt`, or `.txt` with a prompt per line.

    Raises:
        InvalidError: unreadable, another suffix, a bad line (named by its number), or no prompt at all.
    """
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise InvalidError(f"prompt file {path} ends in {path.suffix or 'nothing'}; use .jsonl or .txt")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidError(f"prompt file {path} cannot be read: {error}") from error
    records = [reader(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not records:
        raise InvalidError(f"prompt file {path} holds no prompts; write at least one line")
    return records


def split_held_out(records: Sequence[PromptRecord], n: int, seed: int) -> tuple[list[PromptRecord], list[PromptRecord]]:
    """Training and held-out records: `n` distinct prompts chosen by `seed` leave training with all their lines.

    Raises:
        InvalidError: not enough distinct prompts to leave one for training.
    """
    distinct = list({record.prompt: record for record in records}.values())
    if len(distinct) <= n:
        raise InvalidError(
            f"{len(distinct)} distinct prompts cannot give evaluation.promptsPerTask={n} held-out ones and "
            "still train; name a prompts.heldOutUri, add prompts, or lower promptsPerTask"
        )
    order = permutation(len(distinct), seed, "held out")
    held_out = [distinct[i] for i in order[:n]]
    excluded = {record.prompt for record in held_out}
    return [record for record in records if record.prompt not in excluded], held_out


def task_prompts(teacher: Teacher, evaluation: Evaluation, claims: Path) -> TaskPrompts:
    """The prompts of one task, by its spec; the trainer and the evaluator both come here, so they agree.

    Raises:
        InvalidError: a file that cannot be used, or one that leaves nothing to train on.
    """
    records = load_prompts(resolve(teacher.prompts.uri, claims))
    if not teacher.prompts.held_out_uri:
        return TaskPrompts(*split_held_out(records, evaluation.prompts_per_task, evaluation.seed))
    return TaskPrompts(records, load_prompts(resolve(teacher.prompts.held_out_uri, claims)))


def held_out_prompts(spec: Spec, claims: Path) -> dict[str, list[PromptRecord]]:
    """The evaluation's prompts by task, in its order: the same for every model and every run of a spec.

    Raises:
        InvalidError: a task holds out fewer than evaluation.promptsPerTask.
    """
    wanted, chosen = spec.evaluation.prompts_per_task, {}
    for teacher in spec.teachers:
        records = task_prompts(teacher, spec.evaluation, claims).held_out
        if len(records) < wanted:
            raise InvalidError(
                f"task {teacher.name} holds out {len(records)} prompts, evaluation.promptsPerTask asks for {wanted}; "
                "lower it or add prompts"
            )
        order = permutation(len(records), spec.evaluation.seed, "evaluation", teacher.name)
        chosen[teacher.name] = [records[i] for i in order[:wanted]]
    return chosen


def training_prompt(records: Sequence[PromptRecord], seed: int, task: str, sample: int) -> PromptRecord:
    """The prompt of a task's `sample`-th image since the start: every epoch is a permutation of its own.

    A function of its arguments alone: world size, order of calls and restarts do not change it, and a checkpoint needs
    no cursor.
    """
    epoch, position = divmod(sample, len(records))
    return records[permutation(len(records), seed, "prompts", task, epoch)[position]]


def prompts_digest(records: Sequence[PromptRecord]) -> str:
    """Names the prompts and their order."""
    return "sha256:" + hashlib.sha256(json.dumps([record.prompt for record in records]).encode()).hexdigest()


@lru_cache(maxsize=32)
def permutation(size: int, *key: int | str) -> tuple[int, ...]:
    """A permutation of range(size) by key."""
    return tuple(np.random.Generator(np.random.PCG64(keyed_seed(*key))).permutation(size).tolist())


def _from_json(line: str, where: str) -> PromptRecord:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidError(f"{where}: not JSON ({error})") from error
    prompt = content.pop("prompt", None) if isinstance(content, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise InvalidError(f'{where}: needs an object with a non-empty text "prompt"; got {line[:80]}')
    return PromptRecord(prompt, content)


def _from_text(line: str, where: str) -> PromptRecord:
    return PromptRecord(line.strip())


_READERS: dict[str, Callable[[str, str], PromptRecord]] = {".jsonl": _from_json, ".txt": _from_text}
