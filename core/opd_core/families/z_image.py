"""Z-Image, base and Turbo: the network takes lists of images and of texts, time as 1 - sigma, and answers -v.

Guidance adds: v_c + g (v_c - v_u), so 0 turns it off, and Turbo is sampled with 0.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from opd_core.families.family import Configs, Family, Native, Outline, TextWindow
from opd_core.families.guidance import Guidance
from opd_core.families.shared import decode_shifted, uniform_schedule
from opd_core.teachers.contract import FREE

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def added(conditional: "Tensor", unconditional: "Tensor", scale: "Tensor") -> "Tensor":
    """v_c + g (v_c - v_u): classifier-free guidance of scale g + 1."""
    return conditional + scale * (conditional - unconditional)


def outline(configs: Configs) -> Outline:
    transformer, vae = configs["transformer"], configs["vae"]
    return Outline(
        family=Z_IMAGE,
        guidance=Guidance(off=0.0, combine=added),
        scheduler_config=configs["scheduler"],
        latent_channels=transformer["in_channels"],
        latent_scale=2 ** (len(vae["block_out_channels"]) - 1),
        patch_size=transformer["all_patch_size"][0],
        conditioning={"embeds": (FREE, transformer["cap_feat_dim"])},
        native=Native(width=1024, height=1024, steps=50, guidance_scale=5.0, max_sequence_length=512),
    )


def encode(pipeline: Any, prompt: str, max_sequence_length: int, device: "torch.device") -> "dict[str, Tensor]":
    (embeds,), _ = pipeline.encode_prompt(
        prompt=[prompt], do_classifier_free_guidance=False, max_sequence_length=max_sequence_length, device=device
    )
    return {"embeds": embeds}


def velocity(
    transformer: Any, latents: "Tensor", sigmas: "Tensor", prompts: "Mapping[str, Tensor]", guidance: "Tensor"
) -> "Tensor":
    import torch

    frames = list(latents.unsqueeze(2).unbind(0))
    answers = transformer(frames, 1 - sigmas, list(prompts["embeds"].unbind(0)), return_dict=False)[0]
    return -torch.stack(answers).squeeze(2)


Z_IMAGE = Family(
    pipeline="ZImagePipeline",
    outline=outline,
    encode=encode,
    velocity=velocity,
    decode=decode_shifted,
    schedule=uniform_schedule,
    targets=(
        "attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0",
        "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
    ),
    windows=(TextWindow("Qwen3", ("tokenizer",), template=8),),
)  # fmt: skip
