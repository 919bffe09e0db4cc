"""What answers a query: one copy of a model, its adapters, a cache of prompt embeddings. The same code in Triton and
inside the trainer."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_core.conditioning import Conditioning, Likeness, likeness
from opd_core.device import is_out_of_memory
from opd_core.errors import InvalidError, OutOfMemoryError
from opd_core.models.adapter_pool import AdapterPool
from opd_core.models.pipeline import Model
from opd_core.scales import Scales
from opd_core.teachers.contract import BASE, MAX_ROWS, NOT_FINITE, UNKNOWN_KEY

_SMALLEST = 8  # rows of the smallest batch on a GPU


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
            names = ", ".join(key.hex() for key in sorted(missing))
            raise UnknownKeyError(f"{UNKNOWN_KEY}: {len(missing)} of {len(set(keys))} keys; register them: {names}")
        for key in keys:
            self._entries.move_to_end(key)
        return [self._entries[key] for key in keys]


@dataclass(frozen=True, eq=False)
class Query:
    """B rows. `teachers`: [B] int64 numbers, or BASE; `latents`: [B, *latent]; `sigmas`: [B] and `scales`: [B, 2], as
    `Scales`, float32 on the CPU. What they are told may differ in shape from row to row. `branches`: both branches of
    guidance are asked for."""

    teachers: Tensor
    latents: Tensor
    sigmas: Tensor
    scales: Tensor
    conditioning: Sequence[Conditioning]
    negative: Sequence[Conditioning]
    branches: bool = False

    def check(self, teachers: Sequence[str]) -> None:
        """Refuse what would spoil a whole batch.

        Raises:
            InvalidError: a teacher, sigma or guidance outside its range. NonFiniteError: NaN in the states.
        """
        unknown = (self.teachers < BASE) | (self.teachers >= len(teachers))
        if unknown.any():
            raise InvalidError(
                f"no teacher has number {int(self.teachers[unknown][0])}; here are {', '.join(teachers)}"
            )
        if not ((self.sigmas > 0) & (self.sigmas <= 1)).all():
            raise InvalidError(f"sigma must be above 0 and at most 1; got {self.sigmas.tolist()}")
        if not torch.isfinite(self.scales).all():
            raise InvalidError(f"guidance must be finite; got {self.scales.tolist()}")
        if not torch.isfinite(self.latents).all():
            raise NonFiniteError("latents hold NaN or infinite numbers")


class Engine:
    """A base with its teachers' adapters, or a teacher's own model, which answers queries.

    Args:
        teachers: by number.
        adapters: theirs, on `model`. None: `model` itself is each of them, and no base is here.
    """

    def __init__(self, model: Model, teachers: Sequence[str], adapters: AdapterPool | None = None) -> None:
        self.model = model
        self.teachers = tuple(teachers)
        self.adapters = adapters
        self._fitting: dict[torch.Size, int] = {}  # rows of a forward pass that are known to fit, by latent's shape

    @torch.no_grad()
    def answer(self, query: Query) -> Tensor:
        """Velocities [B, *latent], or both branches [B, 2, *latent], float32, of every row by its own teacher or the
        base.

        Raises:
            InvalidError: the base is asked for where there is none, both branches of a row without guidance, or a LoRA
            that cannot be loaded. NonFiniteError: a teacher's own answer is not finite. OutOfMemoryError: there is no
            room for a single row.
        """
        if self.adapters is None and (query.teachers == BASE).any():
            raise InvalidError(f"no base answers here: {', '.join(self.teachers)} has a model of its own")
        count, *latent = query.latents.shape
        shape = (count, 2, *latent) if query.branches else (count, *latent)
        velocities = torch.empty(shape, dtype=torch.float32, device=self.model.device)
        for rows in self._alike(query):
            velocities[rows.to(self.model.device)] = self._in_parts(query, rows)
        if not torch.isfinite(velocities).all():
            bad = query.teachers[~torch.isfinite(velocities).flatten(1).all(1).cpu()]
            names = ("the base" if n == BASE else f"teacher {self.teachers[n]}" for n in torch.unique(bad).tolist())
            raise NonFiniteError(f"{', '.join(names)} {NOT_FINITE}; check its weights and the precision")
        return velocities

    def _alike(self, query: Query) -> Iterator[Tensor]:
        """Rows that a forward pass can take together, whoever their teachers are."""
        rows: dict[tuple[bool, Likeness], list[int]] = {}
        told = zip(query.conditioning, query.negative, query.scales.tolist(), strict=True)
        for i, (high, row) in enumerate(zip(self.model.high_noise(query.sigmas).tolist(), told, strict=True)):
            rows.setdefault((high, likeness(self.model.guidance, *row)), []).append(i)
        for _, alike in sorted(rows.items()):
            whole = torch.tensor(alike)
            if self.adapters is None:
                yield whole
            else:
                for part in self.adapters.parts(self._names(query, whole)):
                    yield whole[part]

    def _names(self, query: Query, rows: Tensor) -> list[str | None]:
        return [None if number == BASE else self.teachers[number] for number in query.teachers[rows].tolist()]

    def _in_parts(self, query: Query, rows: Tensor) -> Tensor:
        """As many rows at once as fit. What did not fit once is not tried again."""
        shape = query.latents.shape[1:]
        answers: list[Tensor] = []
        done = 0
        while done < len(rows):
            part = rows[done : done + self._fitting.get(shape, MAX_ROWS)]
            count = self._bucket(shape, len(part))
            try:
                answers.append(self._forward(query, part, count))
                done += len(part)
                continue
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            # Outside of the handler: the exception's traceback holds what the forward pass has allocated.
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()
            if count == 1:
                raise OutOfMemoryError(
                    f"no memory for one row of latents {list(shape)}; give the teacher server a GPU of its own, or "
                    "lower spec.training.resolution"
                )
            self._fitting[shape] = count // 2
        return torch.cat(answers)

    def _bucket(self, shape: torch.Size, rows: int) -> int:
        """Rows that are computed for so many: on a GPU 8, 16, 32 or 64, or fewer where more are known not to fit.

        Kernels of a GPU are chosen by the number of rows, and with them the last bits of an answer. A few fixed numbers
        keep a row's answer the same in most batches.
        """
        if self.model.device.type != "cuda":
            return rows
        return min(max(_SMALLEST, 1 << (rows - 1).bit_length()), self._fitting.get(shape, MAX_ROWS))

    def _forward(self, query: Query, rows: Tensor, bucket: int) -> Tensor:
        """The answer to `rows`, which a forward pass can take together, computed as `bucket` rows."""
        model, count = self.model, len(rows)
        rows = torch.cat([rows, rows[-1:].expand(bucket - count)])
        prompts = model.prompts(
            [query.conditioning[i] for i in rows],
            [query.negative[i] for i in rows],
            [Scales(*scales) for scales in query.scales[rows].tolist()],
        )
        latents = query.latents[rows.to(query.latents.device)].to(model.device)
        answer = model.branches if query.branches else model.velocity
        (group,) = prompts.groups
        with self.adapters.rows(self._names(query, rows) * group.passes) if self.adapters else nullcontext():
            return answer(latents, query.sigmas[rows], prompts)[:count]
