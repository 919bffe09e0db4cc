"""SD3.5-Medium's own shapes through our forward, guidance and adapter, on the meta device: no weights, no arithmetic."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from opd_core.api.training import LoRA
from opd_core.conditioning import Conditioning
from opd_core.diffusion.guidance import guided_velocity
from opd_core.families.sd3 import SD3
from opd_core.models.adapters import adapter_parameters, add_student_adapter
from opd_core.models.pipeline import Model
from opd_core.scales import Scales
from torch import Tensor

LAYERS, WIDTH, CONTEXT, POOLED, TOKENS = 24, 24 * 64, 4096, 2048, 77 + 128


MEDIUM_CONFIG: dict[str, Any] = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": LAYERS,
    "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": CONTEXT,
    "caption_projection_dim": WIDTH, "pooled_projection_dim": POOLED, "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
}  # fmt: skip


VAE_CONFIG = {"block_out_channels": [128, 256, 512, 512]}


def medium_model(transformer: SD3Transformer2DModel, device: torch.device) -> Model:
    outline = SD3.outline({"transformer": MEDIUM_CONFIG, "vae": VAE_CONFIG, "scheduler": {"shift": 3.0}})
    pipeline = SimpleNamespace(transformer=transformer)
    return Model(pipeline=pipeline, device=device, dtype=torch.bfloat16, **vars(outline))


@pytest.fixture(scope="module")
def medium() -> Model:
    """stable-diffusion-3.5-medium's transformer configuration."""
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**MEDIUM_CONFIG).bfloat16()
    transformer.requires_grad_(False)
    return medium_model(transformer, torch.device("meta"))


def test_latents_and_schedule_at_512_pixels(medium: Model) -> None:
    assert medium.latent_shape(512, 512) == (16, 64, 64)
    sigmas = medium.schedule(10, 512, 512).sigmas
    expected = [1.0, 0.960, 0.913, 0.858, 0.790, 0.707, 0.602, 0.465, 0.278, 0.0089, 0.0]
    assert sigmas.tolist() == pytest.approx(expected, abs=6e-4)


def test_the_papers_adapter_fits_every_attention(medium: Model) -> None:
    lora = LoRA()
    add_student_adapter(
        medium.transformer, rank=lora.rank, alpha=lora.alpha, target_modules=medium.family.targets, seed=0
    )
    parameters = adapter_parameters(medium.transformer)
    # Eight projections per layer, without the output of the last layer's context; A and B each.
    assert len(parameters) == 2 * (8 * LAYERS - 1)
    assert {tuple(p.shape) for p in parameters} == {(32, WIDTH), (WIDTH, 32)}
    assert sum(p.numel() for p in parameters) == 2 * 32 * WIDTH * (8 * LAYERS - 1)


@pytest.mark.parametrize("guidance", [[4.5, 4.5], [4.5, 1.0], [1.0, 1.0]])
def test_guided_forward_keeps_shape_and_answers_in_float32(medium: Model, guidance: list[float]) -> None:
    rows: list[int] = []

    def forward(latents: Tensor, sigmas: Tensor, prompts: Mapping[str, Tensor], guidance: Tensor) -> Tensor:
        rows.append(len(latents))
        return medium.forward(latents, sigmas, prompts, guidance)

    def make(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    told = [Conditioning({"embeds": make(TOKENS, CONTEXT), "pooled": make(POOLED)}) for _ in range(3)]
    prompts = medium.prompts(told[:2], [told[2]] * 2, [Scales(each) for each in guidance])
    velocity = guided_velocity(
        forward, torch.empty(2, 16, 64, 64, device="meta"), torch.empty(2, device="meta"), prompts
    )
    assert velocity.shape == (2, 16, 64, 64)
    assert velocity.dtype == torch.float32
    assert sum(rows) == 2 + sum(g != 1 for g in guidance)
