"""Wan 2.1 text-to-video, and the dense model of 2.2: latents of videos [C, t, h, w], time as 1000 sigma; UMT5 gives
tokens, padded with zeros to one length.

A video has 4 k + 1 frames, of which the first has a latent frame of its own; an image is a video of one.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from opd_core.errors import InvalidError
from opd_core.families.family import Configs, Family, Native, Outline, TextWindow
from opd_core.families.guidance import CLASSIFIER_FREE
from opd_core.families.shared import SELF_AND_CROSS_ATTENTION, euler_schedule
from opd_core.teachers.contract import FREE

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def outline(configs: Configs) -> Outline:
    transformer, vae, index = configs["transformer"], configs["vae"], configs["model_index"]
    if index.get("boundary_ratio") is not None:
        raise InvalidError(
            "model_index.json has a boundary_ratio: below that noise level another network, transformer_2, answers, so "
            "that a LoRA would be a pair; such models (Wan2.2 A14B) are not supported, those with one transformer are"
        )
    dense = bool(index.get("expand_timesteps"))
    # What diffusers takes where a configuration, as that of 2.1, does not say it.
    scale = vae.get("scale_factor_spatial", 8)
    time, height, width = transformer["patch_size"]
    if (time, height) != (1, width):
        raise ValueError(f"square patches of one frame: patch_size is {transformer['patch_size']}")
    return Outline(
        family=WAN,
        guidance=CLASSIFIER_FREE,
        scheduler_config=configs["scheduler"],
        latent_channels=transformer["in_channels"],
        latent_scale=scale,
        patch_size=height,
        frame_scale=vae.get("scale_factor_temporal", 4),
        frames_per_second=24 if dense else 16,
        conditioning={"embeds": (FREE, transformer["text_dim"])},
        native=Native(
            width=832,
            height=480,
            frames=81,
            steps=50,
            guidance_scale=5.0,
            max_sequence_length=512,
        ),
        max_side=transformer.get("rope_max_seq_len", 1024) * height * scale,
    )


def encode(pipeline: Any, prompt: str, max_sequence_length: int, device: "torch.device") -> "dict[str, Tensor]":
    embeds, _ = pipeline.encode_prompt(
        prompt=[prompt], do_classifier_free_guidance=False, max_sequence_length=max_sequence_length, device=device
    )
    return {"embeds": embeds[0]}


def velocity(
    transformer: Any, latents: "Tensor", sigmas: "Tensor", prompts: "Mapping[str, Tensor]", guidance: "Tensor"
) -> "Tensor":
    """One time for all tokens: the dense model takes one for each, which differ where a first frame is given alone."""
    answer: Tensor = transformer(
        hidden_states=latents, timestep=sigmas * 1000, encoder_hidden_states=prompts["embeds"], return_dict=False
    )[0]
    return answer


def decode(vae: Any, latents: "Tensor") -> "Tensor":
    """One video at a time: an autoencoder of videos needs much memory."""
    import torch

    mean, deviation = (
        latents.new_tensor(numbers).view(1, -1, 1, 1, 1)
        for numbers in (vae.config.latents_mean, vae.config.latents_std)
    )
    scaled = latents * deviation + mean
    videos = torch.cat([vae.decode(each, return_dict=False)[0] for each in torch.split(scaled, 1)]).transpose(1, 2)
    return videos if videos.shape[1] > 1 else videos[:, 0]


# Layers as the authors' own code names them, and with underscores for dots as kohya's school does.
_LAYER = re.compile(r"(?:lora_unet_|diffusion_model\.)blocks[._](\d+)[._](self_attn|cross_attn|ffn)[._]([qkvo02])")
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_OURS = {
    **{("self_attn", theirs): f"attn1.{ours}" for theirs, ours in _ATTENTION.items()},
    **{("cross_attn", theirs): f"attn2.{ours}" for theirs, ours in _ATTENTION.items()},
    ("ffn", "0"): "ffn.net.0.proj",
    ("ffn", "2"): "ffn.net.2",
}


def convert_lora(state: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """diffusers' own conversion wants every layer of every block, and of kohya's files their alphas."""
    found = {}
    for key, value in state.items():
        name, side, rest = key.partition(".lora_")
        match = _LAYER.fullmatch(name)
        if match and match.group(2, 3) in _OURS:
            found[f"transformer.blocks.{match[1]}.{_OURS[match[2], match[3]]}{side}{rest}"] = value
    return found


WAN = Family(
    pipeline="WanPipeline",
    outline=outline,
    encode=encode,
    velocity=velocity,
    decode=decode,
    schedule=euler_schedule,
    targets=(*SELF_AND_CROSS_ATTENTION, "ffn.net.0.proj", "ffn.net.2"),
    windows=(TextWindow("UMT5", ("tokenizer",)),),
    convert_lora=convert_lora,
)  # fmt: skip
