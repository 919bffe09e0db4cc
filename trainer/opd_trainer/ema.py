"""The moving average of the trained weights: what is evaluated and served."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from opd_trainer.engine import copy_all


class Ema:
    """Averages float32 parameters over optimiser steps, on their device."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self._parameters = list(parameters)
        self._decay = decay
        self.tensors: list[Tensor] = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the optimiser step with index `step`. Early ones forget faster, as in Flow-GRPO."""
        decay = min(self._decay, (1 + step) / (10 + step))
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
