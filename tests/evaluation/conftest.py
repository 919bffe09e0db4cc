"""A small CLIP in the hub's layout."""

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizerFast, CLIPVisionConfig


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A CLIPModel of four layers with its tokeniser, as from_pretrained finds them on the hub."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *[f"{letter}</w>" for letter in letters]]
    CLIPTokenizerFast(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]).save_pretrained(folder)
    text = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, projection_dim=12, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=12,
    )  # fmt: skip
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    ).save_pretrained(folder)
    return folder
