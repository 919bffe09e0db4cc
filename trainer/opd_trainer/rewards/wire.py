"""What a reward server is asked and what it answers: JSON with images as PNG, nothing that could run.

POST URL/score   {"reward": name, "images": [{"png": base64, "prompt": text, "metadata": {...}}, ...]}
200              {"scores": [number, ...]}, one for each image, in their order
otherwise        {"error": text}
"""

import base64
import binascii
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MOST_PIXELS = 2**25  # of all images of a question: two of the largest that a spec can ask for
_MESSAGE = 1000  # characters of what a server says


@dataclass(frozen=True, eq=False)
class Question:
    """`images` [N, 3, H, W] in 0..1, with N prompts and N mappings: the arguments of a reward."""

    reward: str
    images: Tensor
    prompts: Sequence[str]
    metadata: Sequence[Mapping[str, Any]]


def write_question(question: Question) -> bytes:
    rows = [
        {"png": base64.b64encode(png(image)).decode(), "prompt": prompt, "metadata": dict(metadata)}
        for image, prompt, metadata in zip(question.images, question.prompts, question.metadata, strict=True)
    ]
    return json.dumps({"reward": question.reward, "images": rows}).encode()


def read_question(content: bytes) -> Question:
    """Raises ValueError: it is none; the words say what is wrong."""
    asked = _read_json(content)
    rows = asked.get("images") if isinstance(asked, dict) else None
    if not isinstance(rows, list) or not rows or not isinstance(asked.get("reward"), str):
        raise ValueError('it needs "reward", a name, and "images", a list of at least one')
    left, images = MOST_PIXELS, []
    for i, row in enumerate(rows):
        if not (
            isinstance(row, dict)
            and isinstance(row.get("png"), str)
            and isinstance(row.get("prompt"), str)
            and isinstance(row.get("metadata"), dict)
        ):
            raise ValueError(f'images[{i}] needs "png" and "prompt", texts, and "metadata", an object')
        try:
            images.append(_read_png(row["png"], left))
        except ValueError as error:
            raise ValueError(f"images[{i}].png: {error}") from error
        if images[i].shape != images[0].shape:
            raise ValueError(f"images[{i}].png has another size than the first; ask for each size by itself")
        left -= images[i].shape[1] * images[i].shape[2]
    return Question(
        asked["reward"], torch.stack(images), [row["prompt"] for row in rows], [row["metadata"] for row in rows]
    )


def read_scores(content: bytes, count: int) -> Tensor:
    """[count] float64. Raises ValueError: not one finite number for each image."""
    answer = _read_json(content)
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        raise ValueError('no "scores" in it')
    if len(scores) != count:
        raise ValueError(f"{len(scores)} scores for {count} images")
    for i, score in enumerate(scores):
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise ValueError(f"score {i} is {printable(repr(score))}, which is no finite number")
    return torch.tensor(scores, dtype=torch.float64)


def read_error(content: bytes) -> str:
    """What a server says is wrong, or the beginning of whatever it says."""
    try:
        answer = _read_json(content)
    except ValueError:
        answer = None
    said = answer.get("error") if isinstance(answer, dict) else None
    return printable(said if isinstance(said, str) else content[: 4 * _MESSAGE].decode(errors="replace"))


def printable(text: str) -> str:
    """Its first thousand characters, with U+FFFD for what a terminal would obey."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text[:_MESSAGE])


def data_url(image: Tensor) -> str:
    """An image [1, 3, H, W] as browsers and chat models take it in a text."""
    return f"data:image/png;base64,{base64.b64encode(png(image[0])).decode()}"


def png(image: Tensor) -> bytes:
    """An image [3, H, W] in 0..1 as a file, of 8 bits a colour."""
    file = io.BytesIO()
    pixels = (image * 255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _read_png(text: str, most_pixels: int) -> Tensor:
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as picture:
            if picture.width * picture.height > most_pixels:
                raise ValueError(f"the images have more than {MOST_PIXELS} pixels")
            pixels = np.array(picture.convert("RGB"))
    except (OSError, SyntaxError, EOFError, binascii.Error, Image.DecompressionBombError) as error:
        raise ValueError(f"no PNG file in base64: {printable(str(error))}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def _read_json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {printable(str(error))}") from error
