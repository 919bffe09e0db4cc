"""The student's own trajectory, matched step by step with what the teachers say about the states it visits.

Both orders yield the same triples (step, student velocity with its graph, teacher velocity) in the same sequence, so
the gradients they lead to are equal. `one_pass` trains the graph that the rollout itself built: the policy does not
change within a round, so a second student forward would compute the same numbers again.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from opd_core.diffusion.transitions import Transition
from torch import Tensor


class Answer(Protocol):
    """A teacher's velocity [B, C, H, W] that may still be on its way."""

    def done(self) -> bool: ...

    def result(self) -> Tensor: ...


class Match(NamedTuple):
    """What student and teacher answer at the state of one step; both [B, C, H, W] float32."""

    step: int
    student: Tensor
    teacher: Tensor


class Trajectories(Protocol):
    """B trajectories: where they start, what a stochastic sampler adds, and who is asked on the way.

    States, noise and velocities are [B, C, H, W] float32.
    """

    def start(self) -> Tensor: ...

    def noise(self, step: int) -> Tensor: ...

    def student(self, x: Tensor, step: int) -> Tensor: ...

    def teachers(self, x: Tensor, step: int) -> Answer: ...


def one_pass(
    path: Sequence[Transition], weights: Sequence[float], batch: Trajectories, in_flight: int
) -> Iterator[Match]:
    """Yield while rolling out: the teacher answers step j while the student computes the next ones.

    Args:
        path: the sampler's transitions. weights: of each step in the loss; a step with weight 0 is neither asked about
            nor kept, and nothing is computed after the last one with a weight. in_flight: steps that may wait for their
            teachers while the next is computed; one more graph than that is alive at most.
    """
    x, before = batch.start(), None  # `before`: the x0 of the step before
    waiting: deque[tuple[int, Tensor, Answer]] = deque()
    for j in range(_trained_length(weights)):
        trained = weights[j] > 0
        if trained:
            answer = batch.teachers(x, j)
        with torch.set_grad_enabled(trained):
            velocity = batch.student(x, j)
        if trained:
            waiting.append((j, velocity, answer))
        x, before = advance(path[j], x, velocity.detach(), before, batch, j)
        while len(waiting) > in_flight or (waiting and waiting[0][2].done()):
            yield _matched(*waiting.popleft())
    while waiting:
        yield _matched(*waiting.popleft())


def two_passes(path: Sequence[Transition], weights: Sequence[float], batch: Trajectories) -> Iterator[Match]:
    """Roll out without a graph, then run the student again on every state: the order of the paper's Algorithm 1."""
    x, before = batch.start(), None  # `before`: the x0 of the step before
    visited: list[tuple[int, Tensor, Answer]] = []
    for j in range(_trained_length(weights)):
        if weights[j] > 0:
            visited.append((j, x, batch.teachers(x, j)))
        with torch.no_grad():
            x, before = advance(path[j], x, batch.student(x, j), before, batch, j)
    for j, state, answer in visited:
        yield _matched(j, batch.student(state, j), answer)


def advance(
    step: Transition, x: Tensor, velocity: Tensor, before: Tensor | None, batch: Trajectories, j: int
) -> tuple[Tensor, Tensor]:
    """The next state, mean + std e, and the x0 that this step pointed at, for the next step's `before`."""
    mean = step.mean(x, velocity, before)
    return mean + step.std * batch.noise(j) if step.std > 0 else mean, step.clean(x, velocity)


def _trained_length(weights: Sequence[float]) -> int:
    return max((j + 1 for j, weight in enumerate(weights) if weight > 0), default=0)


def _matched(j: int, velocity: Tensor, answer: Answer) -> Match:
    return Match(j, velocity, answer.result().to(velocity.device, non_blocking=True))
