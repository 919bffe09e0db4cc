"""LoRAs of the tiny base as PEFT and diffusers make and load them, beside ours."""

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from opd_core.models.adapter_file import read_teacher
from opd_core.models.adapters import load_adapter, use_adapter
from opd_core.models.pipeline import load_model
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

ATTENTION = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def base(tiny_base: Path) -> Any:
    return load_model(tiny_base, parts={"transformer"}).transformer


@torch.no_grad()
def velocity(transformer: Any) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    config = transformer.config
    answer: torch.Tensor = transformer(
        hidden_states=torch.randn(2, config.in_channels, 8, 8, generator=g), timestep=torch.tensor([900.0, 300.0]),
        encoder_hidden_states=torch.randn(2, 5, config.joint_attention_dim, generator=g),
        pooled_projections=torch.randn(2, config.pooled_projection_dim, generator=g), return_dict=False,
    )[0]  # fmt: skip
    return answer


def tensors(model: Any) -> dict[str, torch.Tensor]:
    """Of the LoRA, by PEFT's key relative to the transformer."""
    state = get_peft_model_state_dict(model)
    return {key.removeprefix("base_model.model."): value for key, value in state.items()}


def ours(tiny_base: Path, path: Path, alpha: float | None = None) -> torch.Tensor:
    transformer = base(tiny_base)
    load_adapter(transformer, read_teacher(path, alpha), "ocr")
    use_adapter(transformer, "ocr")
    return velocity(transformer)


def theirs(tiny_base: Path, path: Path) -> torch.Tensor:
    """As diffusers loads the file for a pipeline."""
    transformer = base(tiny_base)
    state, metadata = StableDiffusion3Pipeline.lora_state_dict(str(path), return_lora_metadata=True)
    StableDiffusion3Pipeline.load_lora_into_transformer(state, transformer, adapter_name="ocr", metadata=metadata)
    return velocity(transformer)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).abs().max()) == 0


def save_trained(tiny_base: Path, folder: Path, **options: Any) -> Any:
    """A PEFT model whose every number is trained; saved to `folder` by save_pretrained."""
    torch.manual_seed(3)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, **options}
    model = get_peft_model(base(tiny_base), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return model
