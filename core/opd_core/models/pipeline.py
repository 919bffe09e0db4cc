"""One text-to-image or text-to-video model, as all roles use it: prompts in, velocities, images out."""

import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_core.conditioning import Conditioning, Prompts
from opd_core.diffusion.guidance import guidance_branches, guided_velocity
from opd_core.errors import InvalidError
from opd_core.families.family import Outline
from opd_core.imports import without_collection
from opd_core.models.networks import Networks, by_network
from opd_core.models.outline import PARTS, components, read_outline
from opd_core.precision import arithmetic
from opd_core.scales import Scales

with without_collection():
    import diffusers
    import transformers


@dataclass(frozen=True, eq=False, kw_only=True)
class Model(Outline):
    """A frozen model of any family; `pipeline` holds only the parts that were asked for."""

    pipeline: Any
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def transformer(self) -> Any:
        """What has linear layers and adapters: the network, or both of those that take turns as one module."""
        network = self.pipeline.transformer
        return network if self.boundary is None else Networks(network, self.pipeline.transformer_2)

    def forward(self, latents: Tensor, sigmas: Tensor, prompts: Mapping[str, Tensor], guidance: Tensor) -> Tensor:
        """Velocity [B, *latent] in the model's dtype of one branch: latents [B, *latent], sigmas [B], what the rows are
        told [B, ...] by name, and guidance [B] for a network that takes it."""
        answer = by_network(self, self._ask)(latents.to(self.dtype), sigmas, prompts, guidance)
        return answer if self.boundary is None or not torch.is_grad_enabled() else self.transformer.attached(answer)

    def _ask(self, latents: Tensor, sigmas: Tensor, prompts: Mapping[str, Tensor], guidance: Tensor) -> Tensor:
        """As `forward`, of rows that one network answers."""
        high = self.boundary is None or bool(self.high_noise(sigmas[0]))
        network = self.pipeline.transformer if high else self.pipeline.transformer_2
        return self.family.velocity(network, latents, sigmas, prompts, guidance)

    def prompts(
        self, positive: Sequence[Conditioning], negative: Sequence[Conditioning], scales: Sequence[Scales]
    ) -> Prompts:
        """What the rows of a batch are told, ready for `velocity`."""
        return Prompts.of(self.guidance, positive, negative, scales, self.device, self.dtype)

    def velocity(self, latents: Tensor, sigma: Tensor | float, prompts: Prompts) -> Tensor:
        """Guided velocity [B, *latent], float32, at latents [B, *latent] and sigmas [B], or one for all rows, in the
        arithmetic of the model's dtype."""
        with arithmetic(self.device, self.dtype):
            return guided_velocity(self.forward, latents, self._sigmas(sigma, len(latents)), prompts)

    def branches(self, latents: Tensor, sigma: Tensor | float, prompts: Prompts) -> Tensor:
        """What `velocity` is made of: the conditional and the unconditional one, [B, 2, *latent], float32.

        Raises:
            InvalidError: a row has no guidance.
        """
        with arithmetic(self.device, self.dtype):
            return guidance_branches(self.forward, latents, self._sigmas(sigma, len(latents)), prompts)

    def _sigmas(self, sigma: Tensor | float, rows: int) -> Tensor:
        return torch.as_tensor(sigma, dtype=torch.float32, device=self.device).expand(rows)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], max_sequence_length: int, *, negative: bool = False) -> list[Conditioning]:
        """Conditionings of `prompts`, on the CPU in the model's dtype. `negative`: for the unconditional branch of
        guidance, of which "" is the usual one.

        One prompt at a time: the last bits of a batched encoding depend on who else is in the batch, and with them the
        conditioning's key and every result that a resumed run has to repeat.
        """
        encode = (negative and self.family.encode_negative) or self.family.encode
        encoded = (encode(self.pipeline, prompt, max_sequence_length, self.device) for prompt in prompts)
        return [Conditioning(tensors).cast(self.dtype).to("cpu") for tensors in encoded]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W], or videos [B, F, 3, H, W], float32 in 0..1, of latents [B, *latent]."""
        vae = self.pipeline.vae
        images = self.family.decode(vae, latents.to(self.device, vae.dtype))
        return (images.float() / 2 + 0.5).clamp(0, 1)


def load_model(
    path: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    parts: Collection[str] = tuple(PARTS),
) -> Model:
    """Load the `parts` ("text", "transformer", "vae") of a model in diffusers' folder format, frozen, in eval mode.

    The VAE is always float32: its half-precision output is visibly worse and it runs once per image.

    Raises:
        InvalidError: the folder is not a model that this project can train or serve.
    """
    outline = read_outline(path)
    # They write the end of a prompt that is too long into the log; how many there are is said without (`tokens`).
    for library in ("diffusers", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    # Looks at the files, too: refuses what could be loaded in the place of the weights.
    names = [component.name for component in components(path)]
    absent = {name: None for part in set(PARTS) - set(parts) for name in names if name.startswith(PARTS[part])}
    device = torch.device(device)
    name = outline.family.pipeline
    try:
        with _quiet():
            pipeline = getattr(diffusers, name).from_pretrained(
                str(path),
                torch_dtype={"default": dtype, "vae": torch.float32},
                local_files_only=True,
                use_safetensors=True,
                **absent,
            )
    except (OSError, ValueError) as error:
        raise InvalidError(f"{path} cannot be loaded as {name}: {error}") from error
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.to(device).requires_grad_(False).eval()
    return Model(pipeline=pipeline, device=device, dtype=dtype, **vars(outline))


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
