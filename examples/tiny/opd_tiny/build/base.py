"""Trains the base: flow matching on messy pictures with partly wrong captions."""

import copy
import math
from pathlib import Path

import torch
from opd_core.models.pipeline import load_model
from torch import nn

from .data import web_set
from .flow import Captions, flow_matching_loss
from .vae import encode_pictures, load_vae
from .world import World

BATCH, PEAK_LR, WARMUP = 48, 1.5e-3, 150
_PICTURES = 24_000
_EMA_DECAY = 0.998


def train_base(world: World, vae: Path, folder: Path) -> None:
    """Train the world's transformer in the latents of ``vae`` and save the whole pipeline to ``folder``, fp16."""
    pictures, prompts = web_set(_PICTURES, seed=0)
    autoencoder = world.autoencoder(load_vae(vae), pictures[:6000])
    latents = world.to_latents(autoencoder, encode_pictures(autoencoder, pictures))
    world.assemble(autoencoder).save_pretrained(folder)
    model = load_model(folder)
    captions = Captions(model, prompts, world.tokens)
    network = model.transformer.train().requires_grad_(True)
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    torch.manual_seed(0)
    steps = world.base_steps
    for step in range(steps):
        for group in optimizer.param_groups:
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            group["lr"] = PEAK_LR * min(1, (step + 1) / WARMUP) * cosine + 1e-5
        picked = torch.randint(len(latents), (BATCH,))
        loss = flow_matching_loss(model, latents[picked], captions.of_with_dropout(picked))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        decay = min(_EMA_DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
        if step % 200 == 0:
            print(f"base step {step}/{steps} loss {loss.item():.4f}", flush=True)
    model.pipeline.register_modules(transformer=average)
    model.pipeline.to(torch.float16).save_pretrained(folder)
