"""What a method sees of a batch, and the step that every rollout makes."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from opd_core.diffusion.transitions import Transition
from torch import Tensor


class Answer(Protocol):
    """A teacher's velocity [B, *latent], or both branches of it, that may still be on its way."""

    def done(self) -> bool: ...

    def result(self) -> Tensor: ...


class Rollouts(Protocol):
    """B trajectories: where they start, what a stochastic sampler adds, and who is asked on the way.

    States, noise and velocities are [B, *latent] float32.
    """

    def start(self) -> Tensor: ...

    def noise(self, step: int) -> Tensor: ...

    def student(self, x: Tensor, step: int) -> Tensor: ...

    def teachers(self, x: Tensor, step: int) -> Answer: ...


class Guided(NamedTuple):
    """What makes velocities [B, *latent] of both branches of guidance [B, 2, *latent], with the student's scale and
    with those of the rows' teachers."""

    student: Callable[[Tensor], Tensor]
    teachers: Callable[[Tensor], Tensor]


class Noised(Rollouts, Protocol):
    """Rollouts whose teachers are asked about images with new noise, too: states off the trajectories. Draws are keyed
    by their purpose."""

    def noise_for(self, *purpose: str | int) -> Tensor: ...

    def uniform(self, *purpose: str | int) -> Tensor:
        """[B] in [0, 1)."""
        ...

    def teachers_at(self, x: Tensor, sigmas: Tensor) -> Answer:
        """`sigmas` [B]."""
        ...


def trained_length(weights: Sequence[float]) -> int:
    """Steps of a trajectory up to the last one with a weight: none is computed after it."""
    return max((j + 1 for j, weight in enumerate(weights) if weight > 0), default=0)


def advance(
    step: Transition, x: Tensor, velocity: Tensor, before: Tensor | None, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The next state, mean + std e, and the x0 that this step pointed at, for the next step's `before`."""
    mean = step.mean(x, velocity, before)
    return mean if noise is None else mean + step.std * noise, step.clean(x, velocity)
