"""A FLUX.2 [klein], scaled to 32x32 pictures and a CPU.

It has what Stable Diffusion 3 has not: blocks with one stream, prompts read by a language model, latents that the
autoencoder normalises channel by channel, and a schedule that depends on the number of steps.
"""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from .tokenizers import qwen_tokenizer
from .vae import encode_pictures
from .world import World

_TOKENS = 22
"""Twelve of the chat around a prompt, and ten of the longest one."""
_LAYERS_READ = 3
"""The pipeline gives the transformer the hidden states of layers 9, 18 and 27, side by side."""
_TEXT_WIDTH = 32


def autoencoder(trained: AutoencoderKL, pictures: Tensor) -> AutoencoderKLFlux2:
    """The same network as FLUX.2's class, with the mean and variance of every channel of its patched latents."""
    own = (
        "down_block_types", "up_block_types", "block_out_channels", "layers_per_block", "latent_channels",
        "norm_num_groups", "sample_size", "mid_block_add_attention", "use_quant_conv", "use_post_quant_conv",
    )  # fmt: skip
    vae = AutoencoderKLFlux2(**{name: trained.config[name] for name in own})
    vae.load_state_dict({**vae.state_dict(), **trained.state_dict()})
    vae.eval()
    patched = _patched(encode_pictures(vae, pictures))
    vae.bn.running_mean.copy_(patched.mean((0, 2, 3)))
    vae.bn.running_var.copy_(patched.var((0, 2, 3)))
    return vae


def to_latents(vae: AutoencoderKLFlux2, encoded: Tensor) -> Tensor:
    """Patched two by two and normalised, [N, 4 C, h / 2, w / 2]."""
    normalised: Tensor = vae.bn(_patched(encoded))
    return normalised


def build_transformer() -> Flux2Transformer2DModel:
    """Untrained, two blocks with two streams and three with one."""
    torch.manual_seed(0)
    heads, head_dim = 4, 32
    return Flux2Transformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=3, attention_head_dim=head_dim, num_attention_heads=heads,
        joint_attention_dim=_LAYERS_READ * _TEXT_WIDTH, timestep_guidance_channels=64, mlp_ratio=2.0,
        axes_dims_rope=(8, 8, 8, 8), guidance_embeds=False,
    )  # fmt: skip


def build_qwen3(vocab_size: int) -> Qwen3ForCausalLM:
    """A random, frozen Qwen3, drawn again for the reason that `sd3.build_clip` gives."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size, hidden_size=_TEXT_WIDTH, intermediate_size=_TEXT_WIDTH, num_hidden_layers=28,
            num_attention_heads=2, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(0, 1.0 if "embed_tokens" in name else weight.shape[1] ** -0.5)
    return model.eval().requires_grad_(False)


def assemble(vae: Any) -> Flux2KleinPipeline:
    tokenizer = qwen_tokenizer()
    return Flux2KleinPipeline(
        transformer=build_transformer(), vae=vae, text_encoder=build_qwen3(len(tokenizer)), tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )  # fmt: skip


def _patched(encoded: Tensor) -> Tensor:
    patches: Tensor = Flux2KleinPipeline._patchify_latents(encoded)
    return patches


KLEIN = World(
    name="klein",
    title="FLUX.2 [klein]",
    folder="tiny-world/klein",
    spec="klein.yaml",
    tokens=_TOKENS,
    autoencoder=autoencoder,
    assemble=assemble,
    to_latents=to_latents,
    base_steps=3000,
    teacher_steps={"geneval": 1500, "ocr": 700, "aesthetic": 400},
)
