"""Trains the teachers: a LoRA per task, fine-tuned on neat pictures that its reward likes (a stand-in for RL)."""

import math
import random
from pathlib import Path

import torch
from opd_core.models.adapters import adapter_parameters, adapter_state, add_student_adapter
from opd_core.models.pipeline import load_model
from torch import Tensor, nn

from .. import rewards
from ..scenes import Scene, sample_scene
from .data import draw
from .flow import Captions, flow_matching_loss
from .vae import encode_pictures
from .world import World

RANK, ALPHA = 16, 32
BATCH, PEAK_LR, WARMUP = 64, 1.5e-3, 20
_PICTURES = 9000
_EMA_DECAY = 0.98
_ACCEPTED = {"geneval": 1.0, "ocr": 1.0, "aesthetic": 0.0}


def train_teacher(world: World, task: str, base: Path, folder: Path) -> None:
    """Fine-tune a LoRA of the pipeline in ``base`` on ``task`` and save it with its metadata, fp16."""
    model = load_model(base)
    network, vae = model.transformer.train(), model.pipeline.vae
    add_student_adapter(network, rank=RANK, alpha=ALPHA, target_modules=model.family.targets, seed=0, name="teacher")
    weights: list[Tensor] = [*adapter_parameters(network, "teacher")]
    average = [weight.detach().clone() for weight in weights]
    pictures, prompts = reward_filtered_set(task, _PICTURES, seed=11)
    latents = world.to_latents(vae, encode_pictures(vae, pictures))
    captions = Captions(model, prompts, world.tokens)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(weights, PEAK_LR, weight_decay=1e-4)
    steps = world.teacher_steps[task]
    for step in range(steps):
        for group in optimizer.param_groups:
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            group["lr"] = PEAK_LR * min(1, (step + 1) / WARMUP) * cosine + 1e-5
        picked = torch.randint(len(latents), (BATCH,))
        loss = flow_matching_loss(model, latents[picked], captions.of_with_dropout(picked))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, 1 - _EMA_DECAY)
        if step % 100 == 0:
            print(f"{task} step {step}/{steps} loss {loss.item():.4f}", flush=True)
    with torch.no_grad():
        torch._foreach_copy_(weights, average)
    type(model.pipeline).save_lora_weights(
        folder,
        transformer_lora_layers={key: value.half() for key, value in adapter_state(network, "teacher").items()},
        transformer_lora_adapter_metadata=network.peft_config["teacher"].to_dict(),
    )


def reward_filtered_set(task: str, count: int, seed: int) -> tuple[Tensor, list[str]]:
    """``count`` neat pictures of the task that its own reward accepts, ``[count, 3, 32, 32]`` in -1..1, and prompts."""
    judge = getattr(rewards, task)(torch.device("cpu"))
    rng = random.Random(seed)
    kept: list[Tensor] = []
    scenes: list[Scene] = []
    while len(scenes) < count:
        tried = [sample_scene(task, rng) for _ in range(1000)]
        pictures = draw(tried, rng.randrange(1 << 30), "neat")
        scores = judge(pictures / 2 + 0.5, [s.prompt for s in tried], [{"scene": s.to_json()} for s in tried])
        accepted = torch.nonzero(scores >= _ACCEPTED[task]).flatten()
        kept.append(pictures[accepted])
        scenes += [tried[i] for i in accepted.tolist()]
    return torch.cat(kept)[:count], [scene.prompt for scene in scenes[:count]]
