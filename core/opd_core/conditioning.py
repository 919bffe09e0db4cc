"""What a text-to-image transformer is told about one prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from opd_core.teachers.contract import content_key


@dataclass(frozen=True, eq=False)
class Conditioning:
    """One encoded prompt: token embeddings `embeds` [L, D] and a `pooled` one [P], of one dtype, on one device."""

    embeds: Tensor
    pooled: Tensor

    @cached_property
    def key(self) -> bytes:
        """16 bytes that name the content: equal embeddings have equal keys in every process."""
        parts = ((str(t.dtype), tuple(t.shape), _bytes(t)) for t in (self.embeds, self.pooled))
        return content_key(*parts)

    @property
    def nbytes(self) -> int:
        return self.embeds.nbytes + self.pooled.nbytes

    def cast(self, dtype: torch.dtype) -> "Conditioning":
        """The same in `dtype`; remembered, since a trainer asks at every step."""
        if dtype == self.embeds.dtype:
            return self
        if dtype not in self._casts:
            self._casts[dtype] = Conditioning(self.embeds.to(dtype), self.pooled.to(dtype))
        return self._casts[dtype]

    @cached_property
    def _casts(self) -> "dict[torch.dtype, Conditioning]":
        return {}


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().data


def stack(
    conditionings: Sequence[Conditioning], device: torch.device | str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`embeds` [B, L, D] and `pooled` [B, P] of several prompts, ready for a forward pass. A prompt of all rows, as the
    unconditional one is, takes the memory of one."""
    rows = conditionings[:1] if all(c is conditionings[0] for c in conditionings) else conditionings
    embeds = torch.stack([c.embeds for c in rows]).to(device, dtype)
    pooled = torch.stack([c.pooled for c in rows]).to(device, dtype)
    count = len(conditionings)
    return embeds.expand(count, -1, -1), pooled.expand(count, -1)
