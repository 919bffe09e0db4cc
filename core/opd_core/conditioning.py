"""What a text-to-image transformer is told about one prompt."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Conditioning:
    """One encoded prompt on the CPU: token embeddings `embeds` [L, D] and a `pooled` embedding [P], of one dtype."""

    embeds: Tensor
    pooled: Tensor

    @cached_property
    def key(self) -> bytes:
        """16 bytes that name the content: equal embeddings have equal keys in every process."""
        digest = hashlib.blake2b(digest_size=16)
        for tensor in (self.embeds, self.pooled):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return digest.digest()

    @property
    def nbytes(self) -> int:
        return self.embeds.nbytes + self.pooled.nbytes


def stack(
    conditionings: Sequence[Conditioning], device: torch.device | str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`embeds` [B, L, D] and `pooled` [B, P] of several prompts, ready for a forward pass."""
    embeds = torch.stack([c.embeds for c in conditionings])
    pooled = torch.stack([c.pooled for c in conditionings])
    return embeds.to(device, dtype), pooled.to(device, dtype)
