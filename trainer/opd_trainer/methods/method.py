"""What every method is: a way to get from a round's prompts to losses. Loop, optimiser, averages, checkpoints, metrics
and log are the same around all of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from opd_core.teachers.client import ClientStats
from torch import Tensor

from opd_trainer.engine import Engine
from opd_trainer.run import Run


class Term(NamedTuple):
    """B images at a solver step each.

    Args:
        tasks: [B], by index. steps: [B], by index, or one for all of them.
        weights: [B], what the sum of all losses of an update counts them with. loss: [B], with its graph.
        error: [B], (v_S - v)^2 with v what the student is compared with, mean over elements.
    """

    tasks: Tensor
    steps: Tensor
    weights: Tensor
    loss: Tensor
    error: Tensor


@dataclass(frozen=True)
class Update:
    """What one optimiser step is made of: so many terms, each needed no longer than until the next is asked for."""

    terms: Iterator[Term]
    count: int


class Method(Protocol):
    @property
    def updates_per_round(self) -> int: ...

    @property
    def state(self) -> Mapping[str, Sequence[Tensor]]:
        """Tensors of its own that a checkpoint has to hold, by name; a resumed run copies its numbers into them."""
        ...

    @property
    def engines(self) -> Mapping[str, Engine]:
        """What is trained beside the student, by the name of its role."""
        ...

    @property
    def stats(self) -> ClientStats:
        """Of the requests to teachers."""
        ...

    def trained(self, run: Run, round_: int) -> Sequence[float]:
        """[N]: the share of this round's images that each solver step trains."""
        ...

    def tasks(self, run: Run, round_: int) -> Sequence[int]:
        """Those that this round trains, by index; it has `images_per_task` images of each."""
        ...

    def updates(self, run: Run, round_: int) -> Iterator[Update]:
        """The optimiser steps of a round; each is made before the next is asked for."""
        ...

    def figures(self, run: Run) -> dict[str, float]:
        """What else is known about the round that was played last, equal on all ranks."""
        ...

    def close(self) -> None: ...
