"""Flow-GRPO (arXiv 2505.05470) and GRPO-Guard (arXiv 2510.22319): policy gradients along a stochastic sampler.

    sample with noise                                 the action of a step is its next state, a = mu_old + std e
    A = (r - mean of the group) / std                 of the clean image, the same for all its steps
    rho = p(a) / p_old(a)                             of student and sampling policy
    minimise  max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) + kl_weight KL to the base

As in their code the logarithm of rho is a mean over the D elements of a latent, so that it is a D-th root, and a clip
range belongs to a D. With u = b (v - v_old) / std, the way between the means in standard deviations, it is

    Flow-GRPO   ln rho = mean(e u) - mean(u^2) / 2    whose mean is below 0: ratios leave the range on one side
    GRPO-Guard  ln rho = std mean(e u)                its RatioNorm (Eq. 8): mean 0, equal at all steps

and GRPO-Guard divides a step's loss by its -dt (Eq. 12), so that every step pulls alike. Noise is only where it is
trained: in the whole path but its last step, or in a window of it that all images of a round share (Flow-GRPO-Fast,
MixGRPO).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from opd_core.api.teachers import CLIP_NUMEL, trainable_steps
from opd_core.api.training import Algorithm, ReinforcementLearning
from opd_core.diffusion.noise import keyed_seed
from opd_core.diffusion.transitions import Transition
from opd_core.models.adapters import use_adapter
from torch import Tensor

from opd_trainer.methods.method import Term
from opd_trainer.methods.samples import Samples
from opd_trainer.run import STUDENT, Run


@dataclass(frozen=True)
class GRPO:
    settings: ReinforcementLearning

    samples_with = STUDENT

    @property
    def state(self) -> Mapping[str, Sequence[Tensor]]:
        return {}

    def window(self, run: Run, round_: int) -> range:
        """The steps of a round that are taken with noise and trained."""
        size, all_steps = self.times, trainable_steps(len(run.path))
        last_start = min(max(0, len(run.path) // 2 - size), all_steps - size)  # in the noisier half, where it fits
        generator = torch.Generator().manual_seed(keyed_seed(run.training.seed, "window", round_))
        start = int(torch.randint(last_start + 1, (), generator=generator))
        return range(start, start + size)

    def trained(self, run: Run, round_: int) -> list[float]:
        window = self.window(run, round_)
        return [float(j in window) for j in range(len(run.path))]

    @property
    def times(self) -> int:
        """Of an image."""
        assert self.settings.steps_per_image is not None
        return self.settings.steps_per_image

    def terms(self, run: Run, samples: Samples, advantage: Tensor) -> Iterator[tuple[Term, dict[str, Tensor]]]:
        settings, guard = self.settings, self.settings.algorithm == Algorithm.GRPO_GUARD
        assert settings.clip_range is not None
        assert settings.kl_weight is not None
        clip = settings.clip_range * math.sqrt(CLIP_NUMEL / samples.x0[0].numel())
        for visited in samples.visited:
            step = run.path[visited.step]
            with run.spent("rollout"), torch.no_grad():
                use_adapter(run.model.transformer, None)
                base = run.model.velocity(visited.x, step.sigma, samples.prompts)
            # Last, so that what gradient checkpointing computes again on the way back is the student.
            use_adapter(run.model.transformer, STUDENT)
            with run.spent("rollout"):
                student = run.velocity(visited.x, step.sigma, samples.prompts)
            with run.spent("update"):
                ratio = torch.exp(log_ratio(step, visited.noise, student - visited.velocity, guard=guard))
                loss = surrogate(ratio, advantage, clip)
                if guard:
                    loss = loss / (step.sigma - step.sigma_next)
                from_base = (student - base).square().flatten(1).mean(1)
                loss = loss + settings.kl_weight * kl_rate(step) * from_base
            figures = {
                "ratio": ratio.detach(),
                "clipped": ((ratio.detach() - 1).abs() > clip).float(),
                "norm_ratio": student.detach().flatten(1).norm(dim=1) / base.flatten(1).norm(dim=1),
            }
            steps = torch.full_like(samples.tasks, visited.step)
            yield Term(samples.tasks, steps, samples.weights, loss / self.times, from_base), figures

    def finish(self, run: Run) -> None:
        """The next round is sampled by the student as it is."""


def log_ratio(step: Transition, noise: Tensor, moved: Tensor, *, guard: bool) -> Tensor:
    """ln rho, [B], of a policy whose velocity is `moved` [B, ...] away from that which took `step` with `noise`."""
    if guard:
        return step.b * (noise * moved).flatten(1).mean(1)
    away = step.b / step.std * moved
    return (noise * away - away.square() / 2).flatten(1).mean(1)


def surrogate(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's clipped loss, [B]."""
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def kl_rate(step: Transition) -> float:
    """KL to the base per (v - v_base)^2 and unit of time: the KL of the step is -dt times this. It is what published
    weights are for: Flow-GRPO's code leaves the -dt out."""
    return step.b**2 / (2 * step.std**2) * (step.sigma - step.sigma_next)
