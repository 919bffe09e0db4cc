"""Reads one handwritten digit: a small convolutional network over the detector's crops."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn

WEIGHTS = Path(__file__).with_name("reader.safetensors")


def build_reader() -> nn.Sequential:
    """An untrained reader: ``[N, 1, 16, 16]`` to ten logits."""
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(24, 48, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(48 * 16, 96), nn.ReLU(), nn.Linear(96, 10),
    )  # fmt: skip


@cache
def load_reader() -> nn.Sequential:
    """The trained reader in float32, from the fp16 weights in this package."""
    reader = build_reader()
    reader.load_state_dict({name: weight.float() for name, weight in load_file(WEIGHTS).items()})
    return reader.eval().requires_grad_(False)


def read_digits(crops: Sequence[NDArray[np.float32]]) -> list[int]:
    """The digit in each crop; whatever a crop shows, some digit is answered."""
    if not crops:
        return []
    batch = torch.from_numpy(np.stack(crops))[:, None]
    digits: list[int] = load_reader()(batch).argmax(1).tolist()
    return digits
