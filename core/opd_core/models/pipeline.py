"""One text-to-image model, as all roles use it: prompts in, velocities, images out."""

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_core.conditioning import Conditioning
from opd_core.diffusion.schedule import TIMESTEPS, Schedule, schedule_from_config
from opd_core.errors import InvalidError
from opd_core.imports import without_collection
from opd_core.models.outline import Outline, components, family_of, read_outline

with without_collection():
    import diffusers
    import transformers

ALL_PARTS = frozenset({"text", "transformer", "vae"})
_COMPONENTS = {
    "text": ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"),
    "transformer": ("transformer",),
    "vae": ("vae",),
}


@dataclass(frozen=True, eq=False, kw_only=True)
class Model(Outline):
    """A frozen Stable Diffusion 3 family model; `pipeline` holds only the parts that were asked for."""

    pipeline: Any
    device: torch.device
    dtype: torch.dtype

    @property
    def transformer(self) -> Any:
        return self.pipeline.transformer

    def schedule(self, steps: int, width: int, height: int) -> Schedule:
        return schedule_from_config(self.scheduler_config, steps, (width * height) // self.size_multiple**2)

    def forward(self, latents: Tensor, sigmas: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
        """Velocity [B, C, h, w] in the model's dtype, without guidance."""
        velocity: Tensor = self.transformer(
            hidden_states=latents.to(self.dtype),
            timestep=sigmas * TIMESTEPS,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        return velocity

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], max_sequence_length: int) -> list[Conditioning]:
        """Conditionings of `prompts`, on the CPU in the model's dtype. "" is the unconditional branch of guidance.

        One prompt at a time: the last bits of a batched encoding depend on who else is in the batch, and with them the
        conditioning's key and every result that a resumed run has to repeat.
        """
        encoded = []
        for prompt in prompts:
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                prompt=[prompt],
                prompt_2=None,
                prompt_3=None,
                do_classifier_free_guidance=False,
                max_sequence_length=max_sequence_length,
                device=self.device,
            )
            encoded.append(Conditioning(embeds[0].cpu(), pooled[0].cpu()))
        return encoded

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W], float32 in 0..1, of latents [B, C, h, w]."""
        vae = self.pipeline.vae
        unscaled = latents.to(self.device, vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        images: Tensor = vae.decode(unscaled, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)


def load_model(
    path: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    parts: Collection[str] = ALL_PARTS,
) -> Model:
    """Load the `parts` ("text", "transformer", "vae") of a model in diffusers' folder format, frozen, in eval mode.

    The VAE is always float32: its half-precision output is visibly worse and it runs once per image.

    Raises:
        InvalidError: the folder is not a model that this project can train or serve.
    """
    family = family_of(path)
    components(path)  # refuses what could be loaded in the place of the weights
    device = torch.device(device)
    absent = {name: None for part in ALL_PARTS - set(parts) for name in _COMPONENTS[part]}
    try:
        with _quiet():
            pipeline = getattr(diffusers, family).from_pretrained(
                str(path),
                torch_dtype={"default": dtype, "vae": torch.float32},
                local_files_only=True,
                use_safetensors=True,
                **absent,
            )
    except (OSError, ValueError) as error:
        raise InvalidError(f"{path} cannot be loaded as {family}: {error}") from error
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.to(device).requires_grad_(False).eval()
    return Model(pipeline=pipeline, device=device, dtype=dtype, **vars(read_outline(path)))


@contextmanager
def _quiet() -> Iterator[None]:
    """Loading bars of two libraries, and diffusers' renaming of `torch_dtype`, say nothing in the log of a server."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    shown = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch_dtype")
            yield
    finally:
        for library, enabled in zip(libraries, shown, strict=True):
            if enabled:
                library.enable_progress_bar()
