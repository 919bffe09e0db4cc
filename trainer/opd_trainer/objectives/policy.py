"""The KL by way of the policy gradient: what the paper's section 3.3 compares its closed form with.

The action of a step is the next state, a = mu_S + std e. A round makes one optimiser step, so the policy that acted is
the one that is trained: the ratio rho = p_S(a) / p_old(a) is 1 and only its gradient counts, and PPO's clipping, which
begins away from 1, never acts. Both losses have the KL's gradient in expectation and add variance to it.

As in Flow-GRPO's code the logarithm of rho is a mean over elements, like the KL.
"""

import torch
from torch import Tensor

from opd_trainer.objectives.match import Match, Objective
from opd_trainer.objectives.squared import kl_weight


def ratio(match: Match) -> Tensor:
    """rho, [B]: 1 with the gradient of log p_S(a); a is a constant to it."""
    assert match.noise is not None
    scale = match.transition.b / match.transition.std
    moved = scale * (match.student - match.student.detach())
    return torch.exp((match.noise * moved - moved.square() / 2).flatten(1).mean(1))


def ppo(match: Match) -> Tensor:
    """rho D with D the step's KL (Eq. 21): D's own gradient, and D times a score of mean zero."""
    return ratio(match) * kl_weight(match.transition) * match.error


def policy_gradient(match: Match) -> Tensor:
    """rho A with the advantage A = log p_S(a) - log p_T(a), a constant to the gradient.

    E[A] is the KL. A depends on the action, unlike the KL itself: with a detached D the expected gradient would be
    zero. The value that is reported is A alone, per element.
    """
    assert match.noise is not None
    away = match.transition.b / match.transition.std * (match.student - match.target).detach()
    advantage = (match.noise * away + away.square() / 2).flatten(1)
    return advantage.mean(1) + (ratio(match) - 1) * advantage.sum(1)


PPO = Objective(ppo, needs_noise=True)
POLICY_GRADIENT = Objective(policy_gradient, needs_noise=True)
