"""Trains the base: flow matching on messy pictures with partly wrong captions."""

import copy
import math
from pathlib import Path

import torch
from torch import nn

from .data import web_set
from .flow import Captions, encode_pictures, flow_matching_loss
from .models import assemble, build_transformer
from .vae import load_vae

STEPS, BATCH, PEAK_LR, WARMUP = 4000, 48, 1.5e-3, 150
_PICTURES = 24_000
_EMA_DECAY = 0.998


def train_base(folder: Path) -> None:
    """Train a transformer in the latents of the VAE in ``folder/vae`` and save the whole pipeline there, fp16."""
    vae = load_vae(folder / "vae")
    pictures, prompts = web_set(_PICTURES, seed=0)
    latents = encode_pictures(vae, pictures)
    model = build_transformer().train()
    pipeline = assemble(model, vae)
    captions = Captions(pipeline, prompts)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    torch.manual_seed(0)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / STEPS)
            group["lr"] = PEAK_LR * min(1, (step + 1) / WARMUP) * cosine + 1e-5
        picked = torch.randint(len(latents), (BATCH,))
        loss = flow_matching_loss(model, latents[picked], *captions.of_with_dropout(picked))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(_EMA_DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        if step % 200 == 0:
            print(f"base step {step}/{STEPS} loss {loss.item():.4f}", flush=True)
    pipeline.register_modules(transformer=average)
    pipeline.to(torch.float16).save_pretrained(folder)
