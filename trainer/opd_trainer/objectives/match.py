"""What a loss is a function of, and what an objective is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from opd_core.diffusion.transitions import Transition
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Branches:
    """What guidance combines: conditional and unconditional velocity, [B, 2, ...] float32, of the student with its
    graph, and of the target."""

    student: Tensor
    target: Tensor


@dataclass(frozen=True, eq=False)
class Match:
    """What student and target answer at one state of B trajectories. Tensors are [B, ...] float32.

    Args:
        step: index of the solver step. transition: what that step is. x: the state.
        noise: standard normal, what the rollout added to the student's mean; None at a step without noise.
        student: the student's velocity, with its graph. target: the velocity to learn, the teacher's in OPD.
        branches: what the two are made of, where the objective asks for it.
    """

    step: int
    transition: Transition
    x: Tensor
    noise: Tensor | None
    student: Tensor
    target: Tensor
    branches: Branches | None = field(default=None, kw_only=True)

    @cached_property
    def error(self) -> Tensor:
        """(v_S - v_T)^2, mean over elements, [B]."""
        return (self.student - self.target).square().flatten(1).mean(1)

    @property
    def distance(self) -> Tensor:
        """What is told of how far student and teachers are apart, [B]."""
        return self.error


Loss = Callable[[Match], Tensor]  # [B], one number per image


@dataclass(frozen=True)
class Objective:
    """A loss with what it asks of a spec.

    Args:
        loss: what is minimised. normalized: its self-normalised form, None where it has none.
        needs_noise: it has no meaning at a step that is taken without noise.
        of_branches: what it is for a weight, `objective.directionWeight`, where it compares both branches of guidance;
            then every match carries them.
    """

    loss: Loss
    normalized: Loss | None = None
    needs_noise: bool = False
    of_branches: Callable[[float], Loss] | None = None
