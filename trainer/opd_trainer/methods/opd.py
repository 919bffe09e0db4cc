"""On-policy distillation: the student's own trajectory, matched step by step with what the teachers say about the
states it visits (DiffusionOPD, arXiv 2605.15055, Algorithm 1).

Both orders yield the same matches in the same sequence, so the gradients they lead to are equal. `one_pass` trains the
graph that the rollout itself built: the policy does not change within a round, so a second student forward would
compute the same numbers again.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from opd_core.api.training import Passes
from opd_core.diffusion.transitions import Transition
from torch import Tensor

from opd_trainer.methods.rollouts import Answer, Guided, Rollouts, advance, trained_length
from opd_trainer.objectives.match import Branches, Match


def matches(
    path: Sequence[Transition],
    weights: Sequence[float],
    batch: Rollouts,
    passes: Passes,
    in_flight: int,
    guided: Guided | None = None,
) -> Iterator[Match]:
    """What a student learns from B of its own trajectories.

    Args:
        path: the sampler's transitions. weights: of each step in the loss; a step with weight 0 is neither asked about
            nor kept, and nothing is computed after the last one with a weight. in_flight: steps that may wait for their
            teachers while the next is computed; one more graph than that is alive at most. guided: of a batch whose
            student and teachers answer with both branches of guidance, [B, 2, *latent].
    """
    if passes == Passes.ONE:
        return one_pass(path, weights, batch, in_flight, guided)
    return two_passes(path, weights, batch, guided)


class _Visited(NamedTuple):
    step: int
    x: Tensor
    noise: Tensor | None
    answer: Answer


def one_pass(
    path: Sequence[Transition],
    weights: Sequence[float],
    batch: Rollouts,
    in_flight: int,
    guided: Guided | None = None,
) -> Iterator[Match]:
    """Yield while rolling out: the teacher answers step j while the student computes the next ones."""
    length = trained_length(weights)

    def ask(j: int) -> Answer | None:
        return batch.teachers(x, j) if j < length and weights[j] > 0 else None

    x, before = batch.start(), None  # `before`: the x0 of the step before
    waiting: deque[tuple[_Visited, Tensor]] = deque()
    answer = ask(0)
    for j in range(length):
        with torch.set_grad_enabled(answer is not None):
            said = batch.student(x, j)
        noise = batch.noise(j) if path[j].std > 0 else None
        if answer is not None:
            waiting.append((_Visited(j, x, noise, answer), said))
        x, before = advance(path[j], x, _velocity(said.detach(), guided), before, noise)
        # Before anything is yielded: on a GPU the state would else come to the teachers a backward pass later.
        answer = ask(j + 1)
        while len(waiting) > in_flight or (waiting and waiting[0][0].answer.done()):
            yield _matched(path, *waiting.popleft(), guided)
    while waiting:
        yield _matched(path, *waiting.popleft(), guided)


def two_passes(
    path: Sequence[Transition], weights: Sequence[float], batch: Rollouts, guided: Guided | None = None
) -> Iterator[Match]:
    """Roll out without a graph, then run the student again on every state: the order of the paper's Algorithm 1."""
    x, before = batch.start(), None  # `before`: the x0 of the step before
    visited: list[_Visited] = []
    for j in range(trained_length(weights)):
        noise = batch.noise(j) if path[j].std > 0 else None
        if weights[j] > 0:
            visited.append(_Visited(j, x, noise, batch.teachers(x, j)))
        with torch.no_grad():
            x, before = advance(path[j], x, _velocity(batch.student(x, j), guided), before, noise)
    for seen in visited:
        yield _matched(path, seen, batch.student(seen.x, seen.step), guided)


def _velocity(said: Tensor, guided: Guided | None) -> Tensor:
    """Of the student's answer."""
    return said if guided is None else guided.student(said)


def _matched(path: Sequence[Transition], seen: _Visited, said: Tensor, guided: Guided | None) -> Match:
    target = seen.answer.result().to(said.device, non_blocking=True)
    at = (seen.step, path[seen.step], seen.x, seen.noise)
    if guided is None:
        return Match(*at, said, target)
    return Match(*at, guided.student(said), guided.teachers(target), branches=Branches(said, target))
