"""The moving average of the trained weights: what is evaluated and served."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


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
            _copy(self.tensors, self._parameters)
            yield
        finally:
            _copy(trained, self._parameters)

    @torch.no_grad()
    def load(self, tensors: Sequence[Tensor]) -> None:
        for ours, theirs in zip(self.tensors, tensors, strict=True):
            ours.copy_(theirs)


@torch.no_grad()
def _copy(values: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
