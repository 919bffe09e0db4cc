"""What a LoRA's file says about it, and whether it fits a model: nothing is loaded."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_core.artifacts import WEIGHTS
from opd_core.errors import InvalidError
from opd_core.models.headers import read_header, read_json

_PEFT_WEIGHTS, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIXES = ("transformer.", "base_model.model.")  # diffusers' and PEFT's own
_METADATA = "lora_adapter_metadata"  # diffusers.loaders.lora_base.LORA_ADAPTER_METADATA_KEY
_UNSUPPORTED = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern")
_RE_SAVE = (
    "without it the adapter's scale alpha / rank is unknown; save it again with "
    "StableDiffusion3Pipeline.save_lora_weights(..., transformer_lora_adapter_metadata=config.to_dict()) "
    "or with PEFT's save_pretrained"
)


@dataclass(frozen=True)
class AdapterFile:
    """A LoRA on disk. Keys of `shapes` are relative to the transformer, those in the file begin with `prefix`.

    `targets` is what PEFT calls target_modules: ends of module names, or one regular expression for whole names.
    """

    file: Path
    prefix: str
    rank: int
    alpha: int
    targets: list[str] | str
    rslora: bool
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def scale(self) -> float:
        """What the product of its two matrices is multiplied by."""
        return float(self.alpha / (self.rank**0.5 if self.rslora else self.rank))

    @property
    def layers(self) -> list[str]:
        """Names of the layers it changes."""
        return sorted({key.partition(".lora_")[0] for key in self.shapes})


def read_adapter_file(path: Path) -> AdapterFile:
    """The LoRA at `path`: a file or its folder, diffusers' or PEFT's format.

    Raises:
        InvalidError: not a LoRA of a transformer, or one without the metadata that gives its scale.
    """
    file = _weights_file(path)
    header = read_header(file)
    prefix = next((p for p in _PREFIXES if header.shapes and all(key.startswith(p) for key in header.shapes)), None)
    if prefix is None:
        example = next(iter(header.shapes), "no tensor at all")
        raise InvalidError(
            f"{file} is not a LoRA of a transformer: it holds {example}; expected keys {' or '.join(_PREFIXES)}..."
        )
    fields = _config(file, header.metadata)
    try:
        rank, alpha, targets = fields["r"], fields["lora_alpha"], fields["target_modules"]
    except KeyError as error:
        raise InvalidError(f"the adapter metadata of {file} has no {error.args[0]}; {_RE_SAVE}") from error
    unsupported = [key for key in _UNSUPPORTED if fields.get(key)]
    if unsupported:
        raise InvalidError(f"{file} uses {', '.join(unsupported)}, which is not supported; train a plain LoRA")
    return AdapterFile(
        file=file,
        prefix=prefix,
        rank=rank,
        alpha=alpha,
        targets=targets,
        rslora=bool(fields.get("use_rslora")),
        shapes={key.removeprefix(prefix): shape for key, shape in header.shapes.items()},
    )


def check_fit(adapter: AdapterFile, linear: Mapping[str, tuple[int, int]]) -> None:
    """The adapter changes layers that are there, in their shape, and every layer that it says it changes.

    Args:
        linear: (outputs, inputs) of the transformer's linear layers by name.

    Raises:
        InvalidError: it was made for another base, or does not fit its own metadata.
    """
    for key, shape in adapter.shapes.items():
        name, _, side = key.partition(".lora_")
        if name not in linear:
            raise InvalidError(
                f"{adapter.file} adapts {name}, and this model has no such linear layer; is it for another base?"
            )
        outputs, inputs = linear[name]
        expected = (adapter.rank, inputs) if side.startswith("A") else (outputs, adapter.rank)
        if shape != expected:
            raise InvalidError(
                f"{adapter.file}: {key} has shape {shape}, but rank {adapter.rank} on this model needs {expected}; "
                "is the adapter for another base, or its metadata from another adapter?"
            )
    targeted = [name for name in linear if matches(name, adapter.targets)]
    needed = {f"{name}.lora_{side}.weight" for name in targeted for side in "AB"}
    missing, surplus = sorted(needed - adapter.shapes.keys()), sorted(adapter.shapes.keys() - needed)
    if missing or surplus:
        raise InvalidError(
            f"{adapter.file} does not fit its own metadata: {len(missing)} tensors are missing and {len(surplus)} "
            f"unknown, e.g. {(missing + surplus)[0]}; save it again"
        )


def unknown_targets(targets: Sequence[str], linear: Mapping[str, tuple[int, int]]) -> list[str]:
    """Those of a new adapter's targets that name no layer of the model."""
    return [target for target in targets if not any(matches(name, [target]) for name in linear)]


def matches(name: str, targets: Sequence[str] | str) -> bool:
    """PEFT's rule: whether an adapter with these targets changes the module `name`."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _weights_file(path: Path) -> Path:
    if path.is_file():
        return path
    for name in (WEIGHTS, _PEFT_WEIGHTS):
        if (path / name).is_file():
            return path / name
    raise InvalidError(
        f"{path} holds neither {WEIGHTS} nor {_PEFT_WEIGHTS}; point the URI at a LoRA file or its folder"
    )


def _config(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig, from the file's own metadata or from the file beside it."""
    if _METADATA in metadata:
        try:
            stored = json.loads(metadata[_METADATA])
        except ValueError as error:
            raise InvalidError(f"the adapter metadata of {file} is not valid JSON: {error}; {_RE_SAVE}") from error
        return {key.removeprefix("transformer."): v for key, v in stored.items() if key.startswith("transformer.")}
    if (file.parent / _PEFT_CONFIG).is_file():
        return read_json(file.parent / _PEFT_CONFIG)
    raise InvalidError(f"{file} has no adapter metadata and no {_PEFT_CONFIG} beside it; {_RE_SAVE}")
