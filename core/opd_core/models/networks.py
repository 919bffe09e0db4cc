"""Two networks that take turns by noise level: one module with one adapter, and rows of a batch asked of their own."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from opd_core.diffusion.guidance import Forward
from opd_core.families.family import Outline
from opd_core.imports import without_collection

with without_collection():
    from diffusers.loaders.peft import PeftAdapterMixin
    from diffusers.models.modeling_utils import ModelMixin
    from peft.tuners.lora import LoraLayer


class Networks(PeftAdapterMixin, nn.Module):  # type: ignore[misc]
    """Holds both, under the names of `pairs`; a forward pass is one of its children's."""

    def __init__(self, high: ModelMixin, low: ModelMixin) -> None:
        super().__init__()
        self.transformer = high
        self.transformer_2 = low

    def enable_gradient_checkpointing(self) -> None:
        for network in self.children():
            network.enable_gradient_checkpointing()  # type: ignore[operator]

    def disable_gradient_checkpointing(self) -> None:
        for network in self.children():
            network.disable_gradient_checkpointing()  # type: ignore[operator]

    def attached(self, answer: Tensor) -> Tensor:
        """`answer`, whose gradient with respect to the adapter in use is zero where a network had no part in it, and
        not missing: ranks whose rows went through other networks average the same list of gradients."""
        sums = [parameter.sum() for parameter in self._trained()]
        return answer + 0 * torch.stack(sums).sum() if sums else answer

    def _trained(self) -> Iterator[nn.Parameter]:
        """Of the adapter in use; another one may be another optimiser's."""
        for layer in self.modules():
            if isinstance(layer, LoraLayer) and not layer.disable_adapters:
                for name in layer.active_adapters:
                    for part in (layer.lora_A, layer.lora_B):
                        if name in part and part[name].weight.requires_grad:
                            yield part[name].weight


def by_network(outline: Outline, forward: Forward) -> Forward:
    """`forward`, called once for the rows of each network: what it is given, it can ask of one."""
    if outline.boundary is None:
        return forward

    def run(latents: Tensor, sigmas: Tensor, prompts: Mapping[str, Tensor], guidance: Tensor) -> Tensor:
        high = outline.high_noise(sigmas)
        if int(high.sum()) in (0, len(high)):
            return forward(latents, sigmas, prompts, guidance)
        of_networks = [torch.nonzero(mine).squeeze(1) for mine in (high, ~high)]
        answers = [
            forward(latents[rows], sigmas[rows], {name: each[rows] for name, each in prompts.items()}, guidance[rows])
            for rows in of_networks
        ]
        return torch.cat(answers)[torch.argsort(torch.cat(of_networks))]

    return run
