"""Flow matching on latents, and sampling with guidance: what base and teachers share."""

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from torch.nn import functional

from .models import LATENT_SHAPE
from .tokenizers import TOKENS

GUIDANCE, SAMPLING_STEPS = 4.5, 10
_TRAINING_SHIFT = 2.0
_CAPTION_DROPOUT = 0.1


class Captions:
    """Prompt embeddings of a caption list, each distinct prompt encoded once; row 0 is the empty prompt."""

    def __init__(self, pipeline: StableDiffusion3Pipeline, prompts: Sequence[str]) -> None:
        distinct = list(dict.fromkeys(["", *prompts]))
        row = {prompt: i for i, prompt in enumerate(distinct)}
        self.rows = torch.tensor([row[p] for p in prompts])
        encoded = [_encode(pipeline, distinct[i : i + 512]) for i in range(0, len(distinct), 512)]
        self._tokens, self._pooled = (torch.cat(parts) for parts in zip(*encoded, strict=True))

    def of(self, picked: Tensor) -> tuple[Tensor, Tensor]:
        """(``[N, 2 * TOKENS, 64]``, ``[N, 64]``) of the captions at the positions ``picked``."""
        return self._at(self.rows[picked])

    def of_with_dropout(self, picked: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`of`, with a tenth of the captions emptied at random, which teaches the unconditional velocity."""
        rows = self.rows[picked]
        return self._at(torch.where(torch.rand(len(rows)) < _CAPTION_DROPOUT, 0, rows))

    def empty(self, count: int) -> tuple[Tensor, Tensor]:
        """``count`` times the empty prompt."""
        return self._at(torch.zeros(count, dtype=torch.long))

    def _at(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self._tokens[rows], self._pooled[rows]


@torch.no_grad()
def _encode(pipeline: StableDiffusion3Pipeline, prompts: list[str]) -> tuple[Tensor, Tensor]:
    tokens, _, pooled, _ = pipeline.encode_prompt(
        prompt=prompts, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False,
        max_sequence_length=TOKENS, device="cpu",
    )  # fmt: skip
    return tokens, pooled


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Pictures ``[N, 3, 32, 32]`` in -1..1 to latents ``[N, 16, 8, 8]``."""
    modes = torch.cat([vae.encode(batch).latent_dist.mode() for batch in pictures.split(500)])
    latents: Tensor = (modes - vae.config.shift_factor) * vae.config.scaling_factor
    return latents


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Latents to pictures in 0..1."""
    decoded: Tensor = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    return (decoded / 2 + 0.5).clamp(0, 1)


def flow_matching_loss(model: SD3Transformer2DModel, latents: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
    """Mean squared error of the velocity at x = (1 - s) latents + s noise, with s drawn towards the noisy end."""
    uniform = torch.rand(len(latents))
    sigma = _TRAINING_SHIFT * uniform / (1 + (_TRAINING_SHIFT - 1) * uniform)
    noise = torch.randn_like(latents)
    state = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1))
    return functional.mse_loss(_velocity(model, state, sigma * 1000, tokens, pooled), noise - latents)


@torch.no_grad()
def sample(pipeline: StableDiffusion3Pipeline, prompts: Sequence[str], seed: int) -> Tensor:
    """Pictures in 0..1 by :data:`SAMPLING_STEPS` Euler steps at guidance :data:`GUIDANCE`."""
    captions = Captions(pipeline, prompts)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(SAMPLING_STEPS)
    generator = torch.Generator().manual_seed(seed)
    pictures = []
    for picked in torch.arange(len(prompts)).split(64):
        state = torch.randn(len(picked), *LATENT_SHAPE, generator=generator)
        tokens, pooled = (
            torch.cat(pair) for pair in zip(captions.empty(len(picked)), captions.of(picked), strict=True)
        )
        for step, time in enumerate(scheduler.timesteps):
            doubled = torch.cat([state, state])
            without, with_prompt = _velocity(
                pipeline.transformer, doubled, time.expand(len(doubled)), tokens, pooled
            ).chunk(2)
            velocity = without + GUIDANCE * (with_prompt - without)
            state = state + (scheduler.sigmas[step + 1] - scheduler.sigmas[step]) * velocity
        pictures.append(decode_latents(pipeline.vae, state))
    return torch.cat(pictures)


def _velocity(model: SD3Transformer2DModel, state: Tensor, time: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
    out: Tensor = model(
        hidden_states=state, timestep=time, encoder_hidden_states=tokens, pooled_projections=pooled, return_dict=False
    )[0]
    return out
