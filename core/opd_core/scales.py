"""How strongly a row is guided: what spec, wire, network and endpoint pass on together."""

from typing import NamedTuple


class Scales(NamedTuple):
    """Of one row; of B rows they are a tensor [B, 2]. What they mean is the family's (`families.guidance`).

    Args:
        guidance: `guidance_scale` of the family's pipeline in diffusers.
        true_cfg: `true_cfg_scale` of a pipeline that has both, as FLUX.1's; elsewhere it is 1.
    """

    guidance: float
    true_cfg: float = 1.0

    @property
    def words(self) -> str:
        return f"guidance {self.guidance:g}" + (f", true CFG {self.true_cfg:g}" if self.true_cfg != 1 else "")
