"""ImageReward (Xu et al. 2023, arXiv 2304.05977): BLIP's encoders and an MLP, tuned on what people preferred.

Its own package needs a transformers of 2023; these are its published weights in today's BLIP.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, BlipTextConfig, BlipVisionConfig, PreTrainedTokenizerBase
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from opd_trainer.rewards.aesthetic import predictor
from opd_trainer.rewards.clip import clip_pixels
from opd_trainer.rewards.hub import BERT, IMAGE_REWARD
from opd_trainer.rewards.registry import RewardFn

WEIGHTS = "ImageReward.pt"
_TOKENS = 35  # of a prompt; the rest is cut, as published
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of the network's raw scores on the authors' data
_HEAD = 64  # width of an attention head, of images and texts alike
_VISION = {  # the published names in transformers' words
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "blocks": "encoder.layers",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "norm": "post_layernorm",
}


def image_reward(device: torch.device) -> RewardFn:
    """ImageReward 1.0: about -2 to 2, with mean 0 and deviation 1 on the authors' data."""
    from huggingface_hub import hf_hub_download

    weights = hf_hub_download(IMAGE_REWARD.repo, WEIGHTS, revision=IMAGE_REWARD.revision)
    state = torch.load(weights, map_location="cpu", weights_only=True)
    return blip_reward(state, AutoTokenizer.from_pretrained(BERT.repo, revision=BERT.revision), device)


def blip_reward(state: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase, device: torch.device) -> RewardFn:
    """The score of `state`, the published file's tensors, whatever their sizes: the image attends to itself, the prompt
    to itself and the image, and the MLP reads the prompt's first position."""
    seen, read = _part(state, "blip.visual_encoder."), _part(state, "blip.text_encoder.")
    eyes, reader = vision(seen).to(device).eval(), text(read).to(device).eval()
    head = predictor(reader.config.hidden_size).to(device).eval()
    head.load_state_dict(_part(state, "mlp.layers."))
    size = eyes.config.image_size

    @torch.no_grad()
    def reward(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        words = tokenizer(list(prompts), padding=True, truncation=True, max_length=_TOKENS, return_tensors="pt")
        pictures = eyes(pixel_values=clip_pixels(images.to(device), size)).last_hidden_state
        states = reader(
            input_ids=words["input_ids"].to(device),
            attention_mask=words["attention_mask"].to(device),
            encoder_hidden_states=pictures,
            is_decoder=False,  # every word sees every word
        ).last_hidden_state
        scores: Tensor = (head(states[:, 0]).squeeze(-1) - _MEAN) / _STD
        return scores

    return reward


def vision(state: Mapping[str, Tensor]) -> BlipVisionModel:
    """The image encoder with its published weights."""
    _, positions, width = state["pos_embed"].shape
    patch = state["patch_embed.proj.weight"].shape[-1]
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=state["blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_depth(state, "blocks."),
        num_attention_heads=width // _HEAD,
        image_size=round((positions - 1) ** 0.5) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    model = BlipVisionModel(config)
    model.load_state_dict({_renamed(key): value for key, value in state.items()})
    return model


def text(state: Mapping[str, Tensor]) -> BlipTextModel:
    """The text encoder with its published weights; its names are transformers' own."""
    vocabulary, width = state["embeddings.word_embeddings.weight"].shape
    config = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=state["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=state["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_depth(state, "encoder.layer."),
        num_attention_heads=width // _HEAD,
        max_position_embeddings=state["embeddings.position_embeddings.weight"].shape[0],
        layer_norm_eps=1e-12,
        is_decoder=True,  # which is what transformers calls a layer that attends to images
    )
    model = BlipTextModel(config, add_pooling_layer=False)
    model.load_state_dict({key: value for key, value in state.items() if key != "embeddings.position_ids"})
    return model


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({key.removeprefix(prefix).partition(".")[0] for key in state if key.startswith(prefix)})


def _renamed(key: str) -> str:
    """blocks.3.attn.qkv.weight: encoder.layers.3.self_attn.qkv.weight."""
    for old, new in _VISION.items():
        if f".{old}." in f".{key}.":
            key = f".{key}.".replace(f".{old}.", f".{new}.").strip(".")
    return key
