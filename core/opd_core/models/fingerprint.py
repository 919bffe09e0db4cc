"""The identity of a model or an adapter: what it computes with, not how its files are cut."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from opd_core.errors import InvalidError
from opd_core.models.adapter_file import AdapterFile, read_adapter_file
from opd_core.models.headers import read_bytes, read_json
from opd_core.models.outline import Component, components

_INDEX = "model_index.json"
# Say who wrote a file and when, not what the model computes.
_VOLATILE = frozenset({"_diffusers_version", "_name_or_path", "transformers_version", "torch_dtype", "dtype"})
_BYTES = frozenset({".txt", ".model", ".jinja"})  # vocabularies, merges and chat templates of tokenisers
_KINDS = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint", "C": "complex"}
_TYPES = {"BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}


def fingerprint(path: Path) -> str:
    """ "sha256:..." of the model in diffusers' folder format, or of the LoRA, at `path`.

    It covers what is loaded and nothing else: of a model, every tensor (component, name, dtype, shape, bytes), every
    configuration and every tokeniser of the components in its model_index.json. Neither sharding nor the order of keys
    nor who saved the files changes it.

    Raises:
        InvalidError: nothing at `path`, neither of the two, or a file of it is missing or damaged.
    """
    if not path.exists():
        raise InvalidError(f"{path} does not exist")
    if not (path / _INDEX).is_file():
        return adapter_fingerprint(read_adapter_file(path))
    index = ("config", _INDEX, _canonical(read_json(path / _INDEX)))
    return _digest([index, *(entry for part in components(path) for entry in _entries(part))])


def components_fingerprint(parts: Iterable[Component], boundary: float | None = None) -> str:
    """ "sha256:..." of some components of a model, of the same things as `fingerprint`.

    Args:
        boundary: between two networks among them.
    """
    between = [] if boundary is None else [("config", "boundary", repr(boundary))]
    return _digest([*between, *(entry for part in parts for entry in _entries(part))])


def adapter_fingerprint(adapter: AdapterFile) -> str:
    """ "sha256:..." of a LoRA: its tensors by layer, and each layer's scale, wherever that was stated."""
    entries: list[tuple[str, str, str]] = []
    for begin, part in adapter.parts:
        names = {stored: f"{begin}{key}" for key, stored in part.keys.items()}
        entries += [("tensor", names[stored], digest) for stored, digest in _tensors(part.file) if stored in names]
    return _digest([*entries, *(("scale", layer, repr(adapter.scale(layer))) for layer in adapter.layers)])


def _digest(entries: Iterable[tuple[str, str, str]]) -> str:
    digest = hashlib.sha256()
    for entry in sorted(entries):
        digest.update(json.dumps(entry).encode())
    return f"sha256:{digest.hexdigest()}"


def _tensors(file: Path) -> Iterator[tuple[str, str]]:
    """(name, dtype with shape and digest) of every tensor in a file."""
    for name, dtype, shape, content in read_bytes(file):
        yield name, f"torch.{_torch_name(dtype)} {shape} {hashlib.sha256(content).hexdigest()}"


def _entries(part: Component) -> Iterator[tuple[str, str, str]]:
    for file in part.weights:
        yield from (("tensor", f"{part.name}/{name}", digest) for name, digest in _tensors(file))
    yield from _configuration(part)


def _configuration(part: Component) -> Iterator[tuple[str, str, str]]:
    for file in sorted(part.folder.glob("*")):
        name = f"{part.name}/{file.name}"
        if file.suffix == ".json" and not file.name.endswith(".index.json"):
            yield "config", name, _canonical(read_json(file))
        elif file.suffix in _BYTES:
            yield "bytes", name, hashlib.sha256(file.read_bytes()).hexdigest()


def _torch_name(dtype: str) -> str:
    """PyTorch's name of what safetensors calls by letters and the number of bits: bfloat16 for BF16."""
    kind = dtype.rstrip("0123456789")
    return _TYPES.get(dtype) or _KINDS.get(kind, kind) + dtype.removeprefix(kind)


def _canonical(value: Any) -> str:
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if key not in _VOLATILE}
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
