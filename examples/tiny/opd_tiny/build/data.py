"""Captioned pictures for training, drawn on demand from a seed."""

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..glyphs import Split
from ..render import Style, render
from ..scenes import TASKS, Scene, corrupt, sample_scene

CAPTION_NOISE = 0.4
"""Share of web pictures that do not show what their caption says."""


def draw(scenes: Sequence[Scene], seed: int, style: Style, split: Split = "train") -> Tensor:
    """Pictures ``[N, 3, 32, 32]`` in -1..1."""
    rng = random.Random(seed)
    pictures = np.stack([render(scene, rng, style, split) for scene in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous() * 2 - 1


def web_set(count: int, seed: int, split: Split = "train") -> tuple[Tensor, list[str]]:
    """Messy pictures of all tasks' scenes with their captions, of which :data:`CAPTION_NOISE` are wrong."""
    rng = random.Random(seed)
    scenes = [sample_scene(rng.choice(TASKS), rng) for _ in range(count)]
    shown = [corrupt(s, rng) if rng.random() < CAPTION_NOISE else s for s in scenes]
    return draw(shown, seed, "web", split), [s.prompt for s in scenes]


def neat_set(count: int, seed: int) -> Tensor:
    """Neat pictures of all tasks' scenes."""
    rng = random.Random(seed)
    return draw([sample_scene(rng.choice(TASKS), rng) for _ in range(count)], seed, "neat")
