"""The real configurations on the meta device: shapes through the family's own functions, and where a LoRA goes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from opd_core.families.family import Family
from opd_core.families.flux import FLUX
from opd_core.families.flux2_klein import FLUX2_KLEIN, empirical_mu
from opd_core.families.qwen_image import QWEN_IMAGE
from opd_core.families.sana import SANA
from opd_core.families.wan import WAN
from opd_core.families.z_image import Z_IMAGE
from opd_core.models.adapter_file import missed_blocks
from opd_core.models.adapters import add_student_adapter, model_layers, use_adapter
from opd_core.models.pairs import NETWORKS
from opd_core.models.pipeline import Model
from opd_core.teachers.contract import MASK
from torch.utils.flop_counter import FlopCounterMode

IMAGE_VAE = {"block_out_channels": [128, 256, 512, 512]}
DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0}

FRAMES = 81  # of a video
UNIPC = {"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0, "use_flow_sigmas": True}

# Of FLUX.1-dev, FLUX.2-klein-4B, Qwen-Image, Sana_1600M, Z-Image, Wan2.1-T2V-1.3B and -14B, Wan2.2-TI2V-5B and -T2V-A14B: parameters
# in thousands of millions, tokens of a prompt, latents of 512 pixels, layers with a LoRA.
REAL: dict[str, tuple[Family, type, dict[str, Any], dict[str, Any], dict[str, Any], float, int, tuple[int, ...], int]] = {
    "flux": (
        FLUX, FluxTransformer2DModel, {"guidance_embeds": True, "pooled_projection_dim": 768}, IMAGE_VAE, DYNAMIC,
        11.9, 512, (16, 64, 64), 19 * 8 + 38 * 3,
    ),
    "klein": (
        FLUX2_KLEIN, Flux2Transformer2DModel,
        {
            "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        IMAGE_VAE, DYNAMIC, 3.9, 512, (128, 32, 32), 5 * 8 + 20 * 2,
    ),
    "qwen": (
        QWEN_IMAGE, QwenImageTransformer2DModel, {}, {"temperal_downsample": [False, True, True]},
        {**DYNAMIC, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}, 20.4, 47, (16, 64, 64), 60 * 8,
    ),
    "sana": (
        SANA, SanaTransformer2DModel, {}, {"encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024]},
        {"_class_name": "DPMSolverMultistepScheduler", "flow_shift": 3.0}, 1.6, 300, (32, 16, 16), 20 * 8,
    ),
    "wan_1.3b": (
        WAN, WanTransformer3DModel, {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}, {}, UNIPC,
        1.42, 512, (16, 21, 64, 64), 30 * 10,
    ),
    "wan_14b": (WAN, WanTransformer3DModel, {}, {}, UNIPC, 14.3, 512, (16, 21, 64, 64), 40 * 10),
    "wan_a14b": (WAN, WanTransformer3DModel, {}, {}, UNIPC, 28.6, 512, (16, 21, 64, 64), 2 * 40 * 10),
    "wan_5b": (
        WAN, WanTransformer3DModel,
        {"num_layers": 30, "num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48},
        {"scale_factor_spatial": 16}, UNIPC, 5.0, 512, (48, 21, 32, 32), 30 * 10,
    ),
    "z_image": (
        Z_IMAGE, ZImageTransformer2DModel, {}, IMAGE_VAE, {"shift": 6.0}, 6.2, 47, (16, 64, 64), (30 + 2 + 2) * 7,
    ),
}  # fmt: skip


# Of those with several networks: how many, and what model_index.json says of them.
SEVERAL = {"wan_a14b": (2, {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875})}


@pytest.mark.parametrize("name", REAL)
def test_the_real_models_shapes(name: str, repository: Path) -> None:
    family, kind, config, vae, scheduler, billions, tokens, latents, adapted = REAL[name]
    count, index = SEVERAL.get(name, (1, {}))
    with torch.device("meta"):
        networks = {part: kind(**config).bfloat16().requires_grad_(False) for part in NETWORKS[:count]}
        configs = {part: dict(network.config) for part, network in networks.items()}
        outline = family.outline({"model_index": index, **configs, "vae": vae, "scheduler": scheduler})
        model = Model(
            pipeline=SimpleNamespace(**networks), device=torch.device("meta"), dtype=torch.bfloat16, **vars(outline)
        )
        transformer = model.transformer
        parameters = sum(p.numel() for p in transformer.parameters())
        assert parameters / 1e9 == pytest.approx(billions, rel=0.02)
        assert outline.latent_shape(512, 512, 1 if outline.frame_scale is None else FRAMES) == latents
        assert missed_blocks(family.targets, model_layers(transformer)) == {}
        add_student_adapter(transformer, rank=32, alpha=64, target_modules=family.targets, seed=0)
        found = [key for key, _ in transformer.named_parameters() if "lora_A" in key]
        assert len(found) == adapted
        told = {
            key: torch.empty(
                1,
                *(tokens if size == -1 else size for size in shape),
                dtype=torch.bool if key == MASK else torch.bfloat16,
            )
            for key, shape in outline.conditioning.items()
        }
        use_adapter(transformer, None)
        state = torch.empty(1, *latents, dtype=torch.bfloat16)
        for network in networks.values():  # of which one is asked at a time
            with FlopCounterMode(display=False) as counted:
                velocity = family.velocity(network, state, torch.empty(1), told, torch.empty(1))
            assert tuple(velocity.shape) == (1, *latents)
            operations = counted.get_total_flops()
    costs = f"| {parameters / 1e9:.1f} | {2 * parameters / 2**30:.1f} | {operations / 1e12:.1f} |"
    assert costs in (repository / "docs" / "families.md").read_text()
    sigmas = outline.schedule(28, 512, 512).sigmas
    assert (sigmas[0], sigmas[-1], len(sigmas)) == (1.0, 0.0, 29)


def test_the_shift_of_flux_2_depends_on_the_number_of_steps() -> None:
    """At 512 and 1024 pixels."""
    assert [round(empirical_mu(1024, steps), 3) for steps in (4, 10, 40, 50)] == [2.031, 1.988, 1.773, 1.702]
    assert [round(empirical_mu(4096, steps), 3) for steps in (4, 10, 40, 50)] == [2.291, 2.256, 2.082, 2.023]
