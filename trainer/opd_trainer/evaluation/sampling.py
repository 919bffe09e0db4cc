"""Images of one model on the prompts of one task, with noise that depends on the task and the prompt's number alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from opd_core.api.types import Spec
from opd_core.conditioning import Conditioning
from opd_core.diffusion.noise import draw
from opd_core.diffusion.transitions import transitions
from opd_core.models.adapter_file import AdapterFile
from opd_core.models.adapters import drop_adapter, load_adapter, use_adapter
from opd_core.models.pipeline import Model, load_model
from opd_core.scales import Scales
from torch import Tensor


@dataclass(frozen=True)
class Candidate:
    """A model under test with its guidance: `adapter` of the base's transformer (None: the base itself), or the
    transformer of the model in `folder`. `lora`: what the adapter is loaded from for its turn; None: it is there."""

    name: str
    adapter: str | None
    scales: Scales
    fingerprint: str
    folder: Path | None = None
    lora: AdapterFile | None = None


@contextmanager
def model_of(candidate: Candidate, base: Model) -> Iterator[Model]:
    """What computes the candidate's images: `base`, meanwhile with the candidate's LoRA, or in its place on the device
    a model of the candidate's own, whose images the base's VAE decodes."""
    if candidate.lora is not None:
        assert candidate.adapter is not None
        load_adapter(base.transformer, candidate.lora, candidate.adapter)
        try:
            yield base
        finally:
            drop_adapter(base.transformer, candidate.adapter)
        return
    if candidate.folder is None:
        yield base
        return
    base.transformer.to("cpu")
    own = load_model(candidate.folder, device=base.device, dtype=base.dtype, parts={"transformer"})
    own.pipeline.register_modules(vae=base.pipeline.vae)
    try:
        yield own
    finally:
        own.transformer.to("cpu")  # whoever still refers to it holds nothing of the device's
        if base.device.type == "cuda":
            torch.cuda.empty_cache()
        base.transformer.to(base.device)


def student_scales(spec: Spec) -> Scales:
    """Of base and student in an evaluation."""
    own, (guidance, true_cfg) = spec.evaluation, spec.training.scales
    return Scales(
        guidance if own.guidance_scale is None else own.guidance_scale,
        true_cfg if own.true_cfg_scale is None else own.true_cfg_scale,
    )


@torch.no_grad()
def sample_images(
    model: Model,
    candidate: Candidate,
    spec: Spec,
    task: str,
    numbers: Sequence[int],
    conditioning: Sequence[Conditioning],
    negative: Conditioning,
) -> Iterator[tuple[list[int], Tensor]]:
    """Batches of images [B, 3, H, W], or videos [B, F, 3, H, W], float32 in 0..1 on the CPU, with the numbers of their
    prompts.

    Args:
        numbers: which of the task's held-out prompts; an image depends on its number alone, not on the others.
        conditioning: of these prompts.
    """
    evaluation, resolution = spec.evaluation, spec.training.resolution
    shape = model.latent_shape(*resolution.size)
    schedule = model.schedule(evaluation.sampler.steps, resolution.width, resolution.height)
    path = transitions(schedule, evaluation.sampler.solver, evaluation.sampler.noise_level)
    use_adapter(model.transformer, candidate.adapter)
    for start in range(0, len(numbers), evaluation.batch_size):
        rows = slice(start, start + evaluation.batch_size)
        part = list(numbers[rows])
        prompts = model.prompts(conditioning[rows], [negative] * len(part), [candidate.scales] * len(part))
        latents = _noise(shape, evaluation.seed, task, part, "start").to(model.device)
        before: Tensor | None = None
        for j, step in enumerate(path):
            velocity = model.velocity(latents, step.sigma, prompts)
            latents, before = step.mean(latents, velocity, before), step.clean(latents, velocity)
            if step.std > 0:
                latents += step.std * _noise(shape, evaluation.seed, task, part, j).to(model.device)
        yield part, model.decode(latents).cpu()


def _noise(shape: Sequence[int], seed: int, task: str, numbers: Sequence[int], step: int | str) -> Tensor:
    return torch.stack([draw(shape, seed, "evaluation", task, number, step) for number in numbers])
