"""Latents as the tokens of networks that take two by two pixels each, and where the tokens are."""

import torch
from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h/2 * w/2, 4 C], a token's numbers ordered by channel, then row, then column."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height // 2 * (width // 2), 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The latents [B, C, h, w] of `pack`."""
    batch, _, numbers = tokens.shape
    patches = tokens.view(batch, height // 2, width // 2, numbers // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, numbers // 4, height, width)


def positions(height: int, width: int, axes: int, device: torch.device) -> Tensor:
    """[height * width, axes]: the second and third number are a token's row and column, all others zero."""
    found = torch.zeros(height, width, axes, device=device)
    found[..., 1] = torch.arange(height, device=device)[:, None]
    found[..., 2] = torch.arange(width, device=device)[None, :]
    return found.view(height * width, axes)
