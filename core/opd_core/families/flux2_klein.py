"""FLUX.2 [klein], base and step-distilled: Qwen3 gives the tokens, padded to the longest length and attended to.

Its latents are those of the autoencoder patched two by two and normalised, [128, H/16, W/16]: one token each. The shift
of the noise levels depends on the number of steps, so a training schedule is no part of a longer one.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from opd_core.families.family import Configs, Family, Native, Outline, TextWindow
from opd_core.families.guidance import CLASSIFIER_FREE, NONE
from opd_core.families.shared import JOINT_ATTENTION
from opd_core.teachers.contract import FREE

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from opd_core.diffusion.schedule import Schedule

_PATCH = 2


def outline(configs: Configs) -> Outline:
    transformer, vae = configs["transformer"], configs["vae"]
    distilled = configs["model_index"].get("is_distilled", False)
    return Outline(
        family=FLUX2_KLEIN,
        guidance=NONE if distilled else CLASSIFIER_FREE,
        scheduler_config=configs["scheduler"],
        latent_channels=transformer["in_channels"],
        latent_scale=_PATCH * 2 ** (len(vae["block_out_channels"]) - 1),
        patch_size=1,
        conditioning={"embeds": (FREE, transformer["joint_attention_dim"])},
        native=Native(
            width=1024,
            height=1024,
            steps=4 if distilled else 50,
            guidance_scale=1.0 if distilled else 4.0,
            max_sequence_length=512,
        ),
        distilled_steps=4 if distilled else None,
    )


def encode(pipeline: Any, prompt: str, max_sequence_length: int, device: "torch.device") -> "dict[str, Tensor]":
    embeds, _ = pipeline.encode_prompt(prompt=[prompt], max_sequence_length=max_sequence_length, device=device)
    return {"embeds": embeds[0]}


def velocity(
    transformer: Any, latents: "Tensor", sigmas: "Tensor", prompts: "Mapping[str, Tensor]", guidance: "Tensor"
) -> "Tensor":
    import torch

    from opd_core.families.packing import positions

    batch, channels, height, width = latents.shape
    length = prompts["embeds"].shape[1]
    text = torch.zeros(length, 4, device=latents.device)
    text[:, 3] = torch.arange(length, device=latents.device)
    answer = transformer(
        hidden_states=latents.flatten(2).transpose(1, 2),
        timestep=sigmas,
        guidance=None,
        encoder_hidden_states=prompts["embeds"],
        txt_ids=text.expand(batch, -1, -1),
        img_ids=positions(height, width, 4, latents.device).expand(batch, -1, -1),
        return_dict=False,
    )[0]
    image: Tensor = answer.transpose(1, 2).reshape(batch, channels, height, width)
    return image


def decode(vae: Any, latents: "Tensor") -> "Tensor":
    batch, channels, height, width = latents.shape
    deviation = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    patched = latents * deviation.view(1, -1, 1, 1).to(latents) + vae.bn.running_mean.view(1, -1, 1, 1).to(latents)
    pixels = patched.view(batch, channels // _PATCH**2, _PATCH, _PATCH, height, width).permute(0, 1, 4, 2, 5, 3)
    images: Tensor = vae.decode(
        pixels.reshape(batch, channels // _PATCH**2, height * _PATCH, width * _PATCH), return_dict=False
    )[0]
    return images


def schedule(config: Mapping[str, Any], steps: int, tokens: int) -> "Schedule":
    from opd_core.diffusion.schedule import schedule_from_config

    return schedule_from_config(config, steps, mu=empirical_mu(tokens, steps), uniform=True)


def empirical_mu(tokens: int, steps: int) -> float:
    """The shift of FLUX.2's authors: linear in the tokens of an image at 10 and at 200 steps, between them in the
    steps, and of large images no more than that of 200 steps (diffusers, compute_empirical_mu)."""
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    return at_200 + (at_200 - at_10) / 190 * (steps - 200)


FLUX2_KLEIN = Family(
    pipeline="Flux2KleinPipeline",
    outline=outline,
    encode=encode,
    velocity=velocity,
    decode=decode,
    schedule=schedule,
    # Blocks with one stream fuse their projections: names written for FLUX.1 would miss them.
    targets=(*JOINT_ATTENTION, "attn.to_qkv_mlp_proj", "attn.to_out"),
    windows=(TextWindow("Qwen3", ("tokenizer",), template=12),),
)  # fmt: skip
