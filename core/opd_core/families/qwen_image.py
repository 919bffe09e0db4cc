"""Qwen-Image: tokens of two by two latent pixels; Qwen2.5-VL gives as many text tokens as a prompt has.

Guidance keeps the norm of the conditional velocity, token by token, so it is not linear. The autoencoder is one of
videos, and an image is its single frame.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from opd_core.families.family import Configs, Family, Native, Outline, TextWindow
from opd_core.families.guidance import Guidance, classifier_free
from opd_core.families.shared import JOINT_ATTENTION, uniform_schedule
from opd_core.teachers.contract import FREE

if TYPE_CHECKING:
    import torch
    from torch import Tensor


_PATCH = 2


def norm_kept(conditional: "Tensor", unconditional: "Tensor", scale: "Tensor") -> "Tensor":
    """Classifier-free guidance v, scaled to ||v_c|| / ||v|| for every packed token, as diffusers' pipeline does."""
    from opd_core.families.packing import pack, unpack

    height, width = conditional.shape[2:]
    guided, wanted = pack(classifier_free(conditional, unconditional, scale)), pack(conditional)
    kept: Tensor = guided * (wanted.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
    return unpack(kept, height, width)


def outline(configs: Configs) -> Outline:
    transformer, vae = configs["transformer"], configs["vae"]
    return Outline(
        family=QWEN_IMAGE,
        guidance=Guidance(off=1.0, combine=norm_kept),
        scheduler_config=configs["scheduler"],
        latent_channels=transformer["in_channels"] // _PATCH**2,
        latent_scale=2 ** len(vae["temperal_downsample"]),
        patch_size=_PATCH,
        conditioning={"embeds": (FREE, transformer["joint_attention_dim"])},
        native=Native(width=1024, height=1024, steps=50, guidance_scale=4.0, max_sequence_length=512),
    )


def encode(pipeline: Any, prompt: str, max_sequence_length: int, device: "torch.device") -> "dict[str, Tensor]":
    embeds, mask = pipeline.encode_prompt(prompt=[prompt], max_sequence_length=max_sequence_length, device=device)
    assert mask is None or bool(mask.all()), "one prompt alone has no padding"
    return {"embeds": embeds[0]}


def velocity(
    transformer: Any, latents: "Tensor", sigmas: "Tensor", prompts: "Mapping[str, Tensor]", guidance: "Tensor"
) -> "Tensor":
    from opd_core.families.packing import pack, unpack

    height, width = latents.shape[2:]
    answer = transformer(
        hidden_states=pack(latents),
        timestep=sigmas,
        encoder_hidden_states=prompts["embeds"],
        encoder_hidden_states_mask=None,
        img_shapes=[[(1, height // _PATCH, width // _PATCH)]] * len(latents),
        return_dict=False,
    )[0]
    return unpack(answer, height, width)


def decode(vae: Any, latents: "Tensor") -> "Tensor":
    mean, deviation = (
        latents.new_tensor(numbers).view(1, -1, 1, 1) for numbers in (vae.config.latents_mean, vae.config.latents_std)
    )
    images: Tensor = vae.decode((latents * deviation + mean).unsqueeze(2), return_dict=False)[0].squeeze(2)
    return images


QWEN_IMAGE = Family(
    pipeline="QwenImagePipeline",
    outline=outline,
    encode=encode,
    velocity=velocity,
    decode=decode,
    schedule=uniform_schedule,
    targets=JOINT_ATTENTION,
    windows=(TextWindow("Qwen2.5-VL", ("tokenizer",), template=5),),
)  # fmt: skip
