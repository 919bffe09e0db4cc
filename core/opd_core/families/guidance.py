"""What guidance means to a family, and what its pipeline in diffusers makes of the number."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opd_core.scales import Scales

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """How the scales of a row enter its velocity. One of them, g, weighs two branches.

    Args:
        off: a g up to this makes no second forward pass, with the negative prompt; None: no g does.
        combine: (conditional, unconditional [B, *latent], g [B, 1, ...] of as many dimensions, all float32) -> the
            guided velocity.
        embedded: `Scales.guidance` is an input of the network, where 1 is a value like others.
        true_cfg: g is `Scales.true_cfg`, and not `Scales.guidance`.
    """

    off: float | None = None
    combine: "Callable[[Tensor, Tensor, Tensor], Tensor] | None" = None
    embedded: bool = False
    true_cfg: bool = False

    @property
    def column(self) -> int:
        """Of g among the scales."""
        return 1 if self.true_cfg else 0

    @property
    def field(self) -> str:
        """What g is called in a spec."""
        return "trueCfgScale" if self.true_cfg else "guidanceScale"

    def guides(self, scales: Sequence[float]) -> bool:
        """Whether a row with these scales needs its negative prompt."""
        return self.off is not None and scales[self.column] > self.off

    def without(self, scales: Scales) -> Scales:
        """The same with g off: no second pass. A scale that is the network's own input, or has no effect, stays."""
        if self.off is None:
            return scales
        return scales._replace(true_cfg=self.off) if self.true_cfg else scales._replace(guidance=self.off)

    @property
    def effective(self) -> bool:
        """Whether `Scales.guidance` has any effect."""
        return self.embedded or (self.off is not None and not self.true_cfg)


def classifier_free(conditional: "Tensor", unconditional: "Tensor", scale: "Tensor") -> "Tensor":
    """v_u + g (v_c - v_u): https://arxiv.org/abs/2207.12598 as diffusers counts, where 1 is off."""
    return unconditional + scale * (conditional - unconditional)


NONE = Guidance()  # of models that were distilled with guidance inside
CLASSIFIER_FREE = Guidance(off=1.0, combine=classifier_free)
TRUE_CFG = Guidance(off=1.0, combine=classifier_free, true_cfg=True)
EMBEDDED = Guidance(off=1.0, combine=classifier_free, embedded=True, true_cfg=True)
