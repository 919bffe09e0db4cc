"""One round of reinforcement learning: images of a few prompts, their rewards, and optimiser steps on what they teach.

    sample    every prompt `groupSize` times          score     each image by the task's rewards
    compare   the images of a prompt with each other  update    by the algorithm's loss, `updatesPerRound` times

Images, prompts, noise and times are keyed by round and number: neither ranks nor restarts change them. A
teacher has one task; the tasks of a student take turns.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import torch
from opd_core.api.training import ReinforcementLearning
from opd_core.diffusion.transitions import Transition
from opd_core.errors import DivergedError, InvalidError
from opd_core.teachers.client import ClientStats
from torch import Tensor

from opd_trainer.engine import Engine, all_reduce
from opd_trainer.methods.advantages import advantages, weighted
from opd_trainer.methods.method import Term, Update
from opd_trainer.methods.samples import Samples, Turn, rank_images, sample, turn_of
from opd_trainer.rewards.registry import RewardFn
from opd_trainer.run import Run

_MOST_FLAT = 10  # rounds in a row without any difference inside a group


class Algorithm(Protocol):
    """What DiffusionNFT and the GRPOs differ in."""

    @property
    def samples_with(self) -> str:
        """The adapter that samples."""
        ...

    @property
    def state(self) -> Mapping[str, Sequence[Tensor]]: ...

    @property
    def times(self) -> int:
        """Terms that each batch of images gives."""
        ...

    def window(self, run: Run, round_: int) -> range: ...

    def trained(self, run: Run, round_: int) -> list[float]: ...

    def terms(self, run: Run, samples: Samples, advantage: Tensor) -> Iterator[tuple[Term, dict[str, Tensor]]]:
        """Losses of B images with their `advantage` [B], and [B] of each of some figures."""
        ...

    def finish(self, run: Run) -> None:
        """After the last update of a round."""
        ...


@dataclass(eq=False)
class Reinforcement:
    """Of a teacher, or of a student without teachers.

    Args:
        settings: complete. rewards: by task and name. quiet: [N], the sampler's steps without noise.
        rounds_per_turn: rounds of a task before the next has its turn.
    """

    settings: ReinforcementLearning
    algorithm: Algorithm
    rewards: Mapping[str, Mapping[str, RewardFn]]
    quiet: Sequence[Transition]
    rounds_per_turn: int = 1
    stats: ClientStats = field(default_factory=ClientStats)
    _figures: dict[str, list[float]] = field(default_factory=dict)  # name -> [sum, number]
    _flat_rounds: dict[str, int] = field(default_factory=dict)  # by task

    @property
    def updates_per_round(self) -> int:
        return self.settings.updates_per_round

    @property
    def state(self) -> Mapping[str, Sequence[Tensor]]:
        return self.algorithm.state

    @property
    def engines(self) -> Mapping[str, Engine]:
        return {}

    def trained(self, run: Run, round_: int) -> Sequence[float]:
        return self.algorithm.trained(run, round_)

    def tasks(self, run: Run, round_: int) -> Sequence[int]:
        return [turn_of(round_, self.rounds_per_turn, len(run.tasks)).task]

    def updates(self, run: Run, round_: int) -> Iterator[Update]:
        self._figures = {}
        settings, turn = self.settings, turn_of(round_, self.rounds_per_turn, len(run.tasks))
        task = run.tasks[turn.task].name
        weights = self.weights(task)
        samples, scores = self._sampled(run, round_, turn)
        grouped = scores.view(-1, settings.group_size, len(weights))
        self._see(run, round_, task, weighted(grouped, weights))
        gained = advantages(
            grouped,
            weights,
            scale=settings.advantage_scale,
            clip=settings.advantage_clip,
            normalize=settings.normalize_rewards,
        ).flatten()
        for batches in samples:
            yield Update(self._terms(run, batches, gained), len(batches) * self.algorithm.times)
        self.algorithm.finish(run)

    def weights(self, task: str) -> list[float]:
        """Of a task's rewards, in their order."""
        told = {each.reward: each.weight for each in self.settings.reward_weights}
        return [told.get(name, 1.0) for name in self.rewards[task]]

    def figures(self, run: Run) -> dict[str, float]:
        names = list(self._figures)
        if not names:
            return {}
        sums = torch.tensor([self._figures[name] for name in names], dtype=torch.float64, device=run.world.device)
        total = all_reduce(sums, run.world).cpu()
        return {name: float(value / number) for name, (value, number) in zip(names, total, strict=True)}

    def close(self) -> None:
        """It holds nothing."""

    def _sampled(self, run: Run, round_: int, turn: Turn) -> tuple[list[list[Samples]], Tensor]:
        """This rank's images by update, and the scores [M, R] of all ranks' images, float64 on the CPU.

        Raises:
            RefusedError: a reward has no number for an image. UnavailableError: its servers do not answer.
        """
        size, images = run.plan.micro_batch_size, run.training.images_per_task
        parts = rank_images(images, self.updates_per_round, size, run.world.rank, run.world.size)
        share = images // self.updates_per_round // run.world.size
        window, policy = self.algorithm.window(run, round_), self.algorithm.samples_with
        rewards = self.rewards[run.tasks[turn.task].name]
        scores = torch.zeros(images, len(rewards), dtype=torch.float64)
        samples: list[list[Samples]] = [[] for _ in parts]
        # While rewards are computed, or waited for, the next images are sampled.
        scorer, asked = ThreadPoolExecutor(1, thread_name_prefix="rewards"), []
        try:
            for update, batches in enumerate(parts):
                for numbers in batches:
                    batch = sample(
                        run, turn, numbers, round_, self.settings.group_size, policy, window, self.quiet, share
                    )
                    check(batch)
                    samples[update].append(batch)
                    asked.append((batch, scorer.submit(score, rewards, batch, run.model.decode(batch.x0).cpu())))
            with run.spent("reward"):
                for batch, answer in asked:
                    scores[list(batch.numbers)] = answer.result()
        finally:
            scorer.shutdown(cancel_futures=True)
        return samples, all_reduce(scores.to(run.world.device), run.world).cpu()

    def _terms(self, run: Run, batches: Sequence[Samples], gained: Tensor) -> Iterator[Term]:
        for batch in batches:
            advantage = gained[list(batch.numbers)].to(batch.x0)
            for term, figures in self.algorithm.terms(run, batch, advantage):
                for name, values in figures.items():
                    self._count(name, values)
                yield term

    def _see(self, run: Run, round_: int, task: str, rewards: Tensor) -> None:
        """Rewards [P, G] of a round: what is told of them, and whether they can teach at all.

        Raises:
            InvalidError: they have been the same inside every group for many rounds.
        """
        std = rewards.std(1, correction=0)
        flat = std < 1e-12
        error = rewards.mean(1).std() / len(rewards) ** 0.5 if len(rewards) > 1 else rewards.new_tensor(0.0)
        for name, values in (
            ("reward", rewards), ("reward_error", error), ("group_std", std), ("flat_groups", flat.double())
        ):  # fmt: skip
            self._count(name, values)
        self._flat_rounds[task] = self._flat_rounds.get(task, 0) + 1 if flat.all() else 0
        if self._flat_rounds[task] >= _MOST_FLAT:
            raise InvalidError(
                f"round {round_ + 1}: for {_MOST_FLAT} rounds all images of one prompt had the same reward in task "
                f"{task}, {float(rewards.mean()):.4g} on average in this one, so there is nothing to learn from; "
                "the last checkpoint is intact; use a reward that tells images apart, more images per prompt "
                "(groupSize), or fewer rounds where the task is solved"
            )

    def _count(self, name: str, values: Tensor) -> None:
        known = self._figures.setdefault(name, [0.0, 0.0])
        known[0] += float(values.double().sum())
        known[1] += values.numel()


def score(rewards: Mapping[str, RewardFn], batch: Samples, images: Tensor) -> Tensor:
    """[B, R]."""
    prompts, metadata = [record.prompt for record in batch.records], [record.metadata for record in batch.records]
    return torch.stack([reward(images, prompts, metadata).double() for reward in rewards.values()], 1)


def check(samples: Samples) -> None:
    """Refuse to go on from images that are no numbers."""
    if not torch.isfinite(samples.x0).all():
        raise DivergedError(
            f"round {samples.round + 1}: images of task {samples.task} have left the finite numbers; the last "
            "checkpoint is intact; lower training.optimizer.learningRate"
        )
