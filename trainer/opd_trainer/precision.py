"""The student's gradients in half precision."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_MOST_HALVINGS = 14


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
