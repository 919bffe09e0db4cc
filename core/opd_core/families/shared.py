"""What several families have in common."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from opd_core.diffusion.schedule import Schedule

# Of image and text in blocks with two streams.
JOINT_ATTENTION = (
    "attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out",
    "attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v",
)  # fmt: skip
# Of blocks that attend to the image and then to the text.
SELF_AND_CROSS_ATTENTION = (
    "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
    "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
)  # fmt: skip


def decode_shifted(vae: Any, latents: "Tensor") -> "Tensor":
    """By an autoencoder whose latents were shifted, then scaled."""
    images: Tensor = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
    return images


def uniform_schedule(config: Mapping[str, Any], steps: int, tokens: int) -> "Schedule":
    """linspace(1, 1 / N, N), shifted as the configuration says: by a constant, or linearly in the image tokens."""
    from opd_core.diffusion.schedule import linear_mu, schedule_from_config

    return schedule_from_config(config, steps, mu=linear_mu(config, tokens), uniform=True)


def euler_schedule(config: Mapping[str, Any], steps: int, tokens: int) -> "Schedule":
    """That of diffusers' Euler scheduler; where the model ships another solver (DPM-Solver++, UniPC), with its
    flow_shift."""
    from opd_core.diffusion.schedule import schedule_from_config

    return schedule_from_config({"shift": config["flow_shift"]} if "flow_shift" in config else config, steps)
