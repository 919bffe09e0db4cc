"""Squared distances, each a weight on mean over elements of (v_S - v_T)^2.

With shared coefficients the means of two transitions differ by b (v_S - v_T), and the images they point at by
sigma (v_S - v_T):

    KL            w = b^2 / (2 std^2)   closed-form KL of two Gaussians with the same variance (paper Eq. 10-14)
    MeanMatching  w = b^2 / 2           the deterministic limit's surrogate (paper Eq. 12)
    Velocity      w = 1                 every step counts the same; not in the paper
    X0            w = sigma^2           distance of the clean images; not in the paper

`std` is the standard deviation that is really sampled, its sqrt(-dt) included: the published code leaves that factor
out, which multiplies each step's KL by -dt.

The self-normalised form divides an image's loss by its mean absolute distance, which is a constant to the gradient:
far images pull no harder than near ones (DiffusionNFT, arXiv 2509.16117, adaptive weighting of the loss).
"""

import math
from collections.abc import Callable

from opd_core.diffusion.transitions import Transition
from torch import Tensor

from opd_trainer.objectives.match import Loss, Match, Objective

_LEAST_DISTANCE = 1e-5  # the published code's: an image that is matched exactly has no direction


def kl_weight(step: Transition) -> float:
    """Of a step with noise."""
    return step.b**2 / (2 * step.std**2)


def mean_weight(step: Transition) -> float:
    return step.b**2 / 2


def velocity_weight(step: Transition) -> float:
    return 1.0


def x0_weight(step: Transition) -> float:
    return step.sigma**2


def squared(weight: Callable[[Transition], float]) -> Loss:
    """w mean (v_S - v_T)^2."""

    def loss(match: Match) -> Tensor:
        return weight(match.transition) * match.error

    return loss


def normalized(weight: Callable[[Transition], float]) -> Loss:
    """mean u^2 / mean |u| with u = sqrt(w) (v_S - v_T)."""

    def loss(match: Match) -> Tensor:
        scale = weight(match.transition)
        distance = math.sqrt(scale) * (match.student - match.target).detach().abs().flatten(1).mean(1)
        return scale * match.error / distance.clamp(min=_LEAST_DISTANCE)

    return loss


KL = Objective(squared(kl_weight), normalized(kl_weight), needs_noise=True)
MEAN_MATCHING = Objective(squared(mean_weight), normalized(mean_weight))
VELOCITY = Objective(squared(velocity_weight), normalized(velocity_weight))
X0 = Objective(squared(x0_weight), normalized(x0_weight))
