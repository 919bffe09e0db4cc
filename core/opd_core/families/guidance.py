"""What guidance means to a family, and what its pipeline in diffusers makes of the number."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """How a guidance scale g enters a velocity.

    Args:
        off: a g up to this makes no second forward pass, with the negative prompt; None: no g does.
        combine: (conditional, unconditional [B, *latent], g [B, 1, ...] of as many dimensions, all float32) -> the
            guided velocity.
        embedded: g is an input of the network. Then 1 is a value like others and does not turn it off.
    """

    off: float | None = None
    combine: "Callable[[Tensor, Tensor, Tensor], Tensor] | None" = None
    embedded: bool = False

    def guides(self, scale: float) -> bool:
        """Whether a row with this scale needs its negative prompt."""
        return self.off is not None and scale > self.off

    @property
    def effective(self) -> bool:
        """Whether the scale has any effect."""
        return self.embedded or self.off is not None


def classifier_free(conditional: "Tensor", unconditional: "Tensor", scale: "Tensor") -> "Tensor":
    """v_u + g (v_c - v_u): https://arxiv.org/abs/2207.12598 as diffusers counts, where 1 is off."""
    return unconditional + scale * (conditional - unconditional)


NONE = Guidance()  # of models that were distilled with guidance inside
CLASSIFIER_FREE = Guidance(off=1.0, combine=classifier_free)
EMBEDDED = Guidance(embedded=True)
