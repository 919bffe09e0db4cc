"""Rewards for tests of the servers, which name them `tests.evaluation.strange_rewards:...`."""

import os
import time
from pathlib import Path

import torch
from opd_core.errors import InvalidError

_inside = 0


def _brightness(images, prompts, metadata):
    return images.mean((1, 2, 3)) + torch.tensor([float(record.get("more", 0)) for record in metadata])


def brightness(device):
    """Mean of an image, and `more` of its record."""
    return _brightness


def stuck(device):
    """Brightness, which the process with $STUCK never finishes: it makes that file and waits."""

    def reward(images, prompts, metadata):
        if "STUCK" in os.environ:
            Path(os.environ["STUCK"]).touch()
            time.sleep(600)
        return _brightness(images, prompts, metadata)

    return reward


def held(device):
    """Brightness: it makes the file $STUCK, and goes on when it is gone again."""

    def reward(images, prompts, metadata):
        Path(os.environ["STUCK"]).touch()
        while Path(os.environ["STUCK"]).exists():
            time.sleep(0.01)
        return _brightness(images, prompts, metadata)

    return reward


def alone(device):
    """Fails where it, or another one of its kind, is computed in the same process already."""

    def reward(images, prompts, metadata):
        global _inside
        _inside += 1
        time.sleep(0.02)
        if _inside > 1:
            raise RuntimeError("two at once")
        _inside -= 1
        return _brightness(images, prompts, metadata)

    return reward


also_alone = alone


def nan(device):
    return lambda images, prompts, metadata: torch.full([len(images)], float("nan"))


def broken(device):
    def reward(images, prompts, metadata):
        raise RuntimeError("CUDA error: an illegal memory access\x1b[31m was encountered")

    return reward


def picky(device):
    def reward(images, prompts, metadata):
        raise InvalidError(f"reward picky: prompt {prompts[0]!r} has no text in quotes")

    return reward
