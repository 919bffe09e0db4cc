"""A LoRA in the format of another program, or in its base; it computes the same."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd_core.artifacts import MANIFEST, WEIGHTS, StudentManifest, read_student, write_card
from opd_core.errors import InvalidError
from opd_core.models.adapter_file import PEFT_CONFIG, PEFT_WEIGHTS, AdapterFile, read_adapter_file
from opd_core.models.adapter_keys import PEFT_PREFIX, PREFIX, Format
from opd_core.models.adapter_layers import named
from opd_core.models.adapters import lora_config, plain_fields, read_adapter, write_adapter
from opd_core.models.outline import components, linear_layers
from opd_core.models.pairs import FOLDERS, HIGH


def export(path: Path, directory: Path, to: Format, *, alpha: float | None = None, base: Path | None = None) -> Path:
    """Write the LoRA at `path` to `directory` in the format `to`, with diffusers' names of layers. The file that was
    written, or a folder: of a model, or with those of a pair for high and for low noise, as programs load them. A
    student's has its model card.

    Args:
        alpha: where the file states none.
        base: the model that it is for, where the file names layers otherwise than diffusers does, or to merge.

    Raises:
        InvalidError: no LoRA, one that does not fit `base` or needs one, or `directory` is not empty.
        RefusedError: a student whose weights are not those of its manifest.
    """
    if directory.exists() and any(directory.iterdir()):
        raise InvalidError(f"{directory} is not empty; name another folder")
    if to == Format.MERGED and base is None:
        raise InvalidError("merged weights are those of a model; give it with --base")
    adapter = named(read_adapter_file(path, alpha), None if base is None else linear_layers(base))
    student = _student(path)
    if to == Format.MERGED and base is not None:
        written = _merged(adapter, base, directory)
    elif adapter.halves:
        for network, half in adapter.halves.items():
            _write(half, directory / FOLDERS[network], to)
        written = directory
    else:
        written = _write(adapter, directory, to)
    if student is not None:
        write_card(directory, student, to)
    return written


def _student(path: Path) -> StudentManifest | None:
    """Whose LoRA `path` is; None: nobody says."""
    folder = path if path.is_dir() else path.parent
    try:
        return read_student(folder)[0] if (folder / MANIFEST).is_file() else None
    except InvalidError:  # another program's manifest
        return None


def _write(adapter: AdapterFile, directory: Path, to: Format) -> Path:
    # Layers that a file has in one matrix share their A, and safetensors writes nothing that is shared.
    state = {key: value.clone() for key, value in read_adapter(adapter).items()}
    if to == Format.COMFYUI:
        return _comfyui(adapter, state, directory)
    config = lora_config(
        {layer: adapter.rank(layer) for layer in adapter.layers}, adapter.alphas, rslora=adapter.rslora
    )
    if to == Format.DIFFUSERS:
        return write_adapter(directory, state, config)
    file = _save({f"{PEFT_PREFIX}{key}": value for key, value in state.items()}, directory / PEFT_WEIGHTS)
    fields = {**plain_fields(config), "inference_mode": True}
    (directory / PEFT_CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    return file


def _comfyui(adapter: AdapterFile, state: Mapping[str, Tensor], directory: Path) -> Path:
    """It knows diffusers' names of layers, and takes the scale from tensors alone (comfy/lora.py, load_lora)."""
    tensors = {
        f"{PREFIX}{key}".replace(".lora_A.", ".lora_down.").replace(".lora_B.", ".lora_up."): value
        for key, value in state.items()
    }
    for layer in adapter.layers:
        tensors[f"{PREFIX}{layer}.alpha"] = torch.tensor(adapter.scale(layer) * adapter.rank(layer))
    return _save(tensors, directory / WEIGHTS)


def _merged(adapter: AdapterFile, base: Path, directory: Path) -> Path:
    """The base's components with W + alpha / r B A in the transformer, added in float32 and rounded as W is."""
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(base / "model_index.json", directory)
    loras = adapter.halves or {HIGH: adapter}
    for part in components(base):
        if part.name not in loras:
            shutil.copytree(part.folder, directory / part.name)
            continue
        (directory / part.name).mkdir()
        for file in part.folder.glob("*.json"):
            shutil.copy(file, directory / part.name)
        lora = loras[part.name]
        state = read_adapter(lora)
        for file in part.weights:
            save_file(_added(lora, state, load_file(file)), directory / part.name / file.name, {"format": "pt"})
    return directory


def _added(adapter: AdapterFile, state: Mapping[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    for layer in adapter.layers:
        if (weight := weights.get(f"{layer}.weight")) is not None:  # else in another file
            a, b = (state[f"{layer}.lora_{side}.weight"].float() for side in "AB")
            weights[f"{layer}.weight"] = (weight.float() + adapter.scale(layer) * b @ a).to(weight.dtype)
    return weights


def _save(tensors: Mapping[str, Tensor], file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata={"format": "pt"})
    return file
