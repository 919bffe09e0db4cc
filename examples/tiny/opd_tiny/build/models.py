"""The parts of a Stable Diffusion 3.5 pipeline, scaled to 32x32 pictures and a CPU."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from .tokenizers import TOKENS, clip_tokenizer, t5_tokenizer

IMAGE_SIZE = 32
LATENT_SHAPE = (16, 8, 8)
"""Channels, height and width of a latent."""

LORA_TARGETS = [
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
]  # fmt: skip


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


def build_vae() -> AutoencoderKL:
    """An untrained autoencoder, 3x32x32 to 16x8x8."""
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=16, sample_size=IMAGE_SIZE,
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[16, 32, 64], layers_per_block=1, norm_num_groups=8, mid_block_add_attention=False,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.0, shift_factor=0.0,
    )  # fmt: skip


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


def load_pipeline(folder: Path) -> StableDiffusion3Pipeline:
    """Load the fp16 folder for computing in float32."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def lora_config() -> LoraConfig:
    """The teachers' adapter: rank 16 on the eight attention projections of every layer."""
    return LoraConfig(r=16, lora_alpha=32, init_lora_weights="gaussian", target_modules=LORA_TARGETS)
