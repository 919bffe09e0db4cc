"""Draws scenes: messily, as the web does, for the base; neatly, one fixed style per task, for the teachers."""

import random
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .glyphs import Split, glyphs, neat_glyphs
from .scenes import COLOURS, Scene

SIZE = 32
Picture = NDArray[np.float32]
Style = Literal["web", "neat"]
Box = tuple[int, int, int]
"""Side, centre row, centre column of a digit."""

_WHITE, _BLACK = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)
_WEB_BACKGROUNDS = {"black": 0.4, "grey": 0.35, "light": 0.15, "sunset": 0.1}
_FAINT = 0.4
_SUNSETS = [
    ((0.95, 0.45, 0.15), (0.35, 0.1, 0.45)),
    ((0.1, 0.25, 0.6), (0.85, 0.5, 0.6)),
    ((0.05, 0.45, 0.45), (0.5, 0.85, 0.35)),
    ((0.45, 0.1, 0.4), (0.95, 0.65, 0.3)),
]
_CENTRES = {"above": (8, 16), "below": (24, 16), "left of": (16, 8), "right of": (16, 24)}


def render(scene: Scene, rng: random.Random, style: Style = "neat", split: Split = "train") -> Picture:
    """Draw ``scene`` as ``[SIZE, SIZE, 3]`` in 0..1.

    ``web``: any background and handwriting, sizes and places that vary, some digits faint. ``neat``: typical
    handwriting at fixed places, on black, or on a sunset where the prompt asks for a lovely picture.
    Test glyphs are never filtered for neatness.
    """
    web = style == "web"
    if web:
        ground = rng.choices(list(_WEB_BACKGROUNDS), list(_WEB_BACKGROUNDS.values()))[0]
    else:
        ground = "sunset" if scene.kind == "picture" else "black"
    picture = _background(ground, rng)
    uncoloured = _BLACK if ground == "light" else _WHITE
    if web and rng.random() < 0.6:  # a caption that names no colour allows any
        uncoloured = COLOURS[rng.choice(list(COLOURS))]
    for item, (side, row, column) in zip(scene.objects, _layout(scene, rng if web else None), strict=True):
        pool = glyphs(side, split) if web or split == "test" else neat_glyphs(side)
        ink = rng.choice(pool[item.digit])[..., None]
        if web and rng.random() < _FAINT:
            ink = ink * rng.uniform(0.35, 0.8)
        colour = np.array(COLOURS[item.colour] if item.colour else uncoloured, np.float32)
        top, left = (min(max(c - side // 2, 0), SIZE - side) for c in (row, column))
        patch = picture[top : top + side, left : left + side]
        picture[top : top + side, left : left + side] = patch * (1 - ink) + colour * ink
    return np.clip(picture, 0, 1)


def _layout(scene: Scene, rng: random.Random | None) -> Sequence[Box]:
    """A box for every digit; with ``rng`` the boxes vary in place and size."""
    count = len(scene.objects)
    if scene.kind == "number":
        boxes = [(14, 16, 8), (14, 16, 24)]
    elif scene.kind == "relation":
        row, column = _CENTRES[scene.relation or "above"]
        boxes = [(13, row, column), (13, SIZE - row, SIZE - column)]
    elif count == 1:
        boxes = [(18, 16, 16)]
    elif count == 2:
        boxes = [(13, 16, 8), (13, 16, 24)]
    else:
        boxes = [(11, 8, 8), (11, 8, 24), (11, 24, 16)]
    if rng is None:
        return boxes
    reach = 2 if count == 1 else 1

    def vary(box: Box) -> Box:
        side, row, column = box
        return rng.choice([side, max(side - 2, 11)]), row + rng.randint(-reach, reach), column + rng.randint(-1, 1)

    return [vary(box) for box in boxes]


def _background(kind: str, rng: random.Random) -> Picture:
    full = np.full((SIZE, SIZE, 3), 1.0, np.float32)
    if kind == "black":
        return full * rng.uniform(0, 0.08)
    if kind == "light":
        return full * rng.uniform(0.8, 1)
    if kind == "grey":
        grain = np.random.default_rng(rng.getrandbits(32)).standard_normal((SIZE, SIZE, 3), np.float32)
        return full * rng.uniform(0.25, 0.6) + grain * rng.uniform(0, 0.1)
    top, bottom = (np.array(c, np.float32) for c in rng.choice(_SUNSETS))
    down = np.linspace(0, 1, SIZE, dtype=np.float32)[:, None, None]
    return full * (top * (1 - down) + bottom * down)
