"""SANA: a deep autoencoder, linear attention, and Gemma 2, which reads a prompt behind instructions to enhance it.

Its texts have one length and a mask. The pipeline gives no instructions for a negative prompt.
"""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from opd_core.families.family import Configs, Family, Native, Outline, TextWindow
from opd_core.families.guidance import CLASSIFIER_FREE
from opd_core.families.shared import SELF_AND_CROSS_ATTENTION, euler_schedule
from opd_core.teachers.contract import FREE

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def outline(configs: Configs) -> Outline:
    transformer = configs["transformer"]
    scale = 2 ** (len(configs["vae"]["encoder_block_out_channels"]) - 1)
    return Outline(
        family=SANA,
        guidance=CLASSIFIER_FREE,
        scheduler_config=configs["scheduler"],
        latent_channels=transformer["in_channels"],
        latent_scale=scale,
        patch_size=transformer["patch_size"],
        conditioning={"embeds": (FREE, transformer["caption_channels"]), "mask": (FREE,)},
        native=Native(
            width=transformer["sample_size"] * scale,
            height=transformer["sample_size"] * scale,
            steps=20,
            guidance_scale=4.5,
            max_sequence_length=300,
        ),
    )


def encode(pipeline: Any, prompt: str, max_sequence_length: int, device: "torch.device") -> "dict[str, Tensor]":
    instructions = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
    return _encode(pipeline, prompt, max_sequence_length, device, instructions)


def encode_negative(
    pipeline: Any, prompt: str, max_sequence_length: int, device: "torch.device"
) -> "dict[str, Tensor]":
    return _encode(pipeline, prompt, max_sequence_length, device, None)


def _encode(
    pipeline: Any, prompt: str, max_sequence_length: int, device: "torch.device", instructions: list[str] | None
) -> "dict[str, Tensor]":
    embeds, mask, _, _ = pipeline.encode_prompt(
        prompt=[prompt],
        do_classifier_free_guidance=False,
        max_sequence_length=max_sequence_length,
        complex_human_instruction=instructions,
        device=device,
    )
    return {"embeds": embeds[0], "mask": mask[0].bool()}


def velocity(
    transformer: Any, latents: "Tensor", sigmas: "Tensor", prompts: "Mapping[str, Tensor]", guidance: "Tensor"
) -> "Tensor":
    answer: Tensor = transformer(
        latents,
        encoder_hidden_states=prompts["embeds"],
        encoder_attention_mask=prompts["mask"],
        timestep=sigmas * 1000 * transformer.config.timestep_scale,
        return_dict=False,
    )[0]
    return answer[:, : latents.shape[1]]  # where it has learnt a variance as well, that is behind


def decode(vae: Any, latents: "Tensor") -> "Tensor":
    images: Tensor = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
    return images


SANA = Family(
    pipeline="SanaPipeline",
    outline=outline,
    encode=encode,
    encode_negative=encode_negative,
    velocity=velocity,
    decode=decode,
    schedule=euler_schedule,
    targets=SELF_AND_CROSS_ATTENTION,
    windows=(TextWindow("Gemma 2", ("tokenizer",)),),
)  # fmt: skip
