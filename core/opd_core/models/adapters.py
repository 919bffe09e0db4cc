"""LoRA adapters: read and checked before they touch a model, switched without touching what is trainable."""

import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from opd_core.artifacts import WEIGHTS
from opd_core.errors import InvalidError
from opd_core.imports import without_collection
from opd_core.models.adapter_file import METADATA, AdapterFile, matches, unknown_targets
from opd_core.models.adapter_layers import fit
from opd_core.models.headers import sort_metadata
from opd_core.models.pairs import HIGH, joined, narrowed, split

with without_collection():
    from diffusers.loaders.peft import PeftAdapterMixin
    from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer


def load_adapter(transformer: nn.Module, adapter: AdapterFile, name: str) -> LoraConfig:
    """Add a frozen LoRA to `transformer` as adapter `name`.

    Raises:
        InvalidError: a target or a shape that does not fit the transformer, or numbers that are not finite. The
            transformer is unchanged then.
    """
    adapter = fit(adapter, model_layers(transformer))
    state = read_adapter(adapter)
    ranks = {layer: adapter.rank(layer) for layer in adapter.layers}
    config = lora_config(ranks, adapter.alphas, rslora=adapter.rslora)
    _add(transformer, config, name)
    set_peft_model_state_dict(transformer, state, adapter_name=name)
    for parameter in adapter_parameters(transformer, name):
        parameter.requires_grad_(False)
    return config


def drop_adapter(transformer: nn.Module, name: str) -> None:
    """Take adapter `name` off `transformer`, and give back its memory."""
    assert isinstance(transformer, PeftAdapterMixin)
    transformer.delete_adapters(name)
    _SWITCHES.pop(transformer, None)


def lora_config(ranks: Mapping[str, int], alphas: Mapping[str, float], *, rslora: bool = False) -> LoraConfig:
    """PEFT's configuration of an adapter on the layers that `ranks` and `alphas` name."""
    (rank, _), *_ = Counter(ranks.values()).most_common(1)
    (alpha, _), *_ = Counter(alphas.values()).most_common(1)
    return LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # PEFT only divides by it
        target_modules=list(ranks),
        # ^ makes a key of a pattern a whole name: https://github.com/huggingface/peft/pull/2419
        rank_pattern={f"^{layer}": own for layer, own in ranks.items() if own != rank},
        alpha_pattern={f"^{layer}": own for layer, own in alphas.items() if own != alpha},
        use_rslora=rslora,
    )


def add_student_adapter(
    transformer: nn.Module, *, rank: int, alpha: int, target_modules: Sequence[str], seed: int, name: str = "student"
) -> None:
    """Add a fresh trainable adapter: A Gaussian by `seed`, B zero, so that the student starts as the base."""
    linear = model_layers(transformer)
    if unknown := unknown_targets(target_modules, linear):
        raise InvalidError(
            f"student.adapter.targetModules names {unknown[0]!r}, and this model has no such linear layer"
        )
    others = (name for name, _ in transformer.named_modules() if name not in linear)
    if any(matches(name, target_modules) for name in others):  # a list, say, which PEFT could not adapt
        target_modules = [name for name in linear if matches(name, target_modules)]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(target_modules), init_lora_weights="gaussian")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _add(transformer, config, name)


def start_adapter(transformer: nn.Module, start: AdapterFile, name: str = "student") -> None:
    """Give adapter `name`, of the same rank, the change that `start` makes; layers that it leaves alone stay.

    Raises:
        InvalidError: `start` does not fit the transformer, or holds numbers that are not finite.
    """
    start = fit(start, model_layers(transformer))
    config: LoraConfig = transformer.peft_config[name]  # type: ignore[index]
    state = read_adapter(start)
    for layer in start.layers:  # the ratio is not one where `start` is scaled by the root of its rank
        b = f"{layer}.lora_B.weight"
        state[b] = state[b].float() * (start.scale(layer) / (config.lora_alpha / config.r))
    set_peft_model_state_dict(transformer, state, adapter_name=name)


@dataclass
class _Switch:
    """The layers of a transformer that have adapters, and which one they compute with; () before the first switch."""

    adapters: tuple[str, ...]
    layers: list[BaseTunerLayer]
    active: tuple[str | None, ...] = ()


_SWITCHES: "WeakKeyDictionary[nn.Module, _Switch]" = WeakKeyDictionary()


