"""One round of a distillation: matches of student and teachers along trajectories, and the loss of each."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from opd_core.api.training import Method as Kind
from opd_core.teachers.client import ClientStats, TeacherClient
from torch import Tensor

from opd_trainer.batches import prompts_of
from opd_trainer.engine import Engine
from opd_trainer.methods import distribution, dmd, opd, sft, tdm
from opd_trainer.methods.fake_score import FAKE, FakeScore, Seen
from opd_trainer.methods.method import Term, Update
from opd_trainer.objectives.match import Loss, Match
from opd_trainer.objectives.registry import round_weights
from opd_trainer.run import Run
from opd_trainer.trajectories import Trajectories

FAKE_UPDATES = {Kind.DMD2: dmd.FAKE_UPDATES, Kind.TDM: tdm.FAKE_UPDATES}  # of the methods that have a fake score
ENCODED_AHEAD = 512  # prompts: 0.9 GB of embeddings at Stable Diffusion 3.5's size


@dataclass(eq=False)
class Distillation:
    """OPD, SFT, DMD2 or TDM, as the spec says. `weights` [N]: of every solver step. `fake`: of the latter two.
    `branched`: the loss compares both branches of guidance."""

    loss: Loss
    weights: Sequence[float]
    teachers: TeacherClient
    fake: FakeScore | None = None
    branched: bool = False

    @property
    def updates_per_round(self) -> int:
        return 1

    @property
    def state(self) -> Mapping[str, Sequence[Tensor]]:
        return {}

    @property
    def engines(self) -> Mapping[str, Engine]:
        return {} if self.fake is None else {FAKE: self.fake.engine}

    @property
    def stats(self) -> ClientStats:
        return self.teachers.stats

    def trained(self, run: Run, round_: int) -> Sequence[float]:
        return [float(weight > 0) for weight in self.round_weights(run, round_)]

    def tasks(self, run: Run, round_: int) -> Sequence[int]:
        return range(len(run.tasks))

    def round_weights(self, run: Run, round_: int) -> Sequence[float]:
        return round_weights(self.weights, run.training.objective.steps_per_round, run.training.seed, round_)

    def updates(self, run: Run, round_: int) -> Iterator[Update]:
        look_ahead(run, round_)
        weights = self.round_weights(run, round_)
        seen: list[Seen] = []
        terms = self._terms(run, round_, weights, seen)
        yield Update(terms, len(run.batches) * sum(weight > 0 for weight in weights))
        if self.fake is not None:
            self.fake.learn(run, round_, seen)

    def _terms(self, run: Run, round_: int, weights: Sequence[float], seen: list[Seen]) -> Iterator[Term]:
        for rows in run.batches:
            trajectories = Trajectories.of(run, self.teachers, rows, round_, self.branched)
            batch = trajectories.batch
            for match in self._matches(run, trajectories, weights, seen):
                with run.spent("update"):
                    loss = weights[match.step] * self.loss(match)
                steps = torch.full_like(batch.task_of_row, match.step)
                yield Term(batch.task_of_row, steps, batch.loss_weights, loss, match.distance)

    def _matches(
        self, run: Run, trajectories: Trajectories, weights: Sequence[float], seen: list[Seen]
    ) -> Iterator[Match]:
        if run.training.method == Kind.SFT:
            return sft.matches(run.path, weights, trajectories)
        if self.fake is None:
            passes, in_flight = run.training.passes, run.plan.in_flight
            return opd.matches(run.path, weights, trajectories, passes, in_flight, trajectories.guided)
        output = dmd.output if run.training.method == Kind.DMD2 else tdm.output
        samples: list[distribution.Sample] = []
        seen.append((trajectories, samples))
        score = partial(self.fake.velocity, trajectories)
        return distribution.matches(run.path, weights, trajectories, score, output, run.plan.in_flight, samples)

    def figures(self, run: Run) -> dict[str, float]:
        return {} if self.fake is None else self.fake.figures(run)

    def close(self) -> None:
        self.teachers.close()


def look_ahead(run: Run, round_: int) -> None:
    """Encode the prompts of this round, and on a GPU those of later ones, so that the encoders come there seldom."""
    rows = [row for batch in run.batches for row in batch]

    def prompts(of: int) -> list[str]:
        return prompts_of(run.tasks, rows, of, run.training.seed, run.training.images_per_task)

    with run.spent("rollout"):
        wanted = prompts(round_)
        if run.model.device.type == "cuda" and not all(prompt in run.encode for prompt in wanted):
            for later in range(round_ + 1, run.training.rounds):
                if len(wanted) >= ENCODED_AHEAD:
                    break
                wanted += prompts(later)
        run.encode.prepare(wanted)
