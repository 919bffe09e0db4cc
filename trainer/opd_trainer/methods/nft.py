"""DiffusionNFT (arXiv 2509.16117): reinforcement learning on the forward process.

    sample x0 with the old policy, without noise      score it: r in [0, 1] is how good it is among its group
    x = (1 - t) x0 + t e                              at noise levels t of the sampler, with noise e of its own
    v+ = beta v + (1 - beta) v_old                    v- = (1 + beta) v_old - beta v
    minimise  r |x0+ - x0|^2 + (1 - r) |x0- - x0|^2   where x0+- = x - t v+-: good images pull, bad ones push
    v_old follows v

There are no likelihoods and no trajectories, so any sampler will do. Both distances are divided by their mean absolute
value, and the sum by beta, as in the authors' code.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from opd_core.api.training import OldPolicy, ReinforcementLearning
from opd_core.diffusion.noise import keyed_seed
from opd_core.models.adapters import use_adapter
from torch import Tensor, nn

from opd_trainer.methods.method import Term
from opd_trainer.methods.samples import Samples
from opd_trainer.run import STUDENT, Run

OLD = "old"  # the adapter that samples
_LEAST_DISTANCE = 1e-5


@dataclass(eq=False)
class DiffusionNFT:
    """`student`, `old`: the parameters of both policies, in one order."""

    settings: ReinforcementLearning
    student: Sequence[nn.Parameter]
    old: Sequence[nn.Parameter]

    samples_with = OLD

    @property
    def state(self) -> Mapping[str, Sequence[Tensor]]:
        return {OLD: list(self.old)}

    def window(self, run: Run, round_: int) -> range:
        """Steps that are sampled with noise and remembered: none."""
        return range(0)

    def trained(self, run: Run, round_: int) -> list[float]:
        """Every step as often as any other, in expectation."""
        return [self.times / len(run.path)] * len(run.path)

    @property
    def times(self) -> int:
        """Of an image."""
        assert self.settings.steps_per_image is not None
        return self.settings.steps_per_image

    def terms(self, run: Run, samples: Samples, advantage: Tensor) -> Iterator[tuple[Term, dict[str, Tensor]]]:
        settings = self.settings
        assert settings.kl_weight is not None
        sigmas = samples.x0.new_tensor([step.sigma for step in run.path])
        order = torch.stack([_order(run, samples, i) for i in range(len(samples.x0))]).to(samples.x0.device)
        goodness = optimality(advantage, settings.advantage_clip)
        for j in range(self.times):
            steps = order[:, j]
            t = sigmas[steps]
            noise = torch.stack([samples.draw(run, i, "forward", j) for i in range(len(samples.x0))])
            x = torch.lerp(samples.x0, noise.to(samples.x0.device), _wide(t, samples.x0))
            with run.spent("rollout"), torch.no_grad():
                use_adapter(run.model.transformer, OLD)
                old = run.model.velocity(x, t, samples.prompts)
                use_adapter(run.model.transformer, None)
                base = run.model.velocity(x, t, samples.prompts)
            # Last, so that what gradient checkpointing computes again on the way back is the student.
            use_adapter(run.model.transformer, STUDENT)
            with run.spent("rollout"):
                student = run.velocity(x, t, samples.prompts)
            with run.spent("update"):
                from_base = _mean((student - base).square())
                contrast = nft_loss(samples.x0, x, t, student, old, goodness, settings.beta)
                loss = settings.advantage_clip * contrast + settings.kl_weight * from_base
            figures = {
                "old_distance": _mean((student.detach() - old).square()),
                "norm_ratio": student.detach().flatten(1).norm(dim=1) / base.flatten(1).norm(dim=1),
            }
            yield Term(samples.tasks, steps, samples.weights, loss / self.times, from_base), figures

    @torch.no_grad()
    def finish(self, run: Run) -> None:
        """The old policy follows the trained one."""
        torch._foreach_lerp_(list(self.old), list(self.student), 1 - old_decay(self.settings.old_policy, run.steps))


def optimality(advantage: Tensor, clip: float) -> Tensor:
    """r in [0, 1]: 1/2 for an image that is like the others of its prompt (Algorithm 1)."""
    return (advantage.clamp(-clip, clip) / (2 * clip) + 0.5).clamp(0, 1)


def nft_loss(x0: Tensor, x: Tensor, t: Tensor, student: Tensor, old: Tensor, goodness: Tensor, beta: float) -> Tensor:
    """[B]. Tensors are [B, ...], t and goodness [B].

    At student = old its gradient by the student's velocity is (2 goodness - 1) times that of flow matching on x0, each
    divided by the mean absolute distance: whatever beta is.
    """
    positive = torch.lerp(old, student, beta)
    negative = torch.lerp(old, student, -beta)
    near, far = (_distance(x - _wide(t, x) * velocity, x0) for velocity in (positive, negative))
    return (goodness * near + (1 - goodness) * far) / beta


def old_decay(policy: OldPolicy, steps: int) -> float:
    """How much of itself the old policy keeps after so many optimiser steps (the authors' decay types 0, 1 and 2)."""
    if policy == OldPolicy.COPY:
        return 0.0
    if policy == OldPolicy.LINEAR:
        return min(0.001 * steps, 0.5)
    return min(0.0075 * max(0, steps - 75), 0.999)


def _distance(image: Tensor, x0: Tensor) -> Tensor:
    """Squared distance over the absolute one, which is a constant to the gradient; means over elements, [B]."""
    difference = image - x0
    absolute = difference.detach().abs().double().flatten(1).mean(1).clamp(min=_LEAST_DISTANCE)
    return _mean(difference.square()) / absolute.to(difference)


def _order(run: Run, samples: Samples, i: int) -> Tensor:
    """The solver steps in an order of image i's own."""
    key = keyed_seed(run.training.seed, "times", *samples.key(i))
    return torch.randperm(len(run.path), generator=torch.Generator().manual_seed(key))


def _mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)


def _wide(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.ndim - 1))
