"""How much better an image is than the others of its prompt: reinforcement learning needs no critic then."""

from collections.abc import Sequence

from opd_core.api.training import AdvantageScale
from torch import Tensor

_LEAST_STD = 1e-4  # Flow-GRPO's and DiffusionNFT's: a group without differences has no advantage


def advantages(
    scores: Tensor,
    weights: Sequence[float],
    *,
    scale: AdvantageScale = AdvantageScale.ROUND,
    clip: float = 5.0,
    normalize: bool = False,
) -> Tensor:
    """(r - mean of its group) / standard deviation, within `clip`, of P groups of G images: [P, G].

    Args:
        scores: [P, G, R], of R rewards, which are summed with `weights` [R].
        scale: whose deviation divides: all images', as in the code of both papers, or their group's (Flow-GRPO's text).
        normalize: every reward is normalised in its group before they are summed, so that none drowns another whose
            numbers are smaller (GDPO).
    """
    if normalize:
        scores = _centred(scores) / (_std(scores) + _LEAST_STD)
    rewards = weighted(scores, weights)
    std = _std(rewards) if scale == AdvantageScale.GROUP else rewards.std(correction=0)
    return (_centred(rewards) / (std + _LEAST_STD)).clamp(-clip, clip)


def weighted(scores: Tensor, weights: Sequence[float]) -> Tensor:
    """The reward of each image, [P, G], of scores [P, G, R]."""
    return scores @ scores.new_tensor(weights)


def _centred(values: Tensor) -> Tensor:
    return values - values.mean(1, keepdim=True)


def _std(values: Tensor) -> Tensor:
    """Inside every group."""
    return values.std(1, correction=0, keepdim=True)
