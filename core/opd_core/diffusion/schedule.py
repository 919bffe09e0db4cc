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

TIMESTEPS = 1000  # what rectified-flow transformers of diffusers take as "time 1"


@dataclass(frozen=True, eq=False)
class Schedule:
    """`sigmas` [N + 1], float64, strictly decreasing from 1 to 0: the sampler makes N steps.

    Made from the base's configuration, which its fingerprint covers: who agrees on the base agrees on the schedule.
    """

    sigmas: NDArray[np.float64]

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1


def schedule_from_config(config: Mapping[str, Any], steps: int, image_tokens: int) -> Schedule:
    """The schedule of `steps` steps that a model's own scheduler configuration describes.

    The scheduler of diffusers is asked once for its sigmas and thrown away: it keeps a step counter, so sharing one
    between requests corrupts both (https://github.com/huggingface/diffusers/issues/3672).

    Args:
        config: `scheduler_config.json` of the model.
        steps: solver steps N >= 1.
        image_tokens: length of the transformer's image sequence; used by dynamically shifted schedules only.
    """
    if steps < 1:
        raise InvalidError(f"sampler.steps is {steps}; use at least 1")
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(config))
    if scheduler.config.use_dynamic_shifting:
        scheduler.set_timesteps(steps, mu=_resolution_shift(scheduler.config, image_tokens))
    else:
        scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double().cpu().numpy()
    if not (sigmas[0] <= 1.0 and sigmas[-1] == 0.0 and np.all(np.diff(sigmas) < 0)):
        raise InvalidError(
            f"the model's scheduler gives sigmas {sigmas.tolist()}, which do not fall from 1 to 0; "
            "use a flow-matching scheduler configuration"
        )
    return Schedule(sigmas)


def _resolution_shift(config: Any, image_tokens: int) -> float:
    """Linear in the sequence length between the configuration's two points, as in diffusers' pipelines."""
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return float(config.base_shift + slope * (image_tokens - config.base_image_seq_len))
