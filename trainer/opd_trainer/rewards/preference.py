"""HPSv2.1, a human-preference model in OpenCLIP."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from opd_trainer.rewards.clip import clip_pixels
from opd_trainer.rewards.hub import HPSV2
from opd_trainer.rewards.packages import needs
from opd_trainer.rewards.registry import RewardFn

WEIGHTS = "HPS_v2.1_compressed.pt"


@needs("open_clip", "open_clip_torch")
def hpsv2(device: torch.device) -> RewardFn:
    """HPSv2.1 (Wu et al. 2023): cosine in an OpenCLIP ViT-H/14 tuned on preferences, about 0.28."""
    import open_clip
    from huggingface_hub import hf_hub_download

    weights = hf_hub_download(HPSV2.repo, WEIGHTS, revision=HPSV2.revision)
    return open_clip_reward(open_clip, "ViT-H-14", Path(weights), device)


def open_clip_reward(open_clip: Any, architecture: str, weights: Path, device: torch.device) -> RewardFn:
    """Cosine of image and prompt in an OpenCLIP model; images are prepared as HPSv2 does."""
    model = open_clip.create_model(architecture)
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True)["state_dict"])
    model = model.to(device).eval()
    tokenizer = open_clip.get_tokenizer(architecture)
    size = model.visual.image_size
    side = size[0] if isinstance(size, tuple) else size

    @torch.no_grad()
    def reward(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        pictures = model.encode_image(padded_pixels(images.to(device), side), normalize=True)
        texts = model.encode_text(tokenizer(list(prompts)).to(device), normalize=True)
        scores: Tensor = (pictures * texts).sum(-1)
        return scores

    return reward


def padded_pixels(images: Tensor, size: int) -> Tensor:
    """Images [N, 3, H, W] in 0..1: long side to `size`, the rest black, normalised as for CLIP."""
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    target = (round(height * scale), round(width * scale))
    images = functional.interpolate(images, target, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size - target[0]) // 2, (size - target[1]) // 2
    padded = functional.pad(images, (left, size - target[1] - left, top, size - target[0] - top))
    return clip_pixels(padded, size)
