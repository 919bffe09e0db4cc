"""The fake score of distribution matching: an adapter beside the student's that follows the student's images."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from opd_core.api.training import Optimizer
from opd_core.errors import DivergedError
from opd_core.models.adapters import use_adapter
from torch import Tensor

from opd_trainer.engine import Engine, learning_rate, total
from opd_trainer.methods.distribution import Renoised, Sample, fake_loss, renoised
from opd_trainer.run import STUDENT, Run
from opd_trainer.trajectories import Trajectories

FAKE = "fake"  # name of the adapter
Seen = tuple[Trajectories, Sequence[Sample]]


@dataclass(eq=False)
class FakeScore:
    """`updates`: optimiser steps of a round."""

    engine: Engine
    optimizer: Optimizer
    updates: int
    _loss: float = 0.0  # of this rank's images in the last round

    @torch.no_grad()
    def velocity(self, trajectories: Trajectories, x: Tensor, t: Tensor) -> Tensor:
        """[B, ...] at x and t [B], a constant to the gradient."""
        run = trajectories.run
        with run.spent("update"), _active(run):
            return run.velocity(x, t, trajectories.unguided)

    def learn(self, run: Run, round_: int, seen: Sequence[Seen]) -> None:
        """Follow what the student made in this round: every update takes each image at one of its trained steps.

        Raises:
            DivergedError: a gradient left the finite numbers.
        """
        rate, self._loss = learning_rate(self.optimizer, run.training.rounds, round_), 0.0
        for update in range(self.updates):
            for left, (trajectories, samples) in zip(reversed(range(len(seen))), seen, strict=True):
                noised = _noised(trajectories, samples, update)
                with run.spent("update"), _active(run):
                    velocity = run.velocity(noised.x, noised.t, trajectories.unguided)
                    loss = (trajectories.batch.loss_weights * fake_loss(velocity, noised)).sum()
                    self.engine.backward(loss, last=left == 0)
                self._loss += float(loss.detach()) / self.updates
            with run.spent("update"):
                norm = self.engine.step(rate)
            if math.isfinite(norm):
                continue
            if run.scale is None:
                raise DivergedError(
                    f"round {round_ + 1}: the gradient of the fake score is {norm}; the last checkpoint is intact; "
                    "lower training.fakeScore.optimizer.learningRate"
                )
            run.scale.halve()

    def figures(self, run: Run) -> dict[str, float]:
        return {"fake_loss": total(self._loss, run.world) / run.world.size}


def _noised(trajectories: Trajectories, samples: Sequence[Sample], update: int) -> Renoised:
    """Every image at a step of its own draw, noised anew."""
    device = samples[0].x.device
    chosen = (trajectories.uniform("fake step", update) * len(samples)).long()
    levels = torch.tensor([(sample.least, sample.most) for sample in samples], device=device)[chosen]
    return renoised(
        torch.stack([sample.x for sample in samples])[chosen, torch.arange(len(chosen), device=device)],
        levels[:, 0],
        levels[:, 1],
        trajectories.uniform("fake time", update),
        trajectories.noise_for("fake", update),
    )


@contextmanager
def _active(run: Run) -> Iterator[None]:
    use_adapter(run.model.transformer, FAKE)
    try:
        yield
    finally:
        use_adapter(run.model.transformer, STUDENT)
