"""One batch of a round as the rollout sees it: its noise, its student and its teachers, at the states it visits."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Self

import torch
from opd_core.api.training import Training
from opd_core.conditioning import Conditioning, Prompts
from opd_core.diffusion.guidance import combined
from opd_core.diffusion.noise import draw, uniform
from opd_core.errors import DivergedError
from opd_core.models.pipeline import Model
from opd_core.teachers.client import TeacherClient
from torch import Tensor

from opd_trainer.batches import Batch, Row, build_batch
from opd_trainer.methods.rollouts import Guided
from opd_trainer.run import Run


@dataclass(frozen=True, eq=False)
class Trajectories:
    """B trajectories of one round that are computed at once. States and velocities are [B, *latent] float32.

    `branched`: student and teachers answer with both branches of guidance, [B, 2, *latent].
    """

    run: Run
    client: TeacherClient
    batch: Batch
    branched: bool = False

    @classmethod
    def of(cls, run: Run, client: TeacherClient, rows: list[Row], round_: int, branched: bool = False) -> Self:
        told = partial(student_prompts, run.model, run.training, negative=run.negative)
        with run.spent("rollout"):
            batch = build_batch(
                run.tasks, rows, round_, run.training, run.world.size, run.encode, told, run.model.device
            )
            return cls(run, client, batch, branched)

    def start(self) -> Tensor:
        """Where the trajectories begin: standard normal."""
        return self.noise_for("start")

    def noise(self, step: int) -> Tensor:
        """What the sampler adds at `step`: standard normal."""
        return self.noise_for("step", step)

    def noise_for(self, *purpose: str | int) -> Tensor:
        """Standard normal, keyed by purpose, task, round and number of the image."""
        run, resolution = self.run, self.run.training.resolution
        with run.spent("rollout"):
            shape = run.model.latent_shape(*resolution.size)
            draws = [draw(shape, *key) for key in self._keys(purpose)]
            return torch.stack(draws).to(run.model.device, non_blocking=True)

    def uniform(self, *purpose: str | int) -> Tensor:
        """[B] in [0, 1), keyed like the noise."""
        return torch.tensor([uniform(*key) for key in self._keys(purpose)], device=self.run.model.device)

    def student(self, x: Tensor, step: int) -> Tensor:
        """The student's guided velocity at `x`, or both branches, with its graph where gradients are on."""
        run, batch = self.run, self.batch
        answer = run.branches if self.branched else run.velocity
        with run.spent("rollout"):
            return answer(x, run.path[step].sigma, batch.prompts)

    @cached_property
    def guided(self) -> Guided | None:
        """What makes velocities of both branches; None: velocities are answered."""
        if not self.branched:
            return None
        run, tasks = self.run, self.batch.task_of_row
        theirs = torch.tensor([task.scales for task in run.tasks], device=tasks.device)[tasks]
        own = torch.tensor([run.training.scales], device=tasks.device).expand_as(theirs)
        return Guided(*(partial(combined, run.model.guidance, scales=scales) for scales in (own, theirs)))

    def teachers(self, x: Tensor, step: int) -> "TimedAnswers":
        """Ask the teacher of every row's task about `x`; returns at once.

        Raises:
            DivergedError: `x` has left the finite numbers: it is the student that failed, not its teacher.
        """
        return self._ask(x, torch.full((len(x),), self.run.path[step].sigma), f"before step {step}")

    def teachers_at(self, x: Tensor, sigmas: Tensor) -> "TimedAnswers":
        """As `teachers`, at a noise level of every row's own, [B]."""
        return self._ask(x, sigmas.cpu(), "in images with new noise")

    @cached_property
    def unguided(self) -> Prompts:
        """What a network without guidance is told of the rows' prompts. A scale that is the network's own input, or has
        no effect, stays the student's."""
        run, prompts = self.run, self.batch.conditioning
        scales = run.model.guidance.without(run.training.scales)
        return run.model.prompts(prompts, [run.negative] * len(prompts), [scales] * len(prompts))

    def _ask(self, x: Tensor, sigmas: Tensor, where: str) -> "TimedAnswers":
        run = self.run
        with run.spent("rollout"):
            states = x.cpu()  # on a GPU, until all that is queued there has been computed: not the teachers' time
            self._check(states, where)
            extrapolation = run.training.objective.extrapolation
            spans = self.batch.spans
            teachers = [self._submit(task, states, sigmas, span, base=False) for task, span in spans]
            if extrapolation == 1:
                return TimedAnswers(run, teachers)
            base = [self._submit(task, states, sigmas, span, base=True) for task, span in spans]
            return TimedAnswers(run, teachers, base, extrapolation)

    def _submit(self, task: int, states: Tensor, sigmas: Tensor, span: slice, base: bool) -> "Future[Tensor]":
        run = self.run
        return self.client.submit(
            run.tasks[task].name,
            states[span],
            sigmas[span],
            torch.tensor([run.tasks[task].scales] * (span.stop - span.start)),
            self.batch.conditioning[span],
            run.negative,
            base,
            self.branched,
        )

    def _keys(self, purpose: tuple[str | int, ...]) -> list[tuple[str | int, ...]]:
        """What a draw for every row is keyed by."""
        tasks, batch, seed = self.run.tasks, self.batch, self.run.training.seed
        return [(seed, *purpose, tasks[row.task].name, batch.round, row.sample) for row in batch.rows]

    def _check(self, states: Tensor, where: str) -> None:
        for task, span in self.batch.spans:
            if not torch.isfinite(states[span]).all():
                raise DivergedError(
                    f"round {self.batch.round + 1}: the student left the finite numbers {where} on task "
                    f"{self.run.tasks[task].name}; the last checkpoint is intact; lower "
                    "training.optimizer.learningRate"
                )


def student_prompts(
    model: Model, training: Training, prompts: Sequence[Conditioning], negative: Conditioning
) -> Prompts:
    """What the student is told of so many prompts, with the spec's guidance."""
    return model.prompts(prompts, [negative] * len(prompts), [training.scales] * len(prompts))


@dataclass(frozen=True)
class TimedAnswers:
    """The answers to one state of a batch, from all its teachers; waiting for them is counted.

    With answers of the `base` they are v_base + extrapolation (v_T - v_base), branch by branch where both are asked
    for: STEP-OPD's way beyond the teacher (arXiv 2608.04887; GFD-OPD, arXiv 2609.39692, has 1.25).
    """

    run: Run
    teachers: Sequence["Future[Tensor]"]
    base: Sequence["Future[Tensor]"] = ()
    extrapolation: float = 1.0

    def done(self) -> bool:
        return all(future.done() for future in (*self.teachers, *self.base))

    def result(self) -> Tensor:
        with self.run.spent("teacher_wait"):
            velocity = torch.cat([future.result() for future in self.teachers])
            if not self.base:
                return velocity
            return torch.lerp(torch.cat([future.result() for future in self.base]), velocity, self.extrapolation)
