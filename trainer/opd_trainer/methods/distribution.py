"""Distribution matching: what DMD2 and TDM share.

The student's images, with noise t, have a density p_S(x_t), the teacher's p_T(x_t). The gradient of KL(p_S || p_T) by a
clean image x0 of the student is a difference of two scores (DMD, arXiv 2311.18828, Eq. 7), here of velocities:

    x_t = x0 and noise, at a level t of its own        x0 - t v: the image that a velocity v at x_t points at
    g = t (v_T(x_t) - v_F(x_t)) / mean |x0 - (x_t - t v_T)|      v_F: the fake score, which follows the student
    minimise |x0 - (x0 - g)|^2 with x0 - g a constant: x0 moves from where the fake points to where the teacher does

The student's x0 at a solver step is x - sigma v_S, so this is the distance of clean images to the target velocity
v_S + g / sigma, and an objective like others. Both methods take every trained step of the trajectory, as on-policy
distillation does; `objective.stepsPerRound: 1` is the published single step. Neither has DMD2's discriminator, which
needs real images.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from opd_core.diffusion.transitions import Transition
from torch import Tensor

from opd_trainer.methods.rollouts import Answer, Noised, advance, trained_length
from opd_trainer.objectives.match import Match

Score = Callable[[Tensor, Tensor], Tensor]  # (x [B, ...], t [B]) -> velocity [B, ...]
_LEAST_DISTANCE = 1e-5
_FIRST, _LAST = 0.02, 0.98  # of the way between the levels: the ends have no scores worth asking for (DMD2's code)


@dataclass(frozen=True, eq=False)
class Sample:
    """B outputs of the student at solver step `step`, constants to the gradient, and the noise levels `least` to `most`
    at which their density is compared with the teacher's. `x` [B, ...] is at level `least` itself."""

    step: int
    x: Tensor
    least: float
    most: float


class Renoised(NamedTuple):
    """x_t = a x + c e. x, noise [B, ...]; t, c [B]."""

    x: Tensor
    t: Tensor
    c: Tensor
    noise: Tensor


@dataclass(frozen=True, eq=False)
class ScoreMatch(Match):
    """`gap` [B]: (v_F - v_T)^2 at the noised image, mean over elements."""

    gap: Tensor

    @property
    def distance(self) -> Tensor:
        return self.gap


Output = Callable[[Transition, Tensor, Tensor], tuple[Tensor, float, float]]
"""(step, the student's x0, its next state) -> what is compared, and between which noise levels."""


class _Asked(NamedTuple):
    step: int
    x: Tensor
    velocity: Tensor
    clean: Tensor
    noised: Renoised
    fake: Tensor
    answer: Answer


def matches(
    path: Sequence[Transition],
    weights: Sequence[float],
    batch: Noised,
    fake: Score,
    output: Output,
    in_flight: int,
    seen: list[Sample],
) -> Iterator[Match]:
    """What a student learns from B of its own trajectories; nothing is computed after the last step with a weight.

    Args:
        fake: the fake score. output: what the method compares. in_flight: steps that may wait for their teachers while
            the next is computed. seen: takes the samples, for the fake score to learn from.
    """
    x, before = batch.start(), None  # `before`: the x0 of the step before
    waiting: deque[_Asked] = deque()
    for j in range(trained_length(weights)):
        trained = weights[j] > 0
        with torch.set_grad_enabled(trained):
            velocity = batch.student(x, j)
        noise = batch.noise(j) if path[j].std > 0 else None
        following, clean = advance(path[j], x, velocity.detach(), before, noise)
        if trained:
            sample = Sample(j, *output(path[j], clean, following))
            seen.append(sample)
            noised = renoised(
                sample.x,
                torch.full((len(x),), sample.least, device=x.device),
                torch.full((len(x),), sample.most, device=x.device),
                batch.uniform("score time", j),
                batch.noise_for("score", j),
            )
            answer = batch.teachers_at(noised.x, noised.t)
            with torch.no_grad():
                waiting.append(_Asked(j, x, velocity, clean, noised, fake(noised.x, noised.t), answer))
        x, before = following, clean
        while len(waiting) > in_flight or (waiting and waiting[0].answer.done()):
            yield _matched(path, waiting.popleft())
    while waiting:
        yield _matched(path, waiting.popleft())


def renoised(x: Tensor, least: Tensor, most: Tensor, uniform: Tensor, noise: Tensor) -> Renoised:
    """Images at level `least` [B], noised further to a level t between that and `most`.

    From level s to t the flow's noising is x_t = a x_s + c e with a = (1 - t) / (1 - s), c^2 = t^2 - (a s)^2.
    """
    t = least + (most - least) * (_FIRST + (_LAST - _FIRST) * uniform)
    a = (1 - t) / (1 - least)
    c = (t.square() - (a * least).square()).sqrt()
    return Renoised(_wide(a, x) * x + _wide(c, x) * noise, t, c, noise)


def fake_loss(velocity: Tensor, noised: Renoised) -> Tensor:
    """Denoising score matching, [B]: mean (e - (c / t) eps)^2, where eps = x_t + (1 - t) v is the noise that `velocity`
    sees in x_t.

    The score of p_S(x_t) is -E[e | x_t] / c, and that of a flow -eps / t: they are equal at the minimum, whatever level
    the image was noised from. From a clean image (c = t) it is flow matching, as DMD2 trains its fake score. TDM's code
    regresses on the student's x0 with importance weights in its place, which is not unbiased.
    """
    x, t, c, noise = noised
    eps = x + _wide(1 - t, x) * velocity
    return (noise - _wide(c / t, x) * eps).square().flatten(1).mean(1)


def _matched(path: Sequence[Transition], asked: _Asked) -> ScoreMatch:
    x_t, t = asked.noised.x, asked.noised.t
    teacher = asked.answer.result().to(x_t.device, non_blocking=True)
    away = (asked.clean - (x_t - _wide(t, x_t) * teacher)).abs().double().flatten(1).mean(1)
    push = _wide(t / away.clamp(min=_LEAST_DISTANCE).to(t), x_t) * (teacher - asked.fake)
    transition = path[asked.step]
    return ScoreMatch(
        step=asked.step,
        transition=transition,
        x=asked.x,
        noise=None,
        student=asked.velocity,
        target=asked.velocity.detach() + push / transition.sigma,
        gap=(asked.fake - teacher).square().flatten(1).mean(1),
    )


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, ...]."""
    return values.view(-1, *[1] * (like.ndim - 1))
