"""FLUX.1: tokens of two by two latent pixels with their positions; T5 gives tokens, CLIP one pooled vector.

The guidance scale is an input of FLUX.1-dev's network, where 1 is a value like others; FLUX.1-schnell has none. A
second scale, true CFG, guides both by a negative prompt besides.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from opd_core.families.family import Configs, Family, Native, Outline, TextWindow
from opd_core.families.guidance import EMBEDDED, TRUE_CFG
from opd_core.families.shared import JOINT_ATTENTION, decode_shifted, uniform_schedule
from opd_core.teachers.contract import FREE

if TYPE_CHECKING:
    import torch
    from torch import Tensor


_PATCH = 2


def outline(configs: Configs) -> Outline:
    transformer, vae = configs["transformer"], configs["vae"]
    embedded = transformer["guidance_embeds"]
    return Outline(
        family=FLUX,
        guidance=EMBEDDED if embedded else TRUE_CFG,
        scheduler_config=configs["scheduler"],
        latent_channels=transformer["in_channels"] // _PATCH**2,
        latent_scale=2 ** (len(vae["block_out_channels"]) - 1),
        patch_size=_PATCH,
        conditioning={
            "embeds": (FREE, transformer["joint_attention_dim"]),
            "pooled": (transformer["pooled_projection_dim"],),
        },
        native=Native(
            width=1024,
            height=1024,
            steps=28 if embedded else 4,
            guidance_scale=3.5 if embedded else 1.0,
            max_sequence_length=512 if embedded else 256,
        ),
        distilled_steps=None if embedded else 4,
    )


def encode(pipeline: Any, prompt: str, max_sequence_length: int, device: "torch.device") -> "dict[str, Tensor]":
    embeds, pooled, _ = pipeline.encode_prompt(
        prompt=[prompt], prompt_2=None, max_sequence_length=max_sequence_length, device=device
    )
    return {"embeds": embeds[0], "pooled": pooled[0]}


def velocity(
    transformer: Any, latents: "Tensor", sigmas: "Tensor", prompts: "Mapping[str, Tensor]", guidance: "Tensor"
) -> "Tensor":
    from opd_core.families.packing import pack, positions, unpack

    height, width = latents.shape[2:]
    answer = transformer(
        hidden_states=pack(latents),
        timestep=sigmas,
        guidance=guidance if transformer.config.guidance_embeds else None,
        encoder_hidden_states=prompts["embeds"],
        pooled_projections=prompts["pooled"],
        txt_ids=sigmas.new_zeros(prompts["embeds"].shape[1], 3),
        img_ids=positions(height // _PATCH, width // _PATCH, 3, latents.device),
        return_dict=False,
    )[0]
    return unpack(answer, height, width)


FLUX = Family(
    pipeline="FluxPipeline",
    outline=outline,
    encode=encode,
    velocity=velocity,
    decode=decode_shifted,
    schedule=uniform_schedule,
    # Blocks with one stream have to_q, to_k and to_v alone; their output is proj_out, with the feed-forward's.
    targets=JOINT_ATTENTION,
    windows=(TextWindow("CLIP", ("tokenizer",), own_limit=True), TextWindow("T5", ("tokenizer_2",))),
)  # fmt: skip
