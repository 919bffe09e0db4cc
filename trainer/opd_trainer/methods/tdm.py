"""Trajectory distribution matching (TDM, arXiv 2503.06674): each state that the student's sampler arrives at should be
one of the teacher's at that noise level.

    x at level s = sigma_next of a step, on the student's trajectory
    x_t = x noised further to a level t between s and the step's own sigma
    move the step's x0 by the difference of the scores at x_t (`distribution`); the fake score learns p_S(x_t)

The sampler is the student's own and stays it, with as many steps as it has: 4 in the paper, 10 to be compared with
on-policy distillation.
"""

from opd_core.diffusion.transitions import Transition
from torch import Tensor

FAKE_UPDATES = 1


def output(step: Transition, clean: Tensor, following: Tensor) -> tuple[Tensor, float, float]:
    """The state after the step, from its noise level to the one before."""
    return following, step.sigma_next, step.sigma
