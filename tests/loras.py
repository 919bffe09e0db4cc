"""LoRA files of random numbers, for tests and benchmarks."""

from collections.abc import Mapping
from pathlib import Path

import torch
from opd_core.models.adapters import lora_config, write_adapter
from opd_core.models.pairs import FOLDERS, split
from safetensors.torch import load_file, save_file


def random_lora(
    folder: Path,
    linear: Mapping[str, tuple[int, int]],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    *,
    seed: int,
    rslora: bool = False,
    std: float = 0.1,
) -> Path:
    """The file of a LoRA with these ranks and alphas by layer. `linear`: (outputs, inputs) by layer."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for layer, rank in ranks.items():
        outputs, inputs = linear[layer]
        state[f"{layer}.lora_A.weight"] = std * torch.randn(rank, inputs, generator=generator)
        state[f"{layer}.lora_B.weight"] = std * torch.randn(outputs, rank, generator=generator)
    return write_adapter(folder, state, lora_config(ranks, alphas, rslora=rslora))


def as_kohya(file: Path, alpha: float) -> None:
    """Writes a LoRA of one alpha anew, as kohya's school does: other names of layers, the alpha beside each. In the place
    of one of two networks come two files in its folder."""
    networks = split(load_file(file))
    file.unlink()
    for network, named in networks.items():
        state = {
            f"lora_unet_{key.partition('.lora_')[0].replace('.', '_')}"
            f".lora_{'down' if '.lora_A.' in key else 'up'}.weight": value
            for key, value in named.items()
        }
        state |= {f"{key.partition('.lora_')[0]}.alpha": torch.tensor(alpha) for key in state}
        save_file(state, file if len(networks) == 1 else file.with_name(f"{FOLDERS[network]}_model.safetensors"))
