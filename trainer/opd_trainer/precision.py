"""The arithmetic of the student's forward and backward pass: a base in `precision`, an adapter in float32."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from opd_core.api.types import Precision
from opd_core.precision import TORCH_DTYPES
from torch import Tensor, nn

_MOST_HALVINGS = 14


def arithmetic(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Multiply in `precision`. The adapter's float32 weights are cast on the way, once per context."""
    if precision == Precision.FP32:
        return nullcontext()
    return torch.autocast(device.type, TORCH_DTYPES[precision])


class GradientScale:
    """Keeps float16 gradients inside float16's range; nothing to tune.

    The gradient of a mean over 65,536 elements lies below the smallest float16 number. So every backward pass is
    multiplied, where it enters the network, by the power of two that brings its largest element to about one, and
    divided by it in float32 where it reaches a parameter; both are exact. What happens inside may still grow beyond
    float16's 65,504: such a round makes no step, and `halve` leaves more room for those that follow.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.halvings = 0
        self._scale = torch.ones(())
        for parameter in parameters:
            parameter.register_hook(lambda gradient: gradient / self._scale)  # type: ignore[no-untyped-call]

    def attach(self, velocity: Tensor) -> None:
        """Call with every output of the network whose gradient will flow back; one pass runs back at a time."""
        velocity.register_hook(self._scaled)  # type: ignore[no-untyped-call]

    def halve(self) -> None:
        """Until the largest element, one at first, is at float16's smallest normal number."""
        self.halvings = min(self.halvings + 1, _MOST_HALVINGS)

    def _scaled(self, gradient: Tensor) -> Tensor:
        largest = gradient.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        self._scale = torch.exp2(-torch.log2(largest).ceil() - self.halvings).clamp_max(2.0**100)
        return gradient * self._scale
