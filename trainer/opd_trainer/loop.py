"""The rounds of any method.

A round makes one or more optimiser steps, each on

    sum over tasks of share * mean over images of sum over steps of a loss

What is sampled, who is asked and what the loss is, the method knows (`methods`).
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from opd_core.errors import DivergedError
from torch import Tensor

from opd_trainer.engine import all_reduce, learning_rate
from opd_trainer.record import PHASES, RoundRecord, largest_term, task_record
from opd_trainer.run import Run

# Clipping makes a large gradient harmless once; one this far beyond maxGradNorm means that training has left the rails.
EXPLODED = 1e4
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

        sums = play_round(run, round_, partial(take_step, run, rate))
        record, stop = summarise(run, round_, sums, rate, began, stop_requested())
        overflowed = run.scale is not None and not math.isfinite(record.grad_norm)
        skipped = skipped + 1 if overflowed else 0
        record = replace(record, skipped=overflowed)
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
    """Of one round. `trained` [N]: the share of the images that trained each solver step. By task and step, [T, N]
    each: what the images' `losses` and `errors` add up to. `grad_norm`: the largest of its updates, NaN where one
    is."""

    trained: Sequence[float]
    losses: Tensor
    errors: Tensor
    grad_norm: float


def play_round(run: Run, round_: int, step: Callable[[], float] = lambda: 0.0) -> Sums:
    """Accumulate the gradient of every update of a round, on this rank's images. `step` ends each of them, and answers
    with the gradient's norm."""
    norms = []
    losses, errors = torch.zeros((2, len(run.tasks), len(run.path)), dtype=torch.float64, device=run.model.device)
    for update in run.method.updates(run, round_):
        left = update.count
        for term in update.terms:
            left -= 1
            with run.spent("update"):
                run.engine.backward((term.weights * term.loss).sum(), last=left == 0)
                for sums, values in ((losses, term.loss), (errors, term.error)):
                    sums.index_put_((term.tasks, term.steps), values.detach().double(), accumulate=True)
        norms.append(step())
    grad_norm = math.nan if any(math.isnan(norm) for norm in norms) else max(norms)
    return Sums(run.method.trained(run, round_), losses, errors, grad_norm)


def take_step(run: Run, rate: float) -> float:
    """One optimiser step on what has been accumulated. Returns the gradient's norm; NaN, and no step, where that is not
    finite."""
    with run.spent("update"):
        grad_norm = run.engine.step(rate)
        if run.scale is not None and not math.isfinite(grad_norm):
            run.scale.halve()
        else:
            run.ema.update(run.steps)
        run.steps += 1
    return grad_norm


def summarise(run: Run, round_: int, sums: Sums, rate: float, began: float, stop: bool) -> tuple[RoundRecord, bool]:
    """The round over all ranks, and whether any of them was told to stop."""
    stats = run.method.stats
    phases = [run.seconds[phase] for phase in PHASES]
    local = torch.tensor([*phases, time.monotonic() - began, stats.requests, stats.retries, float(stop)])
    of_images = torch.stack([sums.losses, sums.errors])  # [2, T, N]
    total = all_reduce(torch.cat([of_images.flatten(), local.to(of_images)]), run.world).cpu()
    losses, errors = total[: of_images.numel()].view(of_images.shape) / run.training.images_per_task
    *seconds, whole, requests, retries, stops = total[of_images.numel() :].tolist()
    played = run.method.tasks(run, round_)
    tasks = {
        run.tasks[i].name: task_record(losses[i].tolist(), errors[i].tolist(), sums.trained, run.path) for i in played
    }
    shares = [run.tasks[i].share for i in played]
    record = RoundRecord(
        round=round_ + 1,
        seconds=whole / run.world.size,
        tasks=tasks,
        loss=sum(share * task.loss for share, task in zip(shares, tasks.values(), strict=True)) / sum(shares),
        grad_norm=sums.grad_norm,
        learning_rate=rate,
        images=len(played) * run.training.images_per_task,
        phases={phase: value / run.world.size for phase, value in zip(PHASES, seconds, strict=True)},
        teacher_requests=int(requests),
        teacher_retries=int(retries),
        figures=run.method.figures(run),
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
