"""One round of reinforcement learning: images of a few prompts, their rewards, and optimiser steps on what they teach.

    sample    every prompt `groupSize` times          score     each image by the task's rewards
    compare   the images of a prompt with each other  update    by the algorithm's loss, `updatesPerRound` times

Images, prompts, noise and times are keyed by round and number: neither ranks nor restarts change them.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import torch
from opd_core.api.types import TeacherTraining
from opd_core.diffusion.transitions import Transition
from opd_core.errors import DivergedError, InvalidError
from opd_core.teachers.client import ClientStats
from torch import Tensor

from opd_trainer.engine import Engine, all_reduce
from opd_trainer.methods.advantages import advantages, weighted
from opd_trainer.methods.method import Term, Update
from opd_trainer.methods.samples import Samples, rank_images, sample
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
    """A teacher's training. `settings` are complete; `quiet` [N]: the sampler's steps without noise."""

    settings: TeacherTraining
    algorithm: Algorithm
    rewards: Mapping[str, RewardFn]
    quiet: Sequence[Transition]
    stats: ClientStats = field(default_factory=ClientStats)
    _figures: dict[str, list[float]] = field(default_factory=dict)  # name -> [sum, number]
    _flat_rounds: int = 0

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

    def updates(self, run: Run, round_: int) -> Iterator[Update]:
        self._figures = {}
        settings = self.settings
        samples, scores = self._sampled(run, round_)
        grouped = scores.view(-1, settings.group_size, len(self.rewards))
        self._see(run, round_, weighted(grouped, self.weights))
        gained = advantages(
            grouped,
            self.weights,
            scale=settings.advantage_scale,
            clip=settings.advantage_clip,
            normalize=settings.normalize_rewards,
        ).flatten()
        for batches in samples:
            yield Update(self._terms(run, batches, gained), len(batches) * self.algorithm.times)
        self.algorithm.finish(run)

    @property
    def weights(self) -> list[float]:
        """Of the rewards, in their order."""
        told = {each.reward: each.weight for each in self.settings.reward_weights}
        return [told.get(name, 1.0) for name in self.rewards]

    def figures(self, run: Run) -> dict[str, float]:
        names = list(self._figures)
        if not names:
            return {}
        sums = torch.tensor([self._figures[name] for name in names], dtype=torch.float64, device=run.world.device)
        total = all_reduce(sums, run.world).cpu()
        return {name: float(value / number) for name, (value, number) in zip(names, total, strict=True)}

    def close(self) -> None:
        """It holds nothing."""

    def _sampled(self, run: Run, round_: int) -> tuple[list[list[Samples]], Tensor]:
        """This rank's images by update, and the scores [M, R] of all ranks' images, float64 on the CPU.

        Raises:
            RefusedError: a reward has no number for an image. UnavailableError: its servers do not answer.
        """
        size, images = run.plan.micro_batch_size, run.training.images_per_task
        parts = rank_images(images, self.updates_per_round, size, run.world.rank, run.world.size)
        share = images // self.updates_per_round // run.world.size
        window, policy = self.algorithm.window(run, round_), self.algorithm.samples_with
        scores = torch.zeros(images, len(self.rewards), dtype=torch.float64)
        samples: list[list[Samples]] = [[] for _ in parts]
        # While rewards are computed, or waited for, the next images are sampled.
        scorer, asked = ThreadPoolExecutor(1, thread_name_prefix="rewards"), []
        try:
            for update, batches in enumerate(parts):
                for numbers in batches:
                    batch = sample(run, numbers, round_, self.settings.group_size, policy, window, self.quiet, share)
                    self._check(batch)
                    samples[update].append(batch)
                    asked.append((batch, scorer.submit(self._score, batch, run.model.decode(batch.x0).cpu())))
            with run.spent("reward"):
                for batch, answer in asked:
                    scores[list(batch.numbers)] = answer.result()
        finally:
            scorer.shutdown(cancel_futures=True)
        return samples, all_reduce(scores.to(run.world.device), run.world).cpu()

    def _score(self, batch: Samples, images: Tensor) -> Tensor:
        """[B, R]."""
        prompts, metadata = [record.prompt for record in batch.records], [record.metadata for record in batch.records]
        return torch.stack([reward(images, prompts, metadata).double() for reward in self.rewards.values()], 1)

    def _terms(self, run: Run, batches: Sequence[Samples], gained: Tensor) -> Iterator[Term]:
        for batch in batches:
            advantage = gained[list(batch.numbers)].to(batch.x0)
            for term, figures in self.algorithm.terms(run, batch, advantage):
                for name, values in figures.items():
                    self._count(name, values)
                yield term

    def _see(self, run: Run, round_: int, rewards: Tensor) -> None:
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
        self._flat_rounds = self._flat_rounds + 1 if flat.all() else 0
        if self._flat_rounds >= _MOST_FLAT:
            (task,) = run.tasks
            raise InvalidError(
                f"round {round_ + 1}: for {_MOST_FLAT} rounds all images of one prompt had the same reward in task "
                f"{task.name}, {float(rewards.mean()):.4g} on average in this one, so there is nothing to learn from; "
                "the last checkpoint is intact; use a reward that tells images apart, more images per prompt "
                "(groupSize), or fewer rounds where the task is solved"
            )

    def _count(self, name: str, values: Tensor) -> None:
        known = self._figures.setdefault(name, [0.0, 0.0])
        known[0] += float(values.double().sum())
        known[1] += values.numel()

    def _check(self, samples: Samples) -> None:
        if not torch.isfinite(samples.x0).all():
            raise DivergedError(
                f"round {samples.round + 1}: images of task {samples.task} have left the finite numbers; the last "
                "checkpoint is intact; lower the teacher's training.optimizer.learningRate"
            )
