"""What a family tells of itself. No PyTorch at the top of this file or of a family's: a model's files are looked at
before anything is loaded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opd_core.errors import InvalidError
from opd_core.families.guidance import Guidance

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from opd_core.diffusion.schedule import Schedule


# Configurations by component, and "model_index": of transformer, vae and scheduler always, of others where they exist.
Configs = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class TextWindow:
    """How much of a prompt some of the text encoders see.

    Args:
        encoder: its name in words.
        tokenizers: components with its tokenizer, the first of those that are there counts.
        own_limit: it reads what its tokenizer says, else spec.model.maxSequenceLength.
        template: tokens around every prompt, which count.
    """

    encoder: str
    tokenizers: tuple[str, ...]
    own_limit: bool = False
    template: int = 0


@dataclass(frozen=True)
class Native:
    """What a bare model is sampled with where nobody says otherwise: its pipeline's own defaults in diffusers."""

    side: int  # pixels
    steps: int
    guidance_scale: float
    max_sequence_length: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Outline:
    """What a model's files say about it: how it turns pixels into latents, and what it is told.

    Args:
        latent_channels: C of latents [C, h, w].
        latent_scale: image pixels per latent pixel, along one side.
        patch_size: latent pixels per token of the network, along one side.
        conditioning: shape of each of a prompt's tensors by name, `contract.FREE` where prompts differ. `mask`, where
            there is one, is bool; all others have the model's dtype.
        distilled_steps: solver steps that the model was distilled to; None: it answers at every noise level.
    """

    family: "Family"
    guidance: Guidance
    scheduler_config: Mapping[str, Any]
    latent_channels: int
    latent_scale: int
    patch_size: int
    conditioning: Mapping[str, tuple[int, ...]]
    native: Native
    distilled_steps: int | None = None
    max_side: int = 1 << 16  # in pixels

    @property
    def size_multiple(self) -> int:
        """Width and height of an image must be multiples of this many pixels."""
        return self.latent_scale * self.patch_size

    def takes(self, side: int) -> bool:
        """Whether an image may have a side of so many pixels."""
        return 0 < side <= self.max_side and side % self.size_multiple == 0

    @property
    def sides(self) -> str:
        """Which sides it takes, in words."""
        return f"a multiple of {self.size_multiple} up to {self.max_side}"

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image.

        Raises:
            InvalidError: a side that the model cannot produce.
        """
        for name, side in (("width", width), ("height", height)):
            if not self.takes(side):
                raise InvalidError(f"{name} is {side}; this model needs {self.sides}")
        return self.latent_channels, height // self.latent_scale, width // self.latent_scale

    def schedule(self, steps: int, width: int, height: int) -> "Schedule":
        """The noise levels of a sampler of `steps` steps.

        Raises:
            InvalidError: fewer than one step, or a scheduler of another kind.
        """
        return self.family.schedule(self.scheduler_config, steps, (width * height) // self.size_multiple**2)


@dataclass(frozen=True, eq=False, kw_only=True)
class Family:
    """One family of models, in plain functions; `transformer`, `vae` and `pipeline` are objects of diffusers.

    Args:
        pipeline: the class of diffusers that a model's model_index.json names.
        outline: what a model's configurations say. A KeyError is about a configuration that lacks something.
        encode: (pipeline, a prompt, its longest length in tokens, device) -> named tensors without a batch dimension,
            as `Outline.conditioning` says. A family pads here, to lengths that follow from the prompt alone: rows of
            equal shapes are computed together, so that no answer depends on its company.
        velocity: (transformer, latents [B, C, h, w], sigmas [B] float32, conditioning by name [B, ...], guidance [B]
            float32) -> v = e - x0, [B, C, h, w]. Packing, position ids, the scale of time and the sign are its own.
        decode: (vae, latents [B, C, h, w] float32) -> images [B, 3, H, W] in -1..1.
        schedule: (scheduler's configuration, steps, tokens of an image) -> noise levels as the pipeline takes them.
        targets: linear layers that a LoRA changes where nobody says otherwise, by the ends of their names.
        windows: how much of a prompt the text encoders see.
        encode_negative: of a negative prompt, where the pipeline encodes it in another way.
        convert_lora: a LoRA's tensors by key with the authors' own names of layers -> by diffusers' key, where the
            pipeline's `lora_state_dict` does not know them.
    """

    pipeline: str
    outline: Callable[[Configs], Outline]
    encode: "Callable[[Any, str, int, torch.device], Mapping[str, Tensor]]"
    velocity: "Callable[[Any, Tensor, Tensor, Mapping[str, Tensor], Tensor], Tensor]"
    decode: "Callable[[Any, Tensor], Tensor]"
    schedule: "Callable[[Mapping[str, Any], int, int], Schedule]"
    targets: Sequence[str]
    windows: Sequence[TextWindow] = ()
    encode_negative: "Callable[[Any, str, int, torch.device], Mapping[str, Tensor]] | None" = None
    convert_lora: "Callable[[dict[str, Tensor]], dict[str, Tensor]] | None" = None
