"""How good the student is while it trains: the average, a few held-out prompts per task, the task's rewards.

Prompts and noise are the first ones of the evaluation, so points of one run can be compared with each other, and with
the scores of base and teachers on the same images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from opd_core.api.types import Spec
from opd_core.conditioning import Conditioning
from opd_core.models.pipeline import Model
from opd_core.scales import Scales
from torch import Tensor

from opd_trainer.ema import Ema
from opd_trainer.encoders import encoders_on_device
from opd_trainer.engine import World, all_reduce
from opd_trainer.evaluation import LOOK_IMAGES, VALIDATION_PROMPTS
from opd_trainer.evaluation.pictures import save_look
from opd_trainer.evaluation.sampling import Candidate, sample_images, student_scales
from opd_trainer.prompt_files import PromptRecord
from opd_trainer.prompts import held_out_prompts
from opd_trainer.record import Rewards
from opd_trainer.rewards.registry import RewardFn


@dataclass(frozen=True, eq=False)
class Validation:
    """What is scored, and by what; by task. `prompts` and `conditioning` are in the order of the evaluation, `scales`
    are those of the model in training."""

    spec: Spec
    scales: Scales
    prompts: Mapping[str, Sequence[PromptRecord]]
    conditioning: Mapping[str, Sequence[Conditioning]]
    negative: Conditioning
    rewards: Mapping[str, Mapping[str, RewardFn]]

    def due(self, round_: int) -> bool:
        """After `round_` finished rounds."""
        every = self.spec.evaluation.every_rounds
        return every is not None and round_ % every == 0


def validation_prompts(spec: Spec, claims: Path) -> dict[str, list[PromptRecord]]:
    """The first of the evaluation's held-out prompts, by task."""
    return {task: records[:VALIDATION_PROMPTS] for task, records in held_out_prompts(spec, claims).items()}


def build_validation(
    spec: Spec,
    prompts: Mapping[str, Sequence[PromptRecord]],
    rewards: Mapping[str, Mapping[str, RewardFn]],
    model: Model,
) -> Validation:
    length = spec.model.max_sequence_length
    with encoders_on_device(model):
        conditioning = {task: model.encode([r.prompt for r in records], length) for task, records in prompts.items()}
        (negative,) = model.encode([""], length, negative=True)
    return Validation(spec, student_scales(spec), prompts, conditioning, negative, rewards)


def look(validation: Validation, model: Model, adapter: str, ema: Ema, world: World, folder: Path) -> Rewards:
    """Mean rewards of the averaged weights on a few prompts, equal on all ranks; the weights are afterwards what they
    were before.

    Args:
        adapter: name of the adapter in training, whose weights `ema` averages. folder: takes some of the images, as
            TASK/NUMBER.png, or .webp of videos.

    Raises:
        StorageError: it cannot be written.
    """
    few = replace(
        validation,
        prompts={task: records[:VALIDATION_PROMPTS] for task, records in validation.prompts.items()},
        conditioning={task: rows[:VALIDATION_PROMPTS] for task, rows in validation.conditioning.items()},
    )
    candidate = Candidate("student", adapter, validation.scales, fingerprint="")
    with ema.applied():
        scores = score(few, model, candidate, world, folder)
    return {task: {name: float(of.mean()) for name, of in by_reward.items()} for task, by_reward in scores.items()}


def score(
    validation: Validation, model: Model, candidate: Candidate, world: World, folder: Path | None = None
) -> dict[str, dict[str, Tensor]]:
    """Rewards [N] of a model's images by task and reward, float64, equal on all ranks.

    Every rank scores its share of the images; the rewards do not depend on how many ranks there are. `folder` takes the
    first images.
    """
    spec = validation.spec
    scores = {
        (task, name): torch.zeros(len(validation.prompts[task]), dtype=torch.float64)
        for task, rewards in validation.rewards.items()
        for name in rewards
    }
    everything = [(task, number) for task, records in validation.prompts.items() for number in range(len(records))]
    mine = everything[world.rank :: world.size]
    for task, records in validation.prompts.items():
        numbers = [number for owner, number in mine if owner == task]
        conditioning = [validation.conditioning[task][number] for number in numbers]
        batches = sample_images(model, candidate, spec, task, numbers, conditioning, validation.negative)
        for part, images in batches:
            chosen = [records[number] for number in part]
            for name, reward in validation.rewards[task].items():
                answer = reward(images, [r.prompt for r in chosen], [r.metadata for r in chosen])
                scores[task, name][part] = answer.double()
            for number, image in zip(part, images, strict=True):
                if folder is not None and number < LOOK_IMAGES:
                    save_look(image, folder / task / f"{number}", model.frames_per_second)
    total = all_reduce(torch.cat(list(scores.values())).to(model.device), world).cpu()
    parts = dict(zip(scores, torch.split(total, [len(values) for values in scores.values()]), strict=True))
    return {task: {name: parts[task, name] for name in rewards} for task, rewards in validation.rewards.items()}
