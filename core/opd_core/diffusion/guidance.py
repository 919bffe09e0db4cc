"""A network's guided velocity, the same for student, teachers and endpoint."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from opd_core.conditioning import Group, Prompts
from opd_core.families.guidance import Guidance


class Forward(Protocol):
    """A velocity network: latents [B, *latent], sigmas [B], conditioning [B, ...] by name, guidance [B] -> velocities
    [B, *latent]. Only networks into which guidance is embedded look at it."""

    def __call__(self, latents: Tensor, sigmas: Tensor, prompts: Mapping[str, Tensor], guidance: Tensor) -> Tensor: ...


def guided_velocity(forward: Forward, latents: Tensor, sigmas: Tensor, prompts: Prompts) -> Tensor:
    """The velocity [B, *latent], float32, with guidance as the family has it, combined in float32, row by row.

    Rows may differ in everything; which rows share a batch does not change a row's arithmetic. A row without guidance
    costs no unconditional forward.

    Args:
        latents: [B, *latent]; sigmas: [B].
    """
    if len(prompts.groups) == 1:
        return _of_group(forward, latents, sigmas, prompts.guidance, prompts.groups[0])
    parts, places = [], []
    for group in prompts.groups:
        assert group.rows is not None
        parts.append(_of_group(forward, latents[group.rows], sigmas[group.rows], prompts.guidance, group))
        places.append(group.rows)
    return torch.cat(parts)[torch.argsort(torch.cat(places))]


def _of_group(forward: Forward, latents: Tensor, sigmas: Tensor, guidance: Guidance, group: Group) -> Tensor:
    if not group.guided:
        return forward(latents, sigmas, group.branches[0], group.scale).float()
    assert guidance.combine is not None
    if len(group.branches) == 1:  # both at once
        twice = [torch.cat([tensor, tensor]) for tensor in (latents, sigmas, group.scale)]
        conditional, unconditional = forward(twice[0], twice[1], group.branches[0], twice[2]).float().chunk(2)
    else:
        conditional, unconditional = (
            forward(latents, sigmas, branch, group.scale).float() for branch in group.branches
        )
    return guidance.combine(conditional, unconditional, group.scale.view(-1, *[1] * (latents.ndim - 1)))