def use_adapter(transformer: nn.Module, name: str | None) -> None:
    """Compute with adapter `name`, or with none. Unlike PEFT's own switch it leaves `requires_grad` alone.

    It costs nothing where nothing changes, and else a walk over the layers that have adapters, not over all modules.
    """
    switch = _switch(transformer)
    if switch.active == (name,):
        return
    trainable = [parameter for layer in switch.layers for parameter in layer.parameters() if parameter.requires_grad]
    for layer in switch.layers:
        if name is None:
            layer.enable_adapters(False)
        else:
            layer.enable_adapters(True)
            layer.set_adapter(name, inference_mode=True)
    for parameter in trainable:
        parameter.requires_grad_(True)
    switch.active = (name,)


def adapter_parameters(transformer: nn.Module, name: str = "student") -> list[nn.Parameter]:
    """The adapter's parameters in a fixed order."""
    return [parameter for key, parameter in transformer.named_parameters() if f".{name}." in key]


def adapter_state(transformer: nn.Module, name: str = "student") -> dict[str, Tensor]:
    """Tensors of adapter `name` by PEFT's key, without the adapter's name in it."""
    return dict(get_peft_model_state_dict(transformer, adapter_name=name))


def save_adapter(
    transformer: nn.Module, directory: Path, name: str = "student", state: Mapping[str, Tensor] | None = None
) -> Path:
    """Write adapter `name` with its metadata in diffusers' LoRA format, loadable by `pipeline.load_lora_weights`.

    Args:
        state: tensors to write instead of the adapter's own (its moving average, say), keyed like `adapter_state`.
    """
    tensors = dict(state) if state is not None else adapter_state(transformer, name)
    return write_adapter(directory, tensors, transformer.peft_config[name])  # type: ignore[index]


def write_adapter(directory: Path, state: Mapping[str, Tensor], config: LoraConfig) -> Path:
    """Write tensors keyed like `adapter_state` as `save_adapter` does."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / WEIGHTS
    networks = split(state)
    fields = {network: _of_network(plain_fields(config), network) for network in networks}
    if not networks:
        networks, fields = {HIGH: dict(state)}, {HIGH: plain_fields(config)}
    save_file(
        {key: value.detach().cpu().contiguous() for key, value in joined(networks).items()},
        file,
        metadata={"format": "pt", METADATA: json.dumps(joined(fields), indent=2, sort_keys=True)},
    )
    sort_metadata(file)
    return file


def plain_fields(config: LoraConfig) -> dict[str, Any]:
    """PEFT keeps names in sets, whose order changes from process to process and with it a file's digest."""
    return {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}


def _of_network(fields: Mapping[str, Any], network: str) -> dict[str, Any]:
    """Of an adapter on two networks, what its configuration says of one."""
    return {
        **fields,
        "target_modules": narrowed(fields["target_modules"], network),
        **{
            pattern: {
                f"^{layer}": value
                for key, value in fields[pattern].items()
                for layer in narrowed([key.removeprefix("^")], network)
            }
            for pattern in ("rank_pattern", "alpha_pattern")
        },
    }


def read_adapter(adapter: AdapterFile) -> dict[str, Tensor]:
    """The tensors of a LoRA by PEFT's key, relative to the transformer.

    Raises:
        InvalidError: NaN or infinity among them.
    """
    state: dict[str, Tensor] = {}
    for begin, part in adapter.parts:
        with safe_open(part.file, framework="pt") as opened:
            state |= {f"{begin}{key}": _rows(opened, stored, part.rows.get(key)) for key, stored in part.keys.items()}
    bad = next((key for key, value in state.items() if not torch.isfinite(value).all()), None)
    if bad is not None:
        raise InvalidError(f"{adapter.file} holds NaN or infinite numbers in {bad}; train or copy the adapter again")
    return state


def _rows(opened: Any, stored: str, rows: Sequence[tuple[int, int]] | None) -> Tensor:
    whole = opened.get_slice(stored)
    value = torch.cat([whole[first:behind] for first, behind in rows]) if rows else whole[:]
    return value.float() if value.itemsize == 1 else value  # PyTorch does not compute with eight bits


def model_layers(transformer: nn.Module) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every linear layer of the model itself by name, whether or not adapters are on it."""
    found = {}
    for name, module in transformer.named_modules():
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(layer, nn.Linear) and not name.endswith(".base_layer") and ".lora_" not in name:
            found[name] = (layer.out_features, layer.in_features)
    return found


def _add(transformer: nn.Module, config: LoraConfig, name: str) -> None:
    assert isinstance(transformer, PeftAdapterMixin)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are the point
        transformer.add_adapter(config, adapter_name=name)
    _SWITCHES.pop(transformer, None)  # PEFT has switched to the new one


def _switch(transformer: nn.Module) -> _Switch:
    adapters = tuple(getattr(transformer, "peft_config", {}))
    known = _SWITCHES.get(transformer)
    if known is None or known.adapters != adapters:
        layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
        known = _SWITCHES[transformer] = _Switch(adapters, layers)
    return known
