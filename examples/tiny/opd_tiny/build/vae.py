"""Trains the autoencoder that all worlds have."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional

from .data import neat_set, web_set
from .world import IMAGE_SIZE

STEPS, BATCH, PEAK_LR = 1500, 32, 2e-3
_KL_WEIGHT, _L1_WEIGHT = 2e-4, 0.3


def build_vae() -> AutoencoderKL:
    """An untrained autoencoder, 3x32x32 to 16x8x8."""
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=16, sample_size=IMAGE_SIZE,
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[16, 32, 64], layers_per_block=1, norm_num_groups=8, mid_block_add_attention=False,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.0, shift_factor=0.0,
    )  # fmt: skip


def train_vae(folder: Path) -> float:
    """Train, save to ``folder`` as fp16 and return the reconstruction PSNR in dB on pictures of test glyphs."""
    vae = build_vae().train()
    pictures = torch.cat([web_set(12_000, seed=0)[0], neat_set(6_000, seed=1)])
    optimizer = torch.optim.AdamW(vae.parameters(), PEAK_LR, weight_decay=0.0)
    torch.manual_seed(0)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(1, (step + 1) / 50) * (1 - step / STEPS) + 2e-5
        loss = _loss(vae, pictures[torch.randint(len(pictures), (BATCH,))])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"vae step {step}/{STEPS} loss {loss.item():.4f}", flush=True)
    vae.eval()
    latents = encode_pictures(vae, pictures[:6000])
    # SD3 hands the transformer latents of zero mean and unit variance.
    vae.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
    vae.half().save_pretrained(folder)
    return psnr(load_vae(folder))


def load_vae(folder: Path) -> AutoencoderKL:
    """Load the fp16 weights for computing in float32."""
    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval()


@torch.no_grad()
def encode_pictures(vae: Any, pictures: Tensor) -> Tensor:
    """Pictures ``[N, 3, 32, 32]`` in -1..1 to what the autoencoder takes them for, ``[N, 16, 8, 8]``."""
    return torch.cat([vae.encode(batch).latent_dist.mode() for batch in pictures.split(500)])


@torch.no_grad()
def psnr(vae: AutoencoderKL) -> float:
    """Reconstruction PSNR in dB over 512 web pictures of test glyphs."""
    pictures, _ = web_set(512, seed=99, split="test")
    decoded = vae.decode(vae.encode(pictures).latent_dist.mode()).sample.clamp(-1, 1)
    return float(-10 * torch.log10(functional.mse_loss(decoded / 2, pictures / 2)))


def _loss(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    latent = vae.encode(pictures).latent_dist
    decoded = vae.decode(latent.mean + latent.std * torch.randn_like(latent.mean)).sample
    kl = 0.5 * (latent.mean.square() + latent.var - 1 - latent.logvar).mean()
    mse, l1 = functional.mse_loss(decoded, pictures), functional.l1_loss(decoded, pictures)
    loss: Tensor = mse + _L1_WEIGHT * l1 + _KL_WEIGHT * kl
    return loss
