"""Which images make up a round, and who computes them: every draw is keyed by what it is for, not by who draws."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from opd_core.api.training import Training
from opd_core.conditioning import Conditioning, Prompts
from opd_core.scales import Scales
from torch import Tensor

from opd_trainer.prompt_files import PromptRecord
from opd_trainer.prompts import training_prompt

Encode = Callable[[Sequence[str]], list[Conditioning]]


@dataclass(frozen=True)
class Task:
    """A teacher with its prompts. `share` of the loss: the shares of all tasks sum to 1."""

    name: str
    scales: Scales
    share: float
    prompts: Sequence[PromptRecord]


@dataclass(frozen=True)
class Row:
    """One image of a round: task by index, and its number among the task's images of this round, over all ranks."""

    task: int
    sample: int


def rank_rows(
    tasks: int, images_per_task: int, rank: int, world_size: int, micro_batch_size: int | None = None
) -> list[list[Row]]:
    """The batches of one rank: its slice of every task's images, all at once or `micro_batch_size` at a time."""
    share = images_per_task // world_size
    rows = [Row(task, rank * share + i) for task in range(tasks) for i in range(share)]
    size = micro_batch_size or len(rows)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


@dataclass(frozen=True, eq=False)
class Batch:
    """B images that are computed at once; tensors are on the student's device. `prompts`: for the student.

    `spans` are the rows of each task, by index; `loss_weights` [B] make sums over all batches of a rank means per task.
    """

    round: int
    rows: list[Row]
    spans: list[tuple[int, slice]]
    conditioning: list[Conditioning]
    prompts: Prompts
    task_of_row: Tensor
    loss_weights: Tensor


def prompts_of(tasks: Sequence[Task], rows: Sequence[Row], round_: int, seed: int, images_per_task: int) -> list[str]:
    return [
        training_prompt(
            tasks[row.task].prompts, seed, tasks[row.task].name, round_ * images_per_task + row.sample
        ).prompt
        for row in rows
    ]


def build_batch(
    tasks: Sequence[Task],
    rows: list[Row],
    round_: int,
    training: Training,
    world_size: int,
    encode: Encode,
    told: Callable[[Sequence[Conditioning]], Prompts],
    device: torch.device,
) -> Batch:
    """`told`: what the student is told of so many prompts."""
    conditioning = encode(prompts_of(tasks, rows, round_, training.seed, training.images_per_task))
    share = training.images_per_task // world_size
    return Batch(
        round=round_,
        rows=rows,
        spans=_spans(rows),
        conditioning=conditioning,
        prompts=told(conditioning),
        task_of_row=torch.tensor([row.task for row in rows], device=device),
        loss_weights=torch.tensor([tasks[row.task].share / share for row in rows], device=device),
    )


def _spans(rows: Sequence[Row]) -> list[tuple[int, slice]]:
    """Consecutive rows of one task, as (task, slice)."""
    starts = [i for i, row in enumerate(rows) if i == 0 or rows[i - 1].task != row.task]
    return [(rows[a].task, slice(a, b)) for a, b in zip(starts, [*starts[1:], len(rows)], strict=True)]
