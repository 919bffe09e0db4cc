"""A network's guided velocity, and the two that it is made of: the same for student, teachers and endpoint."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from opd_core.conditioning import Group, Prompts
from opd_core.errors import InvalidError
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
    return _by_group(partial(_velocity, forward, prompts.guidance), latents, sigmas, prompts)


def guidance_branches(forward: Forward, latents: Tensor, sigmas: Tensor, prompts: Prompts) -> Tensor:
    """What guidance combines: the conditional and the unconditional velocity, [B, 2, *latent] float32.

    Args:
        latents: [B, *latent]; sigmas: [B].

    Raises:
        InvalidError: a row has no guidance, and so no second branch.
    """
    return _by_group(lambda *rows: torch.stack(_both(forward, prompts.guidance, *rows), 1), latents, sigmas, prompts)


def combined(guidance: Guidance, branches: Tensor, scales: Tensor) -> Tensor:
    """The guided velocity [B, *latent] of both branches [B, 2, *latent], with the scales [B, 2] of every row."""
    return _combined(guidance, branches[:, 0], branches[:, 1], scales)


def _by_group(
    answer: Callable[[Tensor, Tensor, Group], Tensor], latents: Tensor, sigmas: Tensor, prompts: Prompts
) -> Tensor:
    if len(prompts.groups) == 1:
        return answer(latents, sigmas, prompts.groups[0])
    parts, places = [], []
    for group in prompts.groups:
        assert group.rows is not None
        parts.append(answer(latents[group.rows], sigmas[group.rows], group))
        places.append(group.rows)
    return torch.cat(parts)[torch.argsort(torch.cat(places))]


def _velocity(forward: Forward, guidance: Guidance, latents: Tensor, sigmas: Tensor, group: Group) -> Tensor:
    if not group.guided:
        return forward(latents, sigmas, group.branches[0], group.scales[:, 0]).float()
    return _combined(guidance, *_both(forward, guidance, latents, sigmas, group), group.scales)


def _combined(guidance: Guidance, conditional: Tensor, unconditional: Tensor, scales: Tensor) -> Tensor:
    assert guidance.combine is not None
    weight = scales[:, guidance.column].view(-1, *[1] * (conditional.ndim - 1))
    return guidance.combine(conditional, unconditional, weight)


def _both(forward: Forward, guidance: Guidance, latents: Tensor, sigmas: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """The conditional and the unconditional velocity."""
    if not group.guided:
        weight = float(group.scales[0, guidance.column])
        raise InvalidError(
            f"both branches of guidance are asked for, and guidance {weight:g} has one in this model's family; raise "
            f"{guidance.field}, or write another objective"
        )
    if len(group.branches) == 1:  # both at once
        twice = [torch.cat([tensor, tensor]) for tensor in (latents, sigmas, group.scales[:, 0])]
        conditional, unconditional = forward(twice[0], twice[1], group.branches[0], twice[2]).float().chunk(2)
    else:
        conditional, unconditional = (
            forward(latents, sigmas, branch, group.scales[:, 0]).float() for branch in group.branches
        )
    return conditional, unconditional
