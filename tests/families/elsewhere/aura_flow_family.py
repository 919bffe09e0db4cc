"""AuraFlow in a package of its own: what another family takes, as CONTRIBUTING describes it."""

from opd_core.families.family import Family, Native, Outline, TextWindow
from opd_core.families.guidance import CLASSIFIER_FREE
from opd_core.teachers.contract import FREE


def outline(configs):
    transformer, vae = configs["transformer"], configs["vae"]
    scale = 2 ** (len(vae["block_out_channels"]) - 1)
    return Outline(
        family=AURA_FLOW,
        guidance=CLASSIFIER_FREE,
        scheduler_config=configs["scheduler"],
        latent_channels=transformer["in_channels"],
        latent_scale=scale,
        patch_size=transformer["patch_size"],
        conditioning={"embeds": (FREE, transformer["joint_attention_dim"])},
        native=Native(width=1024, height=1024, steps=50, guidance_scale=3.5, max_sequence_length=256),
    )


def encode(pipeline, prompt, max_sequence_length, device):
    embeds, *_ = pipeline.encode_prompt(
        prompt=[prompt], do_classifier_free_guidance=False, max_sequence_length=max_sequence_length, device=device
    )
    return {"embeds": embeds[0]}


def velocity(transformer, latents, sigmas, prompts, guidance):
    return transformer(latents, encoder_hidden_states=prompts["embeds"], timestep=sigmas, return_dict=False)[0]


def decode(vae, latents):
    return vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]


def schedule(config, steps, tokens):
    from opd_core.diffusion.schedule import schedule_from_config

    return schedule_from_config(config, steps)


AURA_FLOW = Family(
    pipeline="AuraFlowPipeline",
    outline=outline,
    encode=encode,
    velocity=velocity,
    decode=decode,
    schedule=schedule,
    targets=("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    windows=(TextWindow("T5", ("tokenizer",)),),
)
