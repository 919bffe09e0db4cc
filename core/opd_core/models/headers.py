"""Names, types, shapes and bytes of tensors in safetensors files, without PyTorch; all but bytes in milliseconds."""

import json
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from opd_core.errors import InvalidError


@dataclass(frozen=True)
class Header:
    """Shapes by tensor, their types as the format writes them ("BF16"), and what the writer noted beside them."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    metadata: Mapping[str, str]


def read_header(file: Path) -> Header:
    """The header of one file.

    Raises:
        InvalidError: not a safetensors file, or one that was cut short.
    """
    try:
        with safe_open(file, framework="numpy") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118  (no dict)
            return Header(
                shapes={key: tuple(each.get_shape()) for key, each in slices.items()},
                dtypes={key: each.get_dtype() for key, each in slices.items()},
                metadata=opened.metadata() or {},
            )
    except (SafetensorError, OSError) as error:
        raise InvalidError(f"{file} is not a readable safetensors file: {error}; copy it again") from error


def read_bytes(file: Path) -> Iterator[tuple[str, str, tuple[int, ...], memoryview]]:
    """(name, dtype as the format writes it: "BF16", shape, bytes) of every tensor. The bytes are the file's own pages,
    which are there until the next one is asked for.

    Raises:
        InvalidError: not a safetensors file, or one that was cut short.
    """
    shapes = read_header(file).shapes
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        begin = 8 + int.from_bytes(pages[:8], "little")
        entries = json.loads(pages[8:begin])
        for name, shape in shapes.items():
            first, last = entries[name]["data_offsets"]
            with memoryview(pages) as whole, whole[begin + first : begin + last] as content:
                yield name, entries[name]["dtype"], shape, content


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The files that hold the weights of one component of a model, whether they are one or several.

    Raises:
        InvalidError: no weights, or two sets of them.
    """
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if whole.is_file() and index.is_file():  # diffusers takes the index, transformers the file
        raise InvalidError(f"{folder} holds {whole.name} and {index.name}: two sets of weights; remove one")
    if index.is_file():
        return [folder / part for part in sorted(set(_weight_map(index).values()))]
    if whole.is_file():
        return [whole]
    raise InvalidError(f"{folder} holds no {whole.name}; copy the model again, or save it as safetensors")


def _weight_map(index: Path) -> dict[str, str]:
    """File by tensor, all of them in the folder of their index."""
    parts = read_json(index).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(p, str) and p == Path(p).name for p in parts.values()):
        raise InvalidError(f"{index} has no weight_map of file names; copy the model again")
    return parts


def sort_metadata(file: Path) -> None:
    """Put a file's metadata in order: safetensors writes them in a random one, and with it changes the file's digest
    (https://github.com/huggingface/safetensors/issues/584)."""
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, "the same words in another order"
        opened.seek(8)
        opened.write(text.ljust(length))


def read_json(file: Path) -> dict[str, Any]:
    """A configuration file of a model.

    Raises:
        InvalidError: missing, or no JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))  # some editors begin a file with a byte-order mark
    except OSError as error:
        raise InvalidError(
            f"{file.parent} is not a model in diffusers' folder format: {file.name} is missing; copy it again"
        ) from error
    except (ValueError, RecursionError) as error:  # neither JSON nor UTF-8, or brackets without end
        raise InvalidError(f"{file} is not valid JSON: {error}; copy it again") from error
    if not isinstance(content, dict):
        raise InvalidError(f"{file} holds no JSON object; copy it again")
    return content
