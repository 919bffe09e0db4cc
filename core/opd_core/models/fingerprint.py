"""The identity of a model or an adapter: what it computes with, not how its files are cut."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opd_core.errors import InvalidError
from opd_core.models.headers import read_bytes, read_header

# Say who wrote a file and when, not what the model computes.
_VOLATILE = frozenset({"_diffusers_version", "_name_or_path", "transformers_version", "torch_dtype", "dtype"})
_BYTES = frozenset({".txt", ".model"})  # vocabularies and merges of tokenisers
_KINDS = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint", "C": "complex"}
_TYPES = {"BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}


def fingerprint(path: Path) -> str:
    """ "sha256:..." over every tensor (component, name, dtype, shape, bytes) and configuration under `path`.

    Neither sharding nor the order of keys nor who saved the files changes it. A file is treated as a folder that holds
    only this file.

    Raises:
        InvalidError: nothing at `path`, no tensors in it, or a file of them is damaged.
    """
    if not path.exists():
        raise InvalidError(f"{path} does not exist")
    root = path if path.is_dir() else path.parent
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    entries = sorted(entry for file in files for entry in _entries(file, file.parent.relative_to(root).as_posix()))
    if not any(kind == "tensor" for kind, _, _ in entries):
        raise InvalidError(f"{path} holds no safetensors weights")
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(json.dumps(entry).encode())
    return f"sha256:{digest.hexdigest()}"


def _entries(file: Path, component: str) -> Iterator[tuple[str, str, str]]:
    """(kind, name, digest) of everything in one file that belongs to the identity."""
    if file.suffix == ".safetensors":
        for name, dtype, shape, content in read_bytes(file):
            body = hashlib.sha256(content).hexdigest()
            yield "tensor", f"{component}/{name}", f"torch.{_torch_name(dtype)} {shape} {body}"
        for name, value in read_header(file).metadata.items():
            if name != "format":
                told = _canonical(json.loads(value) if value[:1] in "{[" else value)
                yield "metadata", f"{component}/{name}", told
    elif file.suffix == ".json" and not file.name.endswith(".index.json"):
        yield "config", f"{component}/{file.name}", _canonical(json.loads(file.read_text()))
    elif file.suffix in _BYTES:
        yield "bytes", f"{component}/{file.name}", hashlib.sha256(file.read_bytes()).hexdigest()


def _torch_name(dtype: str) -> str:
    """PyTorch's name of what safetensors calls by letters and the number of bits: bfloat16 for BF16."""
    kind = dtype.rstrip("0123456789")
    return _TYPES.get(dtype) or _KINDS.get(kind, kind) + dtype.removeprefix(kind)


def _canonical(value: Any) -> str:
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if key not in _VOLATILE}
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
