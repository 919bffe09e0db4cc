"""The three rewards, each 0..1 and higher is better, as factories for the reward registry.

A reward takes pictures ``[N, 3, H, W]`` float32 in 0..1, their prompts and their prompt records' metadata, and answers
``[N]`` float32 on the CPU. ``geneval`` and ``ocr`` read the wanted scene from ``metadata["scene"]``.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .detector import detect
from .reader import read_digits
from .scenes import Scene

RewardFn = Callable[[Tensor, Sequence[str], Sequence[Mapping[str, Any]]], Tensor]

_MIN_OFFSET = 6.0
"""Pixels by which one digit must lie above (below, ...) the other."""


def geneval(device: torch.device) -> RewardFn:
    """Composition: the share of met conditions on count, colour, digit and place. Computed on the CPU."""
    return partial(_score_scenes, _composition)


def ocr(device: torch.device) -> RewardFn:
    """Text: 1 - edit distance / length of the digits read from left to right. Computed on the CPU."""
    return partial(_score_scenes, _text)


def aesthetic(device: torch.device) -> RewardFn:
    """Beauty of a sort: colourfulness x contrast x smoothness, blind to the prompt."""

    def score(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        return _beauty(images.to(device, torch.float32)).cpu()

    return score


def _score_scenes(
    judge: Callable[[NDArray[np.float32], Scene], float],
    images: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
) -> Tensor:
    pictures = images.detach().float().cpu().permute(0, 2, 3, 1).numpy()
    scenes = [Scene.from_json(m["scene"]) for m in metadata]
    return torch.tensor([judge(p, s) for p, s in zip(pictures, scenes, strict=True)], dtype=torch.float32)


def _composition(picture: NDArray[np.float32], scene: Scene) -> float:
    found = detect(picture)
    digits = read_digits([f.crop for f in found])
    seen = [(f.colour, d) for f, d in zip(found, digits, strict=True)]
    wanted = [(o.colour, o.digit) for o in scene.objects]
    right_count = float(len(found) == len(wanted))
    if scene.kind != "relation":
        colour, digit = wanted[0]
        right_colours = min(1.0, sum(c == colour for c, _ in seen) / len(wanted))
        right_digits = min(1.0, sum(d == digit for _, d in seen) / len(wanted))
        return (right_count + right_colours + right_digits) / 3

    firsts = [f for f, s in zip(found, seen, strict=True) if s == wanted[0]]
    seconds = [f for f, s in zip(found, seen, strict=True) if s == wanted[1]]
    in_place = any(
        a is not b and _offset(a.row, a.column, b.row, b.column, scene.relation) > _MIN_OFFSET
        for a in firsts
        for b in seconds
    )
    return (right_count + bool(firsts) + bool(seconds) + in_place) / 4


def _offset(row: float, column: float, other_row: float, other_column: float, relation: str | None) -> float:
    """How far the first digit lies in the direction of ``relation`` from the other, in pixels."""
    match relation:
        case "above":
            return other_row - row
        case "below":
            return row - other_row
        case "left of":
            return other_column - column
        case _:
            return column - other_column


def _text(picture: NDArray[np.float32], scene: Scene) -> float:
    found = sorted(detect(picture), key=lambda f: f.column)
    wanted = [o.digit for o in scene.objects]
    return max(0.0, 1 - _edit_distance(read_digits([f.crop for f in found]), wanted) / len(wanted))


def _edit_distance(left: Sequence[int], right: Sequence[int]) -> int:
    """Levenshtein distance."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def _beauty(images: Tensor) -> Tensor:
    """Each factor is 0..1: Hasler and Suesstrunk's colourfulness (2003), contrast of luminance, little Laplacian."""
    red, green, blue = images.unbind(1)
    axes = torch.stack([red - green, (red + green) / 2 - blue], 1).flatten(2)
    colourfulness = axes.var(2).sum(1).sqrt() + 0.3 * axes.mean(2).norm(dim=1)
    luminance = 0.3 * red + 0.59 * green + 0.11 * blue
    middle = luminance[:, 1:-1, 1:-1]
    neighbours = luminance[:, :-2, 1:-1] + luminance[:, 2:, 1:-1] + luminance[:, 1:-1, :-2] + luminance[:, 1:-1, 2:]
    roughness = (4 * middle - neighbours).abs().flatten(1).mean(1)
    factors = [
        1 - torch.exp(-colourfulness / 0.22),
        1 - torch.exp(-luminance.flatten(1).std(1) / 0.12),
        torch.exp(-roughness / 0.25),
    ]
    return torch.stack(factors, 1).prod(1)
