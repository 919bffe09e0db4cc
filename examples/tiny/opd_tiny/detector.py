"""Finds the digits of a picture: background by row, connected components, colour and place of each."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .glyphs import resize
from .scenes import COLOURS

CROP = 16
_CONTRAST = 0.3
_MIN_AREA = 10
_HUES = {name: (np.array(rgb) - min(rgb)) / (max(rgb) - min(rgb)) for name, rgb in COLOURS.items()}


@dataclass(frozen=True)
class Found:
    """A component: its ink fitted to ``[CROP, CROP]``, colour (None when greyish) and centre in pixels."""

    crop: NDArray[np.float32]
    colour: str | None
    row: float
    column: float


def detect(picture: NDArray[np.float32]) -> list[Found]:
    """The components of ``picture`` (``[H, W, 3]`` in 0..1) that stand out from the row's background."""
    border = np.concatenate([picture[:, :2], picture[:, -2:]], axis=1)
    # The median over neighbouring rows keeps a digit that touches the border from passing for background.
    ground = ndimage.median_filter(np.median(border, axis=1), size=(9, 1), mode="nearest")
    contrast = np.abs(picture - ground[:, None]).max(-1)
    ink = contrast > _CONTRAST
    # One dilation joins strokes that a pixel separates.
    labels, _ = ndimage.label(ndimage.binary_dilation(ink), np.ones((3, 3)))
    found = []
    for label, window in enumerate(ndimage.find_objects(labels), start=1):
        inside = labels[window] == label
        strong = inside & ink[window]
        if strong.sum() < _MIN_AREA:
            continue
        rows, columns = np.where(strong)
        local = (contrast[window] * inside)[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        core = strong & (contrast[window] >= np.quantile(contrast[window][strong], 0.6))
        found.append(
            Found(
                crop=_fit_crop(local),
                colour=_colour(picture[window][core].mean(0)),
                row=float(window[0].start + rows.mean()),
                column=float(window[1].start + columns.mean()),
            )
        )
    return found


def _fit_crop(ink: NDArray[np.float32]) -> NDArray[np.float32]:
    scale = (CROP - 2) / max(ink.shape)
    height, width = (max(1, round(n * scale)) for n in ink.shape)
    fitted = np.zeros((CROP, CROP), np.float32)
    top, left = (CROP - height) // 2, (CROP - width) // 2
    fitted[top : top + height, left : left + width] = resize(np.ascontiguousarray(ink, np.float32), height, width)
    return fitted / max(float(fitted.max()), 1e-3)


def _colour(rgb: NDArray[np.float32]) -> str | None:
    low, high = float(rgb.min()), float(rgb.max())
    if high - low <= 0.35 * max(high, 0.3):
        return None
    hue = (rgb - low) / (high - low)
    return min(_HUES, key=lambda name: float(np.abs(_HUES[name] - hue).sum()))
