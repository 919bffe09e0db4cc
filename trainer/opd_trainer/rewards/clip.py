"""Rewards that compare an image with its prompt in a CLIP space: CLIPScore and PickScore.

Both give what the paper's table gives: the cosine for CLIPScore (about 0.3), the scaled logit for PickScore (about 22).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, CLIPModel

from opd_trainer.rewards.hub import CLIP_H, CLIP_L, PICKSCORE, Hub
from opd_trainer.rewards.registry import RewardFn

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def clipscore(device: torch.device) -> RewardFn:
    """Cosine of image and prompt in CLIP ViT-L/14 (Hessel et al. 2021, without its factor 2.5)."""
    return clip_reward(CLIP_L, CLIP_L, device, lambda model: 1.0)


def pickscore(device: torch.device) -> RewardFn:
    """PickScore (Kirstain et al. 2023): a CLIP ViT-H/14 tuned on what people preferred; the scaled logit."""
    return clip_reward(PICKSCORE, CLIP_H, device, lambda model: float(model.logit_scale.detach().exp()))


def clip_reward(weights: Hub, tokens: Hub, device: torch.device, scale_of: Callable[[CLIPModel], float]) -> RewardFn:
    """Scale times the cosine of image and prompt; `tokens`: whose tokeniser."""
    model = CLIPModel.from_pretrained(weights.repo, revision=weights.revision).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(tokens.repo, revision=tokens.revision)
    scale, size = scale_of(model), model.config.vision_config.image_size
    length = model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def reward(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        words = tokenizer(list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        text = model.text_projection(model.text_model(**words.to(device)).pooler_output)
        pictures = image_embedding(model, clip_pixels(images.to(device), size))
        return scale * (functional.normalize(text, dim=-1) * pictures).sum(-1)

    return reward


def image_embedding(model: CLIPModel, pixels: Tensor) -> Tensor:
    """Unit vectors [N, D] of prepared pixels."""
    return functional.normalize(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output), dim=-1)


def clip_pixels(images: Tensor, size: int) -> Tensor:
    """Images [N, 3, H, W] in 0..1 as CLIP wants them: short side to `size`, centre crop, normalised."""
    height, width = images.shape[-2:]
    short = min(height, width)
    target = (size * height // short, size * width // short)
    images = functional.interpolate(images, target, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    cropped = images[..., top : top + size, left : left + size]
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (cropped - mean) / std
