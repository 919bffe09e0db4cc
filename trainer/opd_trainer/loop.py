"""The rounds of any method.

A round brings matches of prompts of every task, and makes one optimiser step on

    sum over tasks of share * mean over images of sum over steps of weight * loss(match)
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from opd_core.api.types import Method
from opd_core.errors import DivergedError
from torch import Tensor

from opd_trainer.batches import prompts_of
from opd_trainer.engine import all_reduce, learning_rate
from opd_trainer.methods import opd, sft
from opd_trainer.objectives.match import Match
from opd_trainer.objectives.registry import round_weights
from opd_trainer.record import PHASES, RoundRecord, largest_term, task_record
from opd_trainer.run import Run
from opd_trainer.trajectories import Trajectories

# Clipping makes a large gradient harmless once; one this far beyond maxGradNorm means that training has left the rails.
EXPLODED = 1e4
ENCODED_AHEAD = 512  # prompts: 0.9 GB of embeddings at Stable Diffusion 3.5's size
MOST_SKIPPED = 20  # rounds in a row without a step: more than FP16's scale can be halved


def train(
    run: Run, start: int, finish_round: Callable[[RoundRecord, bool], None], stop_requested: Callable[[], bool]
) -> None:
    """Rounds `start` to the last one.

    Args:
        finish_round: gets the record of every round, equal on all ranks, and whether it was the last before stopping.

    Raises:
        DivergedError: a loss or gradient left the finite numbers, or the gradient exploded.
    """
    optimizer, skipped = run.training.optimizer, 0
    for round_ in range(start, run.training.rounds):
        began = time.monotonic()
        run.seconds = dict.fromkeys(PHASES, 0.0)
        rate = learning_rate(optimizer, run.training.rounds, round_)

        sums = distil(run, round_)
        with run.spent("update"):
            grad_norm = run.engine.step(rate)
            if run.scale is not None and not math.isfinite(grad_norm):
                run.scale.halve()
                skipped += 1
            else:
                run.ema.update(round_)
                skipped = 0

        record, stop = summarise(run, round_, sums, grad_norm, rate, began, stop_requested())
        record = replace(record, skipped=skipped > 0)
        check_finite(record, {task.name: task.share for task in run.tasks}, optimizer.max_grad_norm)
        if skipped > MOST_SKIPPED:
            raise DivergedError(
                f"round {record.round}: float16 gradients overflowed in {skipped} rounds in a row; the last checkpoint "
                "is intact; set training.precision to BF16"
            )
        finish_round(record, stop)
        if stop:
            return


class Sums(NamedTuple):
    """Of one round. `weights` [N]: of every step. By task and step, [T, N] each: what the images' `losses` and their
    (v_S - v_T)^2, the `errors`, add up to."""

    weights: Sequence[float]
    losses: Tensor
    errors: Tensor


def distil(run: Run, round_: int) -> Sums:
    """Accumulate the gradient of one round."""
    look_ahead(run, round_)
    weights = round_weights(run.weights, run.training.objective.steps_per_round, run.training.seed, round_)
    losses, errors = torch.zeros((2, len(run.tasks), len(run.path)), dtype=torch.float64, device=run.model.device)
    left = len(run.batches) * sum(weight > 0 for weight in weights)
    for rows in run.batches:
        trajectories = Trajectories.of(run, rows, round_)
        batch = trajectories.batch
        for match in matches(run, trajectories, weights):
            left -= 1
            with run.spent("update"):
                loss = weights[match.step] * run.loss(match)
                run.engine.backward((batch.loss_weights * loss).sum(), last=left == 0)
                for sums, values in ((losses, loss), (errors, match.error)):
                    sums[:, match.step].index_add_(0, batch.task_of_row, values.detach().double())
    return Sums(weights, losses, errors)


def matches(run: Run, trajectories: Trajectories, weights: Sequence[float]) -> Iterator[Match]:
    """What the spec's method trains on."""
    if run.training.method == Method.SFT:
        return sft.matches(run.path, weights, trajectories)
    return opd.matches(run.path, weights, trajectories, run.training.passes, run.plan.in_flight)


def look_ahead(run: Run, round_: int) -> None:
    """Encode the prompts of this round, and on a GPU those of later ones, so that the encoders come there seldom."""
    rows = [row for batch in run.batches for row in batch]

    def prompts(of: int) -> list[str]:
        return prompts_of(run.tasks, rows, of, run.training.seed, run.training.images_per_task)

    with run.spent("rollout"):
        wanted = prompts(round_)
        if run.model.device.type == "cuda" and not all(prompt in run.encode for prompt in wanted):
            for later in range(round_ + 1, run.training.rounds):
                if len(wanted) >= ENCODED_AHEAD:
                    break
                wanted += prompts(later)
        run.encode.prepare(wanted)


def summarise(
    run: Run, round_: int, sums: Sums, grad_norm: float, rate: float, began: float, stop: bool
) -> tuple[RoundRecord, bool]:
    """The round over all ranks, and whether any of them was told to stop."""
    stats = run.teachers.stats
    phases = [run.seconds[phase] for phase in PHASES]
    local = torch.tensor([*phases, time.monotonic() - began, stats.requests, stats.retries, float(stop)])
    of_images = torch.stack([sums.losses, sums.errors])  # [2, T, N]
    total = all_reduce(torch.cat([of_images.flatten(), local.to(of_images)]), run.world).cpu()
    losses, errors = total[: of_images.numel()].view(of_images.shape) / run.training.images_per_task
    *seconds, whole, requests, retries, stops = total[of_images.numel() :].tolist()
    tasks = {
        task.name: task_record(losses[i].tolist(), errors[i].tolist(), sums.weights, run.path)
        for i, task in enumerate(run.tasks)
    }
    record = RoundRecord(
        round=round_ + 1,
        seconds=whole / run.world.size,
        tasks=tasks,
        loss=sum(task.share * tasks[task.name].loss for task in run.tasks),
        grad_norm=grad_norm,
        learning_rate=rate,
        images=len(run.tasks) * run.training.images_per_task,
        phases={phase: value / run.world.size for phase, value in zip(PHASES, seconds, strict=True)},
        teacher_requests=int(requests),
        teacher_retries=int(retries),
    )
    return record, stops > 0


def check_finite(record: RoundRecord, shares: Mapping[str, float], max_grad_norm: float) -> None:
    """Refuse to go on from a round that has left the finite numbers."""
    for name, task in record.tasks.items():
        for step, term in enumerate(task.loss_per_step):
            if not math.isfinite(term):
                raise DivergedError(
                    f"round {record.round}: the loss of task {name} is {term} at step {step} (gradient norm "
                    f"{record.grad_norm}); the last checkpoint is intact; lower training.optimizer.learningRate"
                )
    if not record.skipped and not record.grad_norm <= EXPLODED * max_grad_norm:
        name, step, term = largest_term(record, shares)
        raise DivergedError(
            f"round {record.round}: the gradient's norm is {record.grad_norm:.3g}, and {EXPLODED:.0f} times "
            f"training.optimizer.maxGradNorm={max_grad_norm:g} is the limit. The largest of the loss {record.loss:.3g} "
            f"is task {name} at solver step {step}: {term:.3g}. The last checkpoint is intact; lower the learning "
            "rate, or raise the noise level of a KL objective"
        )
