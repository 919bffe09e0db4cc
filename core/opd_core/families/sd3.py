"""Stable Diffusion 3 and 3.5: the example of a family.

Latents enter as they are, time as 1000 sigma; two CLIP encoders and T5 give tokens and one pooled vector.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from opd_core.families.family import Configs, Family, Native, Outline, TextWindow
from opd_core.families.guidance import CLASSIFIER_FREE
from opd_core.families.shared import JOINT_ATTENTION, decode_shifted
from opd_core.teachers.contract import FREE

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from opd_core.diffusion.schedule import Schedule


def outline(configs: Configs) -> Outline:
    transformer, vae = configs["transformer"], configs["vae"]
    scale = 2 ** (len(vae["block_out_channels"]) - 1)
    return Outline(
        family=SD3,
        guidance=CLASSIFIER_FREE,
        scheduler_config=configs["scheduler"],
        latent_channels=transformer["in_channels"],
        latent_scale=scale,
        patch_size=transformer["patch_size"],
        conditioning={
            "embeds": (FREE, transformer["joint_attention_dim"]),
            "pooled": (transformer["pooled_projection_dim"],),
        },
        native=Native(side=transformer["sample_size"] * scale, steps=28, guidance_scale=4.5, max_sequence_length=128),
        max_side=transformer["pos_embed_max_size"] * transformer["patch_size"] * scale,
    )


def encode(pipeline: Any, prompt: str, max_sequence_length: int, device: "torch.device") -> "dict[str, Tensor]":
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompt=[prompt],
        prompt_2=None,
        prompt_3=None,
        do_classifier_free_guidance=False,
        max_sequence_length=max_sequence_length,
        device=device,
    )
    return {"embeds": embeds[0], "pooled": pooled[0]}


def velocity(
    transformer: Any, latents: "Tensor", sigmas: "Tensor", prompts: "Mapping[str, Tensor]", guidance: "Tensor"
) -> "Tensor":
    answer: Tensor = transformer(
        hidden_states=latents,
        timestep=sigmas * 1000,
        encoder_hidden_states=prompts["embeds"],
        pooled_projections=prompts["pooled"],
        return_dict=False,
    )[0]
    return answer


def schedule(config: Mapping[str, Any], steps: int, tokens: int) -> "Schedule":
    from opd_core.diffusion.schedule import linear_mu, schedule_from_config

    return schedule_from_config(config, steps, mu=linear_mu(config, tokens))


SD3 = Family(
    pipeline="StableDiffusion3Pipeline",
    outline=outline,
    encode=encode,
    velocity=velocity,
    decode=decode_shifted,
    schedule=schedule,
    targets=JOINT_ATTENTION,
    windows=(
        TextWindow("CLIP", ("tokenizer", "tokenizer_2"), own_limit=True),
        TextWindow("T5", ("tokenizer_3",)),
    ),
)  # fmt: skip
