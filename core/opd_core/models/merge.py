"""The mean of several LoRAs as one LoRA: a student that starts from it has something of every teacher."""

from collections.abc import Sequence
from pathlib import Path

import torch

from opd_core.artifacts import WEIGHTS
from opd_core.errors import InvalidError
from opd_core.imports import without_collection
from opd_core.models.adapter_file import AdapterFile, mean_alpha
from opd_core.models.adapters import lora_config, read_adapter, write_adapter

with without_collection():
    from peft import LoraConfig


def merge(adapters: Sequence[AdapterFile], directory: Path) -> LoraConfig:
    """Write the LoRA whose change of every layer is the mean of those of `adapters`; exact, since their ranks add up.
    All name layers as diffusers does (`adapter_layers.named`).

    Each changes a layer by s_i B_i A_i, with the scale s_i = alpha_i / r_i. The result stacks the A_i and puts the B_i
    side by side, times s_i / (N s), under its own scale s: the first one's, so that its numbers are of the size of a
    LoRA that was trained.

    Raises:
        InvalidError: fewer than two, two that change different layers or layers of different shape, or a directory
            that holds an adapter already.
    """
    if (directory / WEIGHTS).exists():
        raise InvalidError(f"{directory} holds an adapter already; name another folder")
    if len(adapters) < 2:
        raise InvalidError("one adapter has no mean with others; name two or more")
    first = adapters[0]
    for other in adapters[1:]:
        _check_alike(first, other)
    states = [read_adapter(adapter) for adapter in adapters]
    merged: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for layer in first.layers:
        rank = ranks[layer] = sum(adapter.rank(layer) for adapter in adapters)
        alpha = alphas[layer] = mean_alpha(first.scale(layer), rank)
        shares = [adapter.scale(layer) * rank / alpha / len(adapters) for adapter in adapters]
        a, b = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
        merged[a] = torch.cat([state[a].float() for state in states], dim=0)
        parts = [share * state[b].float() for share, state in zip(shares, states, strict=True)]
        merged[b] = torch.cat(parts, dim=1)
    config = lora_config(ranks, alphas)
    write_adapter(directory, merged, config)
    return config


def _check_alike(first: AdapterFile, other: AdapterFile) -> None:
    """The same layers, and the same sizes of them."""
    if missing := sorted(first.shapes.keys() ^ other.shapes.keys()):
        raise InvalidError(
            f"{first.file} and {other.file} do not change the same layers: only one of them has {missing[0]}"
        )
    for key, shape in first.shapes.items():
        size = 1 if ".lora_A." in key else 0  # the other one is the rank
        if shape[size] != other.shapes[key][size]:
            raise InvalidError(
                f"{key} is {shape} in {first.file} and {other.shapes[key]} in {other.file}; are they for one base?"
            )
