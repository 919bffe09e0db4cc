"""Images of a round of reinforcement learning: who computes which, how they are sampled, what is remembered of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from opd_core.conditioning import Prompts
from opd_core.diffusion.noise import draw
from opd_core.diffusion.transitions import Transition
from opd_core.models.adapters import use_adapter
from torch import Tensor

from opd_trainer.methods.rollouts import advance
from opd_trainer.prompt_files import PromptRecord
from opd_trainer.prompts import training_prompt
from opd_trainer.run import Run
from opd_trainer.trajectories import student_prompts


class Visited(NamedTuple):
    """A state with the noise that was added after it, and what the sampling policy answered: [B, ...] each."""

    step: int
    x: Tensor
    noise: Tensor
    velocity: Tensor


@dataclass(frozen=True, eq=False)
class Samples:
    """B images that were computed at once.

    Args:
        numbers: which of the round's images; those of one prompt follow one another. records: of their prompts.
        weights: [B], what an update's sum counts them with. x0: their latents [B, ...], on the student's device.
        visited: the steps that were taken with noise.
    """

    task: str
    round: int
    numbers: Sequence[int]
    records: Sequence[PromptRecord]
    prompts: Prompts
    tasks: Tensor
    weights: Tensor
    x0: Tensor
    visited: Sequence[Visited]

    def key(self, i: int) -> tuple[str, int, int]:
        """Names image i of the batch among all images of the training."""
        return self.task, self.round, self.numbers[i]

    def draw(self, run: Run, i: int, *purpose: str | int) -> Tensor:
        """Standard normal, in the shape of a latent, on the CPU."""
        return draw(self.x0.shape[1:], run.training.seed, *purpose, *self.key(i))


class Turn(NamedTuple):
    """Which task a round trains, by index, and how many rounds have trained it before."""

    task: int
    before: int


def turn_of(round_: int, rounds_per_turn: int, tasks: int) -> Turn:
    """Tasks take turns in their order, for so many rounds each."""
    turn, at = divmod(round_, rounds_per_turn)
    return Turn(turn % tasks, turn // tasks * rounds_per_turn + at)


def rank_images(images: int, updates: int, size: int, rank: int, world_size: int) -> list[list[range]]:
    """The images of one rank by update, in batches of at most `size`: its slice of every update's images."""
    share = images // updates // world_size
    parts = []
    for update in range(updates):
        first = update * (images // updates) + rank * share
        parts.append([range(at, min(at + size, first + share)) for at in range(first, first + share, size)])
    return parts


@torch.no_grad()
def sample(
    run: Run,
    turn: Turn,
    numbers: Sequence[int],
    round_: int,
    group_size: int,
    adapter: str,
    window: range,
    quiet: Sequence[Transition],
    share: int,
) -> Samples:
    """Images `numbers` of a round, by the policy `adapter`.

    Args:
        window: the steps that are taken with noise, as `run.path` has them; the others as `quiet` has them, without.
        share: images of this rank in the update that they belong to.
    """
    task, device, resolution = run.tasks[turn.task], run.model.device, run.training.resolution
    first = turn.before * (run.training.images_per_task // group_size)
    records = [
        training_prompt(task.prompts, run.training.seed, task.name, first + number // group_size) for number in numbers
    ]
    with run.spent("rollout"):
        conditioning = run.encode([record.prompt for record in records])
        prompts = student_prompts(run.model, run.training, conditioning, run.negative)
        shape = run.model.latent_shape(*resolution.size)

        def noise(*purpose: str | int) -> Tensor:
            drawn = [draw(shape, run.training.seed, *purpose, task.name, round_, number) for number in numbers]
            return torch.stack(drawn).to(device, non_blocking=True)

        use_adapter(run.model.transformer, adapter)
        x, before, visited = noise("start"), None, []
        for j in range(len(run.path)):
            velocity = run.model.velocity(x, run.path[j].sigma, prompts)
            added = noise("step", j) if j in window else None
            if added is not None:
                visited.append(Visited(j, x, added, velocity))
            x, before = advance(run.path[j] if j in window else quiet[j], x, velocity, before, added)
    return Samples(
        task=task.name,
        round=round_,
        numbers=numbers,
        records=records,
        prompts=prompts,
        tasks=torch.full((len(numbers),), turn.task, device=device),
        weights=torch.full((len(numbers),), 1 / share, device=device),
        x0=x,
        visited=visited,
    )
