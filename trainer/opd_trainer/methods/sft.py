"""Supervised fine-tuning on teacher samples: what on-policy distillation is compared with.

Each task's teacher samples an image x0 with its own guidance; the student learns, at every noise level sigma of the
sampler, the flow's velocity e - x0 at x = (1 - sigma) x0 + sigma e with noise e of its own. The samples of a round are
made for it and seen once. N queries follow one another for an image: nothing of the student's hides the teachers' time.
"""

from collections.abc import Iterator, Sequence

import torch
from opd_core.diffusion.transitions import Transition
from torch import Tensor

from opd_trainer.methods.rollouts import Rollouts, advance
from opd_trainer.objectives.match import Match


def matches(path: Sequence[Transition], weights: Sequence[float], batch: Rollouts) -> Iterator[Match]:
    """What a student learns from the teachers' B images. `weights`: of each step; 0 is not trained."""
    x0 = teacher_samples(path, batch)
    for j, weight in enumerate(weights):
        if weight > 0:
            noise = batch.noise(j)
            x = torch.lerp(x0, noise, path[j].sigma)
            yield Match(j, path[j], x, None, batch.student(x, j), noise - x0)


@torch.no_grad()
def teacher_samples(path: Sequence[Transition], batch: Rollouts) -> Tensor:
    """Latents [B, *latent] of the images that the teachers make without noise."""
    x, before = batch.start(), None  # `before`: the x0 of the step before
    for j, step in enumerate(path):
        velocity = batch.teachers(x, j).result().to(x.device, non_blocking=True)
        x, before = advance(step, x, velocity, before, None)
    return x
