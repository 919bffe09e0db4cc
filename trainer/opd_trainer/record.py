"""What is known about one round, and its line in the log."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from opd_core.diffusion.transitions import Transition

from opd_trainer.objectives.squared import kl_weight

PHASES = ("rollout", "reward", "teacher_wait", "update")
Rewards = Mapping[str, Mapping[str, float]]  # task -> reward -> mean over its validation prompts


@dataclass(frozen=True)
class TaskRecord:
    """Means over a task's images, per latent element.

    Args:
        loss: the spec's objective. loss_per_step: what each solver step adds to it, 0 for a step that is not trained.
        velocity_mse: (v_S - v_T)^2, mean over the steps that this round trained. A teacher that is trained is compared
            with its base.
        kl_per_step: closed-form KL of the student's and the teacher's transition, whatever the objective; None for a
            step without noise or without training, and no entry at all under a deterministic sampler.
    """

    loss: float
    velocity_mse: float
    loss_per_step: list[float]
    kl_per_step: list[float | None]

    @property
    def kl(self) -> float | None:
        """Over the whole trajectory; None where no step has one."""
        known = [kl for kl in self.kl_per_step if kl is not None]
        return sum(known) if known else None


def task_record(
    losses: Sequence[float], errors: Sequence[float], trained: Sequence[float], path: Sequence[Transition]
) -> TaskRecord:
    """From the loss and squared velocity difference of every step, per image, and the share of the images that each
    step trained."""
    kl_per_step = [
        kl_weight(step) * errors[j] / trained[j] if trained[j] and step.std > 0 else None for j, step in enumerate(path)
    ]
    return TaskRecord(
        loss=sum(losses),
        velocity_mse=sum(errors) / sum(trained),
        loss_per_step=list(losses),
        kl_per_step=kl_per_step if any(step.std > 0 for step in path) else [],
    )


@dataclass(frozen=True)
class RoundRecord:
    """One round over all ranks. `round` counts finished rounds; seconds are means over ranks; requests and retries are
    counted since the process started; `rewards` are there in rounds with a validation; `skipped`: a float16 gradient
    overflowed and no step was made; `figures`: of the method, by name (`figures`)."""

    round: int
    seconds: float
    tasks: Mapping[str, TaskRecord]
    loss: float
    grad_norm: float
    learning_rate: float
    images: int
    phases: Mapping[str, float]
    teacher_requests: int
    teacher_retries: int
    rewards: Rewards = field(default_factory=dict)
    skipped: bool = False
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    def line(self) -> dict[str, Any]:
        """As JSON for train/log.jsonl."""
        return {
            "round": self.round,
            "seconds": round(self.seconds, 4),
            "tasks": {name: asdict(task) for name, task in self.tasks.items()},
            "loss": self.loss,
            "grad_norm": self.grad_norm if math.isfinite(self.grad_norm) else None,
            "learning_rate": self.learning_rate,
            "images_per_second": round(self.images_per_second, 3),
            **{f"{phase}_seconds": round(seconds, 4) for phase, seconds in self.phases.items()},
            "teacher_requests": self.teacher_requests,
            "teacher_retries": self.teacher_retries,
            **({"rewards": self.rewards} if self.rewards else {}),
            **({"skipped": True} if self.skipped else {}),
            **({"figures": self.figures} if self.figures else {}),
        }


def largest_term(record: RoundRecord, shares: Mapping[str, float]) -> tuple[str, int, float]:
    """Task, solver step and size of what adds most to the round's loss."""
    return max(
        (
            (name, step, shares[name] * term)
            for name, task in record.tasks.items()
            for step, term in enumerate(task.loss_per_step)
        ),
        key=lambda found: found[2],
    )
