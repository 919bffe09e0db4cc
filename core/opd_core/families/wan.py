"""Wan 2.1 and 2.2 text-to-video: latents of videos [C, t, h, w], time as 1000 sigma; UMT5 gives tokens, padded with
zeros to one length. Of 2.2 the dense model, and A14B, whose two transformers take turns by noise level.

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
    boundary = _boundary(configs)
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
        boundary=boundary,
        max_side=transformer.get("rope_max_seq_len", 1024) * height * scale,
    )


def _boundary(configs: Configs) -> float | None:
    """The noise level below which transformer_2 answers; None: there is none."""
    index, first = configs["model_index"], configs["transformer"]
    boundary, second = index.get("boundary_ratio"), configs.get("transformer_2")
    if (index.get("transformer_2") or [None])[0] is None:
        if boundary is not None:
            raise InvalidError(
                f"model_index.json: boundary_ratio is {boundary}, and there is no transformer_2 to answer below that "
                "noise level; copy the model again, or remove boundary_ratio"
            )
        return None
    if boundary is None:
        raise InvalidError(
            "model_index.json names a transformer_2, and no boundary_ratio says below which noise level it answers; "
            "add that of the model, 0.875 for Wan2.2 T2V A14B"
        )
    if isinstance(boundary, bool) or not isinstance(boundary, int | float) or not 0 < boundary < 1:
        raise InvalidError(f"model_index.json: boundary_ratio is {boundary}; write a noise level between 0 and 1")
    if second is None:
        raise InvalidError("model_index.json names a transformer_2, which has no config.json; copy the model again")
    for key in ("in_channels", "out_channels", "patch_size", "text_dim"):
        if first.get(key) != second.get(key):
            raise InvalidError(
                f"transformer_2's {key} is {second.get(key)}, transformer's is {first.get(key)}: they cannot take "
                "turns on the same latents and texts; are they of one model?"
            )
    return float(boundary)


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
