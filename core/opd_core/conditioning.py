"""What a text-to-image network is told about prompts: named tensors, of one prompt and of a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from opd_core.families.guidance import Guidance
from opd_core.scales import Scales
from opd_core.teachers.contract import MASK, content_key

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
# Whether a row is guided, the shapes of what it is told and, where it is guided, of its negative prompt.
Likeness = tuple[bool, Shapes, Shapes]


@dataclass(frozen=True, eq=False)
class Conditioning:
    """One encoded prompt: tensors by name, as its family's `Outline.conditioning` says, on one device. They are of one
    floating dtype but for a `mask`, which is bool."""

    tensors: Mapping[str, Tensor]

    @cached_property
    def key(self) -> bytes:
        """16 bytes that name the content: equal tensors have equal keys in every process."""
        return content_key({name: (str(t.dtype), tuple(t.shape), _bytes(t)) for name, t in self.tensors.items()})

    @cached_property
    def shapes(self) -> Shapes:
        """What rows that are computed together must share."""
        return tuple(sorted((name, tuple(tensor.shape)) for name, tensor in self.tensors.items()))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def finite(self) -> bool:
        return all(bool(torch.isfinite(tensor).all()) for tensor in self.tensors.values())

    def to(self, device: torch.device | str) -> "Conditioning":
        return Conditioning({name: tensor.to(device) for name, tensor in self.tensors.items()})

    def cast(self, dtype: torch.dtype) -> "Conditioning":
        """The same in `dtype`; remembered, since a trainer asks at every step."""
        if all(tensor.dtype == dtype for name, tensor in self.tensors.items() if name != MASK):
            return self
        if dtype not in self._casts:
            self._casts[dtype] = Conditioning(
                {name: tensor if name == MASK else tensor.to(dtype) for name, tensor in self.tensors.items()}
            )
        return self._casts[dtype]

    @cached_property
    def _casts(self) -> "dict[torch.dtype, Conditioning]":
        return {}


def likeness(guidance: Guidance, positive: Conditioning, negative: Conditioning, scales: Sequence[float]) -> Likeness:
    """What rows must share that a forward pass takes together."""
    guided = guidance.guides(scales)
    return guided, positive.shapes, negative.shapes if guided else ()


@dataclass(frozen=True, eq=False)
class Group:
    """Rows of a batch that are computed together: what they are told has equal shapes, and all of them are guided or
    none is.

    Args:
        rows: their places in the batch, on its device; None: they are all of it, in order.
        branches: of the conditional branch and, where they are guided, of the unconditional one, tensors [b, ...] by
            name; a single one [2 b, ...] with both, one behind the other, where their shapes are equal.
        scales: [b, 2] float32, as `Scales`.
    """

    rows: Tensor | None
    branches: Sequence[Mapping[str, Tensor]]
    scales: Tensor
    guided: bool

    @property
    def passes(self) -> int:
        """How often its rows stand, one behind the other, in one forward pass."""
        return 2 if self.guided and len(self.branches) == 1 else 1


@dataclass(frozen=True, eq=False)
class Prompts:
    """What the B rows of a batch are told, ready on the network's device."""

    guidance: Guidance
    groups: Sequence[Group]

    @classmethod
    def of(
        cls,
        guidance: Guidance,
        positive: Sequence[Conditioning],
        negative: Sequence[Conditioning],
        scales: Sequence[Scales],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> Self:
        """Of B rows, which may differ in everything: conditioning, negative conditioning and scales.

        Rows of equal shapes are computed together, so that padding, and with it an answer, never depends on company.
        """
        places: dict[Likeness, list[int]] = {}
        for i, row in enumerate(zip(positive, negative, scales, strict=True)):
            places.setdefault(likeness(guidance, *row), []).append(i)
        groups = []
        for (guided, *_), rows in places.items():
            branches = [stack([positive[i] for i in rows], device, dtype)]
            if guided:
                branches.append(stack([negative[i] for i in rows], device, dtype))
                if positive[rows[0]].shapes == negative[rows[0]].shapes:
                    branches = [{name: torch.cat([tensor, branches[1][name]]) for name, tensor in branches[0].items()}]
            whole = len(rows) == len(positive)
            groups.append(
                Group(
                    rows=None if whole else torch.tensor(rows, device=device),
                    branches=branches,
                    scales=torch.tensor([scales[i] for i in rows], dtype=torch.float32, device=device),
                    guided=guided,
                )
            )
        return cls(guidance, groups)


def stack(conditionings: Sequence[Conditioning], device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors [B, ...] by name of prompts of equal shapes. A prompt of all rows, as the unconditional one is, takes the
    memory of one."""
    rows = conditionings[:1] if all(c is conditionings[0] for c in conditionings) else conditionings
    cast = [c.cast(dtype).tensors for c in rows]
    stacked = {name: torch.stack([tensors[name] for tensors in cast]).to(device) for name in cast[0]}
    return {name: tensor.expand(len(conditionings), *tensor.shape[1:]) for name, tensor in stacked.items()}


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().data
