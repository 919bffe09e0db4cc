"""The moving average of the trained weights: what is evaluated and served."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from opd_trainer.engine import copy_all


class Ema:
    """Averages float32 parameters over rounds, on their device."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self._parameters = list(parameters)
        self._decay = decay
        self.tensors: list[Tensor] = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, round_: int) -> None:
        """After the round with index `round_`. Early rounds forget faster, as in Flow-GRPO."""
        decay = min(self._decay, (1 + round_) / (10 + round_))
        torch._foreach_lerp_(self.tensors, [p.detach() for p in self._parameters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Compute with the averages; the trained weights come back to the bit.

        Numbers are copied, not tensors exchanged: under ZeRO the parameters are views of DeepSpeed's own buffers.
        """
        trained = [parameter.detach().clone() for parameter in self._parameters]
        try:
            copy_all(self.tensors, self._parameters)
            yield
        finally:
            copy_all(trained, self._parameters)

    def load(self, tensors: Sequence[Tensor]) -> None:
        """Raises ValueError: they are of other parameters."""
        copy_all(tensors, self.tensors)
