"""The LAION aesthetic predictor: an MLP on CLIP ViT-L/14 image embeddings, 1..10."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPModel

from opd_trainer.rewards.clip import clip_pixels, image_embedding
from opd_trainer.rewards.hub import AESTHETIC_HEAD, CLIP_L, Hub
from opd_trainer.rewards.registry import RewardFn

HEAD = "aesthetic-model.pth"


def aesthetic(device: torch.device) -> RewardFn:
    """The predictor of LAION-Aesthetics V2; blind to the prompt."""
    from huggingface_hub import hf_hub_download

    head = hf_hub_download(AESTHETIC_HEAD.repo, HEAD, revision=AESTHETIC_HEAD.revision)
    return aesthetic_reward(CLIP_L, Path(head), device)


def aesthetic_reward(clip: Hub, head_file: Path, device: torch.device) -> RewardFn:
    model = CLIPModel.from_pretrained(clip.repo, revision=clip.revision).to(device).eval()
    head = predictor(model.config.projection_dim).to(device).eval()
    state = torch.load(head_file, map_location=device, weights_only=True)
    head.load_state_dict({key.removeprefix("layers."): value for key, value in state.items()})

    @torch.no_grad()
    def reward(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        pixels = clip_pixels(images.to(device), model.config.vision_config.image_size)
        scores: Tensor = head(image_embedding(model, pixels)).squeeze(-1)
        return scores

    return reward


def predictor(size: int) -> nn.Sequential:
    """The published shape; dropout keeps the numbering of its layers."""
    return nn.Sequential(
        nn.Linear(size, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2),
        nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
    )  # fmt: skip
