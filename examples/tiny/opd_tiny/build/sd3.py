"""A Stable Diffusion 3.5, scaled to 32x32 pictures and a CPU."""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from .tokenizers import TOKENS, clip_tokenizer, t5_tokenizer
from .world import World


def build_clip(vocab_size: int, eos: int, bos: int, width: int = 32) -> CLIPTextModelWithProjection:
    """A random, frozen CLIP text encoder.

    The usual initialisation (std 0.02) is so small that all prompts look alike in the un-normalised penultimate layer
    that SD3 reads, so the weights are drawn again with std 1.5 / sqrt(fan-in).
    """
    config = CLIPTextConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=2 * width, projection_dim=width,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=TOKENS,
        bos_token_id=bos, eos_token_id=eos, pad_token_id=eos,
    )  # fmt: skip
    model = CLIPTextModelWithProjection(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "token_embedding" in name:
                weight.normal_(0, 1.0)
            elif "position_embedding" in name:
                weight.normal_(0, 0.7)
            elif weight.ndim == 2:
                weight.normal_(0, 1.5 / weight.shape[1] ** 0.5)
    return model.eval().requires_grad_(False)


def build_t5(vocab_size: int) -> T5EncoderModel:
    """A random, frozen T5 encoder."""
    config = T5Config(
        vocab_size=vocab_size, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5EncoderModel(config).eval().requires_grad_(False)


def build_transformer() -> SD3Transformer2DModel:
    """An untrained MMDiT with SD3.5-Medium's dual attention in its first layers."""
    torch.manual_seed(0)
    heads, head_dim = 4, 32
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=5,
        attention_head_dim=head_dim, num_attention_heads=heads, joint_attention_dim=64,
        caption_projection_dim=heads * head_dim, pooled_projection_dim=64, pos_embed_max_size=8,
        qk_norm="rms_norm", dual_attention_layers=(0, 1),
    )  # fmt: skip


def assemble(transformer: SD3Transformer2DModel, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """Join transformer and VAE with the (random, seeded) text encoders and the scheduler of SD3."""
    torch.manual_seed(0)
    clip_tokens, t5_tokens = clip_tokenizer(), t5_tokenizer()
    clips = [build_clip(len(clip_tokens), clip_tokens.eos_token_id, clip_tokens.bos_token_id) for _ in range(2)]
    return StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clips[0], tokenizer=clip_tokens, text_encoder_2=clips[1], tokenizer_2=clip_tokens,
        text_encoder_3=build_t5(len(t5_tokens)), tokenizer_3=t5_tokens,
    )  # fmt: skip


def to_latents(vae: AutoencoderKL, encoded: Tensor) -> Tensor:
    """Of zero mean and unit variance."""
    latents: Tensor = (encoded - vae.config.shift_factor) * vae.config.scaling_factor
    return latents


SD3 = World(
    name="sd3",
    title="Stable Diffusion 3.5",
    folder="tiny-world",
    spec="quickstart.yaml",
    tokens=TOKENS,
    autoencoder=lambda vae, _: vae,
    assemble=lambda vae: assemble(build_transformer(), vae),
    to_latents=to_latents,
    base_steps=4000,
    teacher_steps={"geneval": 1500, "ocr": 700, "aesthetic": 400},
)
