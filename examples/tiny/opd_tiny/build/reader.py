"""Trains the digit reader on what the detector cuts out of drawn scenes."""

import random

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from ..detector import detect
from ..glyphs import Split
from ..reader import WEIGHTS, build_reader, load_reader
from ..render import render
from ..scenes import TASKS, Scene, sample_scene

STEPS, BATCH, PEAK_LR = 1500, 128, 2e-3


def train_reader() -> float:
    """Train, write the fp16 weights into the package and return the accuracy on test glyphs."""
    crops, digits = labelled_crops(20_000, "train", seed=1)
    torch.manual_seed(0)
    reader = build_reader()
    optimizer = torch.optim.AdamW(reader.parameters(), PEAK_LR, weight_decay=0.02)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * (1 - step / STEPS)
        picked = torch.randint(len(crops), (BATCH,))
        noisy = crops[picked] + 0.05 * torch.randn(BATCH, *crops.shape[1:])
        loss = functional.cross_entropy(reader(noisy), digits[picked], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_file({name: weight.half() for name, weight in reader.state_dict().items()}, WEIGHTS)
    load_reader.cache_clear()
    return accuracy()


@torch.no_grad()
def accuracy(count: int = 2000) -> float:
    """Share of ``count`` digits drawn with test glyphs, in all styles, that the saved reader reads correctly."""
    crops, digits = labelled_crops(count, "test", seed=2)
    return float((load_reader()(crops).argmax(1) == digits).float().mean())


def labelled_crops(count: int, split: Split, seed: int) -> tuple[Tensor, Tensor]:
    """``[count, 1, 16, 16]`` crops and their digits, from scenes where the detector finds every digit."""
    rng = random.Random(seed)
    crops: list[Tensor] = []
    digits: list[int] = []
    while len(crops) < count:
        scene = sample_scene(rng.choice(TASKS), rng)
        found = detect(render(scene, rng, rng.choice(["web", "neat"]), split))
        if len(found) != len(scene.objects):
            continue
        vertical = scene.relation in ("above", "below")
        found.sort(key=lambda f: f.row if vertical else f.column)
        crops += [torch.from_numpy(f.crop) for f in found]
        digits += _in_reading_order(scene)
    return torch.stack(crops)[:count, None], torch.tensor(digits)[:count]


def _in_reading_order(scene: Scene) -> list[int]:
    order = scene.objects[::-1] if scene.relation in ("below", "right of") else scene.objects
    return [o.digit for o in order]
