"""The noise levels that a sampler visits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_core.errors import InvalidError
from opd_core.imports import without_collection

with without_collection():
    from diffusers import FlowMatchEulerDiscreteScheduler


@dataclass(frozen=True, eq=False)
class Schedule:
    """`sigmas` [N + 1], float64, strictly decreasing from 1 to 0: the sampler makes N steps.

    Made from the base's configuration, which its fingerprint covers: who agrees on the base agrees on the schedule.
    """

    sigmas: NDArray[np.float64]

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1


def schedule_from_config(
    config: Mapping[str, Any], steps: int, *, mu: float | None = None, uniform: bool = False
) -> Schedule:
    """The schedule of `steps` steps that a model's own scheduler configuration describes.

    The scheduler of diffusers is asked once for its sigmas and thrown away: it keeps a step counter, so sharing one
    between requests corrupts both (https://github.com/huggingface/diffusers/issues/3672).

    Args:
        config: `scheduler_config.json` of the model.
        steps: solver steps N >= 1.
        mu: shift of a configuration that has dynamic shifting; others have their own.
        uniform: from linspace(1, 1 / N, N), as most pipelines call their scheduler, instead of from its own range.
    """
    if steps < 1:
        raise InvalidError(f"sampler.steps is {steps}; use at least 1")
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(config))
    levels = np.linspace(1.0, 1 / steps, steps).tolist() if uniform else None
    scheduler.set_timesteps(None if uniform else steps, sigmas=levels, mu=mu)
    sigmas = scheduler.sigmas.double().cpu().numpy()
    if not (sigmas[0] <= 1.0 and sigmas[-1] == 0.0 and np.all(np.diff(sigmas) < 0)):
        raise InvalidError(
            f"the model's scheduler gives sigmas {sigmas.tolist()}, which do not fall from 1 to 0; "
            "use a flow-matching scheduler configuration"
        )
    return Schedule(sigmas)


def linear_mu(config: Mapping[str, Any], tokens: int) -> float:
    """Linear in the tokens of an image between the configuration's two points, as in diffusers' pipelines."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(low + (high - low) / (many - few) * (tokens - few))
