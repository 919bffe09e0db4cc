"""What is held out of a task's prompts, and the order in which training visits the rest."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from opd_core.api.types import Evaluation, Spec, Teacher
from opd_core.diffusion.noise import keyed_seed
from opd_core.errors import InvalidError
from opd_core.uris import resolve

from opd_trainer.prompt_files import PromptRecord, load_prompts


@dataclass(frozen=True)
class TaskPrompts:
    """A task's prompts: no held-out prompt is trained on.

    `overlap`: how many prompts of the training file were left out of training because the held-out file has them.
    """

    training: list[PromptRecord]
    held_out: list[PromptRecord]
    overlap: int = 0

    @property
    def repeated(self) -> int:
        """Lines of training that repeat the prompt of an earlier one."""
        return len(self.training) - len({record.prompt for record in self.training})


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
    held_out = load_prompts(resolve(teacher.prompts.held_out_uri, claims))
    excluded = {record.prompt for record in held_out}
    training = [record for record in records if record.prompt not in excluded]
    if not training:
        raise InvalidError(
            f"every prompt of {teacher.prompts.uri} is held out by {teacher.prompts.held_out_uri}, so none is left to "
            "train on; name other prompts, or leave heldOutUri out to hold some of them out"
        )
    return TaskPrompts(training, held_out, len({record.prompt for record in records} & excluded))


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
