"""DMD2 (arXiv 2405.14867): the image that the student points at, at any step of its trajectory, should be one of the
teacher's images, at every noise level.

    roll out the student, without a graph, to a step          x0 = x - sigma v_S there
    x_t = (1 - t) x0 + t e at a level t of its own            move x0 by the difference of the scores (`distribution`)
    the fake score learns x0 by flow matching, several times for every step of the student (two time-scale updates)

A student that is trained so is a few-step generator: a sampler that replaces all noise between two steps (CPS with
noiseLevel 1) is the published one. The published fake score learns from new images every time; here from the round's.
"""

from opd_core.diffusion.transitions import Transition
from torch import Tensor

FAKE_UPDATES = 5  # the authors', for SDXL; 10 for Stable Diffusion 1.5


def output(step: Transition, clean: Tensor, following: Tensor) -> tuple[Tensor, float, float]:
    """The clean image, at all noise levels."""
    return clean, 0.0, 1.0
