"""Stable Diffusion 3 and 3.5: the example of a family.

Latents enter as they are, time as 1000 sigma; two CLIP encoders and T5 give tokens and one pooled vector.
"""

import re
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
        native=Native(
            width=transformer["sample_size"] * scale,
            height=transformer["sample_size"] * scale,
            steps=28,
            guidance_scale=4.5,
            max_sequence_length=128,
        ),
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


# Layers as Stability's own code names them (sd-scripts, ComfyUI), q, k and v in one: `{0}` is the block's number.
_JOINT, _BLOCK = "joint_blocks.{0}", "transformer_blocks.{0}"
_LAYERS = {
    f"{_JOINT}.x_block.attn.qkv": [f"{_BLOCK}.attn.to_{part}" for part in "qkv"],
    f"{_JOINT}.x_block.attn2.qkv": [f"{_BLOCK}.attn2.to_{part}" for part in "qkv"],
    f"{_JOINT}.context_block.attn.qkv": [f"{_BLOCK}.attn.add_{part}_proj" for part in "qkv"],
    f"{_JOINT}.x_block.attn.proj": [f"{_BLOCK}.attn.to_out.0"],
    f"{_JOINT}.x_block.attn2.proj": [f"{_BLOCK}.attn2.to_out.0"],
    f"{_JOINT}.context_block.attn.proj": [f"{_BLOCK}.attn.to_add_out"],
    f"{_JOINT}.x_block.mlp.fc1": [f"{_BLOCK}.ff.net.0.proj"],
    f"{_JOINT}.x_block.mlp.fc2": [f"{_BLOCK}.ff.net.2"],
    f"{_JOINT}.context_block.mlp.fc1": [f"{_BLOCK}.ff_context.net.0.proj"],
    f"{_JOINT}.context_block.mlp.fc2": [f"{_BLOCK}.ff_context.net.2"],
    f"{_JOINT}.x_block.adaLN_modulation.1": [f"{_BLOCK}.norm1.linear"],
    f"{_JOINT}.context_block.adaLN_modulation.1": [f"{_BLOCK}.norm1_context.linear"],
    "t_embedder.mlp.0": ["time_text_embed.timestep_embedder.linear_1"],
    "t_embedder.mlp.2": ["time_text_embed.timestep_embedder.linear_2"],
    "y_embedder.mlp.0": ["time_text_embed.text_embedder.linear_1"],
    "y_embedder.mlp.2": ["time_text_embed.text_embedder.linear_2"],
    "context_embedder": ["context_embedder"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    "final_layer.linear": ["proj_out"],
}
_OF_BLOCK = re.compile(r"(joint_blocks[._])(\d+)(?=[._])")


def convert_lora(state: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """diffusers has no such conversion of LoRAs; this is its conversion of whole checkpoints, layer by layer
    (convert_sd3_transformer_checkpoint_to_diffusers)."""
    import torch

    known = {name.replace("{0}", "#").replace(".", "_"): layers for name, layers in _LAYERS.items()}
    found: dict[str, Tensor] = {}
    for key in state:
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix("lora_unet_").removeprefix("diffusion_model.").removesuffix(".lora_A.weight")
        block = _OF_BLOCK.search(name)
        layers = known.get(_OF_BLOCK.sub(r"\1#", name).replace(".", "_"), ())
        a, b = state[key], state[key.replace(".lora_A.", ".lora_B.")]
        if layers and "adaLN" in name and len(b) == 2 * a.shape[1]:  # scale before shift in diffusers
            b = torch.cat(b.chunk(2)[::-1])
        for layer, rows in zip(layers, b.chunk(len(layers) or 1), strict=bool(layers)):
            target = f"transformer.{layer.format(block[2] if block else '')}"
            found |= {f"{target}.lora_A.weight": a, f"{target}.lora_B.weight": rows}
    return found


SD3 = Family(
    pipeline="StableDiffusion3Pipeline",
    outline=outline,
    encode=encode,
    velocity=velocity,
    decode=decode_shifted,
    schedule=schedule,
    targets=JOINT_ATTENTION,
    convert_lora=convert_lora,
    windows=(
        TextWindow("CLIP", ("tokenizer", "tokenizer_2"), own_limit=True),
        TextWindow("T5", ("tokenizer_3",)),
    ),
)  # fmt: skip
