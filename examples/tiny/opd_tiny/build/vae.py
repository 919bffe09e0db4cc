"""Trains the autoencoder."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional

from .data import neat_set, web_set
from .models import build_vae

STEPS, BATCH, PEAK_LR = 1500, 32, 2e-3
_KL_WEIGHT, _L1_WEIGHT = 2e-4, 0.3


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
    with torch.no_grad():
        latents = torch.cat([vae.encode(b).latent_dist.mode() for b in pictures[:6000].split(500)])
    # SD3 hands the transformer latents of zero mean and unit variance.
    vae.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
    vae.half().save_pretrained(folder)
    return psnr(load_vae(folder))


def load_vae(folder: Path) -> AutoencoderKL:
    """Load the fp16 weights for computing in float32."""
    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval()


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
