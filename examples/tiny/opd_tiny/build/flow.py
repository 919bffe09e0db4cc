"""Flow matching on latents, and sampling with guidance: what base and teachers share, whatever the family."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from opd_core.models.pipeline import Model
from opd_core.scales import Scales
from torch import Tensor
from torch.nn import functional

from .world import IMAGE_SIZE

GUIDANCE, SAMPLING_STEPS = 4.5, 10
_TRAINING_SHIFT = 2.0
_CAPTION_DROPOUT = 0.1


class Captions:
    """What a model is told by a caption list, each distinct prompt encoded once; row 0 is the empty prompt."""

    def __init__(self, model: Model, prompts: Sequence[str], tokens: int) -> None:
        distinct = list(dict.fromkeys(["", *prompts]))
        row = {prompt: i for i, prompt in enumerate(distinct)}
        self.rows = torch.tensor([row[p] for p in prompts])
        encoded = [each.tensors for each in model.encode(distinct, tokens)]
        self._told = {name: torch.stack([each[name] for each in encoded]) for name in encoded[0]}

    def of(self, picked: Tensor) -> dict[str, Tensor]:
        """Tensors ``[N, ...]`` by name, of the captions at the positions ``picked``."""
        return self._at(self.rows[picked])

    def of_with_dropout(self, picked: Tensor) -> dict[str, Tensor]:
        """As :meth:`of`, with a tenth of the captions emptied at random, which teaches the unconditional velocity."""
        rows = self.rows[picked]
        return self._at(torch.where(torch.rand(len(rows)) < _CAPTION_DROPOUT, 0, rows))

    def _at(self, rows: Tensor) -> dict[str, Tensor]:
        return {name: tensor[rows] for name, tensor in self._told.items()}


def flow_matching_loss(model: Model, latents: Tensor, told: Mapping[str, Tensor]) -> Tensor:
    """Mean squared error of the velocity at x = (1 - s) latents + s noise, with s drawn towards the noisy end."""
    uniform = torch.rand(len(latents))
    sigma = _TRAINING_SHIFT * uniform / (1 + (_TRAINING_SHIFT - 1) * uniform)
    noise = torch.randn_like(latents)
    state = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1))
    return functional.mse_loss(model.forward(state, sigma, told, torch.ones(len(latents))), noise - latents)


@torch.no_grad()
def sample(model: Model, prompts: Sequence[str], tokens: int, seed: int) -> Tensor:
    """Pictures in 0..1 by :data:`SAMPLING_STEPS` Euler steps at guidance :data:`GUIDANCE`."""
    sigmas = model.schedule(SAMPLING_STEPS, IMAGE_SIZE, IMAGE_SIZE).sigmas
    shape = model.latent_shape(IMAGE_SIZE, IMAGE_SIZE)
    generator = torch.Generator().manual_seed(seed)
    empty = model.encode([""], tokens, negative=True)
    pictures = []
    for first in range(0, len(prompts), 64):
        batch = model.encode(prompts[first : first + 64], tokens)
        told = model.prompts(batch, empty * len(batch), [Scales(GUIDANCE)] * len(batch))
        state = torch.randn(len(batch), *shape, generator=generator)
        for sigma, after in pairwise(sigmas):
            state = state + (after - sigma) * model.velocity(state, sigma, told)
        pictures.append(model.decode(state))
    return torch.cat(pictures)
