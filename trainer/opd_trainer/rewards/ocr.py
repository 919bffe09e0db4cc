"""Text rendering: how near the text that is read comes to the text that was asked for (Flow-GRPO's OCR reward)."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from opd_core.errors import InvalidError
from torch import Tensor

from opd_trainer.rewards.packages import needs
from opd_trainer.rewards.registry import RewardFn

_QUOTES = (r'"([^"]+)"', "\u201c([^\u201d]+)\u201d", "\u2018(.+?)\u2019(?!\\w)", r"(?<!\w)'(.+?)'(?!\w)")

Read = Callable[[np.ndarray[Any, Any]], str]  # image [H, W, 3] uint8 -> text


@needs("rapidocr_onnxruntime", "rapidocr_onnxruntime")
def ocr(device: torch.device) -> RewardFn:
    """Reads with PaddleOCR's models in ONNX, which the package brings along; runs on the CPU."""
    from rapidocr_onnxruntime import RapidOCR

    engine = RapidOCR()

    def read(image: np.ndarray[Any, Any]) -> str:
        found, _ = engine(image)
        return "".join(line[1] for line in found or [])

    return ocr_reward(read)


def ocr_reward(read: Read) -> RewardFn:
    def reward(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        pictures = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        wanted = [wanted_text(prompt, record) for prompt, record in zip(prompts, metadata, strict=True)]
        return torch.tensor([similarity(read(picture), text) for picture, text in zip(pictures, wanted, strict=True)])

    return reward


def wanted_text(prompt: str, metadata: Mapping[str, Any]) -> str:
    """`text` of the prompt's record, or what stands in the prompt's first quotes: double ones wherever they are, as in
    Flow-GRPO, else curly ones, else single ones. An apostrophe, which has a letter before and after it, is no quote.

    Raises:
        InvalidError: neither is there, or it is blank.
    """
    quoted = (re.search(pattern, prompt) for pattern in _QUOTES)
    wanted = str(metadata["text"]) if "text" in metadata else next((match[1] for match in quoted if match), "")
    if not wanted.strip():
        raise InvalidError(f'reward ocr: prompt {prompt!r} has no text in quotes, and its record no "text"')
    return wanted


def similarity(found: str, wanted: str) -> float:
    """1 - edit distance / length of `wanted`, at least 0. Case, spaces and text around the wanted one do not count."""
    found, wanted = ("".join(text.lower().split()) for text in (found, wanted))
    if wanted in found:
        return 1.0
    return max(0.0, 1 - min(edit_distance(found, wanted), len(wanted)) / len(wanted))


def edit_distance(a: str, b: str) -> int:
    """Levenshtein."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]
