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

    width: int  # pixels
    height: int
    steps: int
    guidance_scale: float
    max_sequence_length: int
    frames: int = 1


@dataclass(frozen=True, eq=False, kw_only=True)
class Outline:
    """What a model's files say about it: how it turns pixels into latents, and what it is told.

    Args:
        latent_channels: C of latents [C, h, w], or of a video's [C, t, h, w].
        latent_scale: image pixels per latent pixel, along one side.
        patch_size: latent pixels per token of the network, along one side.
        conditioning: shape of each of a prompt's tensors by name, `contract.FREE` where prompts differ. `mask`, where
            there is one, is bool; all others have the model's dtype.
        distilled_steps: solver steps that the model was distilled to; None: it answers at every noise level.
        frame_scale: frames of a video per frame of its latents, but for the first, which has one of its own; None: the
            model makes images only.
        frames_per_second: of the videos that the model was trained on.
        boundary: sigma from which on the component `transformer` answers, and below which `transformer_2` does; None:
            one network answers at every noise level.
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
    frame_scale: int | None = None
    frames_per_second: int = 1
    boundary: float | None = None

    def high_noise(self, sigmas: "Tensor") -> "Tensor":
        """Whether `transformer` answers, [B] bool, at sigmas [B]; compared as diffusers does, as times up to 1000."""
        return sigmas * 1000 >= (-1 if self.boundary is None else self.boundary * 1000)

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

    def takes_frames(self, frames: int) -> bool:
        """Whether it makes videos of so many frames; one is an image."""
        return frames == 1 if self.frame_scale is None else frames % self.frame_scale == 1 % self.frame_scale

    @property
    def frame_counts(self) -> str:
        """How many frames it makes, in words."""
        if self.frame_scale is None:
            return "1, for it makes images only"
        return f"1 more than a multiple of {self.frame_scale}, as {5 * self.frame_scale + 1}, or 1 for an image"

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        """(C, h, w) of the latents of an image; (C, t, h, w) where the model makes videos, of any number of frames.

        Raises:
            InvalidError: a side or a number of frames that the model cannot produce.
        """
        for name, side in (("width", width), ("height", height)):
            if not self.takes(side):
                raise InvalidError(f"{name} is {side}; this model needs {self.sides}")
        if not self.takes_frames(frames):
            raise InvalidError(f"frames is {frames}; this model needs {self.frame_counts}")
        time = () if self.frame_scale is None else ((frames - 1) // self.frame_scale + 1,)
        return self.latent_channels, *time, height // self.latent_scale, width // self.latent_scale

    @property
    def latent_rank(self) -> int:
        """Dimensions of the latents of one image or video."""
        return 3 if self.frame_scale is None else 4

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
        velocity: (transformer, the one that answers at these noise levels; latents [B, *latent] as
            `Outline.latent_shape` says, sigmas [B] float32, conditioning by name [B, ...], guidance [B] float32)
            -> v = e - x0, [B, *latent]. Packing, position ids, the scale of time and the sign are its own.
        decode: (vae, latents [B, *latent] float32) -> images [B, 3, H, W], or of videos their frames [B, F, 3, H, W],
            in -1..1.
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
