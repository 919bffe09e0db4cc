"""What answers a query: one copy of the base, N adapters, a cache of prompt embeddings. The same code in Triton and
inside the trainer."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_core.conditioning import Conditioning, stack
from opd_core.diffusion.guidance import guided_velocity
from opd_core.errors import InvalidError
from opd_core.models.adapters import use_adapter
from opd_core.models.pipeline import Model
from opd_core.teachers.contract import MAX_ROWS, NOT_FINITE, UNKNOWN_KEY


class UnknownKeyError(InvalidError):
    """A key that was never registered here, or has been forgotten since."""


class NonFiniteError(InvalidError):
    """NaN or infinity where there must be none."""


class ConditioningCache:
    """Prompt embeddings by key; the least recently used leave when `capacity` bytes are full."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.nbytes = 0
        self._entries: OrderedDict[bytes, Conditioning] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, key: bytes, conditioning: Conditioning) -> None:
        if key in self._entries:
            self._entries.move_to_end(key)
            return
        if conditioning.nbytes > self.capacity:
            raise InvalidError(f"one prompt embedding has {conditioning.nbytes} bytes, the cache holds {self.capacity}")
        self._entries[key] = conditioning
        self.nbytes += conditioning.nbytes
        while self.nbytes > self.capacity:
            _, evicted = self._entries.popitem(last=False)
            self.nbytes -= evicted.nbytes

    def get(self, keys: Sequence[bytes]) -> list[Conditioning]:
        missing = {key for key in keys if key not in self._entries}
        if missing:
            names = ", ".join(key.hex() for key in sorted(missing)[:3])
            raise UnknownKeyError(
                f"{UNKNOWN_KEY}: {len(missing)} of {len(set(keys))} keys, e.g. {names}; register them"
            )
        for key in keys:
            self._entries.move_to_end(key)
        return [self._entries[key] for key in keys]


@dataclass(frozen=True, eq=False)
class Query:
    """B rows. `teachers`: [B] int64 numbers; `latents`: [B, C, H, W]; `sigmas`, `guidance`: [B] float32 on the CPU."""

    teachers: Tensor
    latents: Tensor
    sigmas: Tensor
    guidance: Tensor
    conditioning: Sequence[Conditioning]
    negative: Sequence[Conditioning]

    def check(self, teachers: Sequence[str]) -> None:
        """Refuse what would spoil a whole batch.

        Raises:
            InvalidError: a teacher, sigma or guidance outside its range. NonFiniteError: NaN in the states.
        """
        unknown = (self.teachers < 0) | (self.teachers >= len(teachers))
        if unknown.any():
            raise InvalidError(
                f"no teacher has number {int(self.teachers[unknown][0])}; here are {', '.join(teachers)}"
            )
        if not ((self.sigmas > 0) & (self.sigmas <= 1)).all():
            raise InvalidError(f"sigma must be above 0 and at most 1; got {self.sigmas.tolist()}")
        if not torch.isfinite(self.guidance).all():
            raise InvalidError(f"guidance must be finite; got {self.guidance.tolist()}")
        lengths = {tuple(c.embeds.shape) for c in (*self.conditioning, *self.negative)}
        if len(lengths) > 1:
            raise InvalidError(f"prompts of one request must have one length; got embeddings {sorted(lengths)}")
        if not torch.isfinite(self.latents).all():
            raise NonFiniteError("latents hold NaN or infinite numbers")


@torch.no_grad()
def answer(model: Model, teachers: Sequence[str], query: Query) -> Tensor:
    """Velocities [B, C, H, W], float32, of every row by its own teacher.

    Args:
        teachers: names of the adapters loaded into `model`, by number.

    Raises:
        NonFiniteError: a teacher's own answer is not finite.
    """
    velocities = torch.empty(query.latents.shape, dtype=torch.float32, device=model.device)
    for number, name in enumerate(teachers):
        rows = torch.nonzero(query.teachers == number).flatten()
        if len(rows) == 0:
            continue
        use_adapter(model.transformer, name)
        for chunk in torch.split(rows, MAX_ROWS):
            velocities[chunk.to(model.device)] = _forward(model, query, chunk)
    if not torch.isfinite(velocities).all():
        bad = query.teachers[~torch.isfinite(velocities).flatten(1).all(1).cpu()]
        names = ", ".join(teachers[int(number)] for number in torch.unique(bad))
        raise NonFiniteError(f"teacher {names} {NOT_FINITE}; check its adapter and the precision")
    return velocities


def _forward(model: Model, query: Query, rows: Tensor) -> Tensor:
    count = len(rows)
    if model.device.type == "cuda":
        # Kernels are chosen by batch size; few fixed sizes keep a row's answer the same in every batch.
        rows = torch.cat([rows, rows[-1:].expand(_bucket(count) - count)])
    embeds, pooled = stack([query.conditioning[i] for i in rows], model.device, model.dtype)
    negative_embeds, negative_pooled = stack([query.negative[i] for i in rows], model.device, model.dtype)
    return guided_velocity(
        model.forward,
        query.latents[rows.to(query.latents.device)].to(model.device),
        query.sigmas[rows].to(model.device),
        embeds,
        pooled,
        negative_embeds,
        negative_pooled,
        query.guidance[rows],
    )[:count]


def _bucket(rows: int) -> int:
    return 1 << (rows - 1).bit_length()
