"""Many frozen LoRAs on one model: each row of a batch is computed with its own, and a bounded number is in memory.

The model's own layers are computed once for all rows. What a row's LoRA adds are two products with matrices that are
gathered for it from one pool a layer, as S-LoRA (arXiv 2311.03285) and Punica (2310.18547) do. PEFT's own way for mixed
batches, `adapter_names`, goes through the adapters one by one in every layer: arithmetic of the same size, but with 50
adapters 50 times as many kernels, and indices that wait for the device in each.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from opd_core.errors import InvalidError
from opd_core.models.adapter_file import AdapterFile
from opd_core.models.adapter_layers import fit
from opd_core.models.adapters import model_layers, read_adapter
from opd_core.models.fingerprint import adapter_fingerprint

_REMEDY = "put the file back as it was, or start teachers and trainer anew"


@dataclass
class PoolStats:
    """Counted since the pool was made."""

    loads: int = 0
    drops: int = 0


@dataclass(frozen=True, eq=False)
class _Layer:
    """The matrices of one layer's adapters, by rank: row i of `a` [rows, in] and of `b` [rows, out] belong together,
    and the last is zero. `rows` [places + 1, r] says which are whose; the last place is the base's. A smaller rank than
    r is filled up with zeros. `scales`: [places + 1, 1, 1] float32.
    """

    a: Tensor
    b: Tensor
    rows: Tensor
    scales: Tensor


class AdapterPool:
    """Frozen LoRAs of one transformer by name, in places of its device's memory.

    Where all of them fit into `room` bytes each has a place. Else there are as many places as the largest of them
    finds; what is asked for is loaded from its file, in the place of the least recently used. Files are read again
    rather than kept: the system's cache has them as long as there is memory, and gives it back when there is none.

    Args:
        fingerprints: by name, of what is to be loaded. Another one is refused.
        room: None: for all of them.

    Raises:
        InvalidError: an adapter does not fit the transformer.
    """

    def __init__(
        self,
        transformer: nn.Module,
        adapters: Mapping[str, AdapterFile],
        fingerprints: Mapping[str, str],
        room: int | None = None,
    ) -> None:
        linear = model_layers(transformer)
        self.stats = PoolStats()
        self._files = dict(adapters)  # with their own names of layers, of which fingerprints are
        self._adapters = {name: fit(adapter, linear) for name, adapter in adapters.items()}
        self._fingerprints = dict(fingerprints)
        ranks = {
            layer: [adapter.rank(layer) if layer in adapter.alphas else 0 for adapter in self._adapters.values()]
            for layer in linear
            if any(layer in adapter.alphas for adapter in self._adapters.values())
        }
        weights = {layer: transformer.get_parameter(f"{layer}.weight") for layer in ranks}
        self.places = len(adapters)
        if room is not None:
            row = {layer: sum(linear[layer]) * weights[layer].itemsize for layer in ranks}
            if sum(row[layer] * sum(of_all) for layer, of_all in ranks.items()) > room:
                largest = sum(row[layer] * max(of_all) for layer, of_all in ranks.items())
                self.places = max(1, min(len(adapters) - 1, room // largest))
        if self.places < len(adapters):
            ranks = {layer: [max(of_all)] * self.places for layer, of_all in ranks.items()}
        self._layers = {layer: _empty(weights[layer], of_places) for layer, of_places in ranks.items()}
        self._device = next(iter(weights.values())).device
        self._place: OrderedDict[str, int] = OrderedDict()  # the most recently used last
        self._free = list(range(self.places))[::-1]
        self._of_rows: Tensor | None = None
        self._lock = Lock()
        for name in list(self._adapters)[: self.places]:
            self._load(name)
        for layer, pool in self._layers.items():
            transformer.get_submodule(layer).register_forward_hook(partial(self._add, layer, pool))

    @property
    def nbytes(self) -> int:
        """Of the device's memory."""
        return sum(tensor.nbytes for pool in self._layers.values() for tensor in (pool.a, pool.b, pool.rows))

    @property
    def resident(self) -> list[str]:
        """Who is in memory, the least recently used first."""
        return list(self._place)

    def parts(self, names: Sequence[str | None]) -> Iterator[list[int]]:
        """Numbers of the rows of these adapters, or of none, in parts that have a place at the same time: all at once
        where that can be."""
        distinct = sorted({name for name in names if name is not None}, key=lambda name: name not in self._place)
        if len(distinct) <= self.places:
            yield list(range(len(names)))
            return
        for first in range(0, len(distinct), self.places):
            taken = {*distinct[first : first + self.places], *([None] if first == 0 else [])}
            yield [i for i, name in enumerate(names) if name in taken]

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Meanwhile the transformer's forward passes are of len(names) rows, each with its own adapter or with none.
        One at a time: others wait.

        Raises:
            InvalidError: the file of one of them has changed or vanished since the start.
        """
        with self._lock:
            wanted = dict.fromkeys(name for name in names if name is not None)
            assert len(wanted) <= self.places
            for name in wanted:
                if name in self._place:  # all that are here before any is dropped
                    self._place.move_to_end(name)
            for name in wanted:
                if name not in self._place:
                    self._load(name)
            of_rows = [self.places if name is None else self._place[name] for name in names]
            self._of_rows = torch.tensor(of_rows, device=self._device) if wanted else None
            try:
                yield
            finally:
                self._of_rows = None

    def _load(self, name: str) -> None:
        adapter = self._adapters[name]
        self._check(name)
        state = read_adapter(adapter)
        if not self._free:
            _, place = self._place.popitem(last=False)
            self._free.append(place)
            self.stats.drops += 1
        place = self._free.pop()
        for layer, pool in self._layers.items():
            rows = pool.rows[place]
            last = len(pool.a) - 1
            own = rows[rows != last]
            pool.a[own], pool.b[own], pool.scales[place] = 0, 0, 0.0
            if layer in adapter.alphas:
                own = own[: adapter.rank(layer)]
                pool.a[own] = state[f"{layer}.lora_A.weight"].to(pool.a)
                pool.b[own] = state[f"{layer}.lora_B.weight"].T.to(pool.b)
                pool.scales[place] = adapter.scale(layer)
        self._place[name] = place
        self.stats.loads += 1

    def _check(self, name: str) -> None:
        file = self._files[name]
        try:
            found = adapter_fingerprint(file)
        except (OSError, InvalidError) as error:
            raise InvalidError(f"teacher {name} cannot be loaded: {error}; {_REMEDY}") from error
        if found != self._fingerprints[name]:
            raise InvalidError(
                f"teacher {name} cannot be loaded: {file.file} has changed since the start, from "
                f"{self._fingerprints[name][:19]} to {found[:19]}; {_REMEDY}"
            )

    def _add(self, layer: str, pool: _Layer, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """What `layer` answers to [n, ..., in], or to the tokens of n rows one after the other [n t, in], with each
        row's own change. The order of roundings is PEFT's."""
        places = self._of_rows
        if places is None:
            return output
        (x,) = inputs
        count = len(places)
        if (x.ndim > 2 and len(x) != count) or (x.ndim == 2 and len(x) % count):
            raise InvalidError(f"{layer} computes {list(x.shape)} in a batch of {count} rows: whose is what?")
        which = pool.rows[places]  # [n, r]
        change = torch.bmm(x.reshape(count, -1, x.shape[-1]).to(pool.a.dtype), pool.a[which].transpose(1, 2))
        change = torch.bmm(change, pool.b[which])
        change = change.mul_(pool.scales[places]).to(output.dtype)
        return change.add_(output.reshape(change.shape)).reshape(output.shape)


def _empty(weight: Tensor, ranks: Sequence[int]) -> _Layer:
    """Of a layer with `weight` [out, in], for adapters of these ranks at most, by place."""
    (outputs, inputs), last = weight.shape, sum(ranks)
    rows = torch.full((len(ranks) + 1, max(ranks)), last)
    first = 0
    for place, rank in enumerate(ranks):
        rows[place, :rank] = torch.arange(first, first + rank)
        first += rank
    return _Layer(
        a=weight.new_zeros(last + 1, inputs),
        b=weight.new_zeros(last + 1, outputs),
        rows=rows.to(weight.device),
        scales=torch.zeros(len(ranks) + 1, 1, 1, device=weight.device),
    )


def adapter_room(device: torch.device) -> int | None:
    """Bytes for LoRAs on the device that holds their model already: half of what is free on a GPU, where prompts and
    forward passes need the rest. None, all, on a CPU, whose memory others share."""
    return int(torch.cuda.mem_get_info(device)[0]) // 2 if device.type == "cuda" else None
