"""What a tiny world of one family is made of; pictures, prompts, rewards and training are the same for all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor

IMAGE_SIZE = 32
"""Pixels of a side."""


@dataclass(frozen=True)
class World:
    """One family's model of 32x32 pictures, and how long it is trained.

    Args:
        name: of its stages.
        title: what the family is called.
        folder: what `base` and `teachers` are in, beside the specs.
        spec: of the distillation whose result is reported.
        tokens: of a prompt, at most, with the marks around it; `maxSequenceLength` in a spec.
        autoencoder: (the trained one, pictures [N, 3, 32, 32] in -1..1) -> the same as the family's class.
        assemble: (that autoencoder) -> the whole pipeline, its transformer untrained, its text encoders random.
        to_latents: (autoencoder, what it encodes pictures to [N, C, h, w]) -> latents as the transformer takes them.
        base_steps, teacher_steps: of training, the latter by task.
    """

    name: str
    title: str
    folder: str
    spec: str
    tokens: int
    autoencoder: Callable[[AutoencoderKL, Tensor], Any]
    assemble: Callable[[Any], DiffusionPipeline]
    to_latents: Callable[[Any, Tensor], Tensor]
    base_steps: int
    teacher_steps: dict[str, int]
