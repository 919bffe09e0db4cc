"""Classifier-free guidance, the same for student, teachers and endpoint."""

from typing import Protocol

import torch
from torch import Tensor


class Forward(Protocol):
    """A velocity network: latents [B, C, H, W], sigmas [B], embeds [B, L, D], pooled [B, P] -> [B, C, H, W]."""

    def __call__(self, latents: Tensor, sigmas: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor: ...


def guided_velocity(
    forward: Forward,
    latents: Tensor,
    sigmas: Tensor,
    embeds: Tensor,
    pooled: Tensor,
    negative_embeds: Tensor,
    negative_pooled: Tensor,
    guidance: Tensor,
) -> Tensor:
    """v_uncond + g (v_cond - v_uncond), combined in float32, row by row.

    Rows may differ in everything. Guidance of at most 1 is off, as in diffusers, and costs no unconditional forward.
    Which rows share a batch does not change a row's arithmetic.

    Args:
        latents: [B, C, H, W]; sigmas: [B]; guidance: [B], on the CPU so that looking at it does not wait for a GPU.
        embeds, pooled: conditioning [B, L, D] and [B, P].
        negative_embeds, negative_pooled: of the unconditional branch, [B, L, D] and [B, P].

    Returns:
        Velocity [B, C, H, W], float32.
    """
    guided_rows = torch.nonzero(guidance > 1).flatten()
    if len(guided_rows) == 0:
        return forward(latents, sigmas, embeds, pooled).float()
    rows = guided_rows.to(latents.device)
    velocity = forward(
        torch.cat([latents, latents[rows]]),
        torch.cat([sigmas, sigmas[rows]]),
        torch.cat([embeds, negative_embeds[rows]]),
        torch.cat([pooled, negative_pooled[rows]]),
    ).float()
    conditional, unconditional = velocity[: len(latents)], velocity[len(latents) :]
    scale = guidance[guided_rows].to(velocity).view(-1, *[1] * (latents.ndim - 1))
    guided = unconditional + scale * (conditional[rows] - unconditional)
    return guided if len(rows) == len(latents) else conditional.index_put((rows,), guided)
