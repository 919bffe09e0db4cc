"""Prompt files as people have them, as records."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd_core.errors import InvalidError

_LARGEST = 1 << 30  # bytes of a file, for every suffix; ten million prompts
csv.field_size_limit(_LARGEST)  # of a field the module takes 128 KiB otherwise, where a value of JSON has no bound
_LFS = "version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class PromptRecord:
    """One prompt; `metadata` is what stands beside it, for the rewards."""

    prompt: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


def load_prompts(path: Path) -> list[PromptRecord]:
    """Records of a prompt file in UTF-8, by its suffix.

    .txt     a prompt per line
    .jsonl   an object per line that has a `prompt`; the rest of it is metadata
    .json    a list of such objects, or of prompts
    .csv     a column `prompt` under a line of names; the other columns are metadata, as texts
    .tsv     the same with tabs

    Lines end at LF or CR LF, and nowhere else. A byte-order mark is no part of a prompt.

    Raises:
        InvalidError: unreadable, larger than a gigabyte, another suffix, a pointer of Git LFS, a bad line (named by its
            number), or no prompt.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        remedy = "write it as .jsonl, for example with pandas: to_json(orient='records', lines=True)"
        known = remedy if path.suffix.lower() == ".parquet" else f"use {', '.join(_READERS)}"
        raise InvalidError(f"prompt file {path} ends in {path.suffix or 'nothing'}; {known}")
    try:
        if (size := path.stat().st_size) > _LARGEST:
            raise InvalidError(f"prompt file {path} has {size} bytes, more than {_LARGEST}; take a part of it")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InvalidError(f"prompt file {path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise InvalidError(f"prompt file {path} cannot be read: {error}; save it as UTF-8") from error
    if text.startswith(_LFS):
        raise InvalidError(
            f"prompt file {path} is the pointer that Git LFS leaves in its place; fetch it: git lfs pull"
        )
    records = list(reader(text, path))
    if not records:
        raise InvalidError(f"prompt file {path} holds no prompts; write at least one line")
    return records


def _text(text: str, path: Path) -> Iterator[PromptRecord]:
    for line, where in _lines(text, path):
        if "\r" in line:
            raise InvalidError(f"{where}: has a carriage return within; let lines end at LF or CR LF")
        yield _record(line.strip(), {}, where)


def _json_lines(text: str, path: Path) -> Iterator[PromptRecord]:
    for line, where in _lines(text, path):
        yield _from_object(_parsed(line, where), where)


def _json(text: str, path: Path) -> Iterator[PromptRecord]:
    content = _parsed(text, str(path))
    if not isinstance(content, list):
        raise InvalidError(f"{path}: needs a list of objects or of prompts; for an object per line name it .jsonl")
    for number, item in enumerate(content, 1):
        where = f"{path}, item {number}"
        yield _record(item, {}, where) if isinstance(item, str) else _from_object(item, where)


def _csv(text: str, path: Path) -> Iterator[PromptRecord]:
    return _table(text, path, ",")


def _tsv(text: str, path: Path) -> Iterator[PromptRecord]:
    return _table(text, path, "\t")


def _table(text: str, path: Path, delimiter: str) -> Iterator[PromptRecord]:
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = next(rows, [])
        if names.count("prompt") != 1 or len(set(names)) < len(names):
            raise InvalidError(
                f"{path}, line 1: needs names of columns, each once, one of them prompt; got {', '.join(names)[:80]}"
            )
        for row in rows:
            if not any(row):
                continue
            where = f"{path}, line {rows.line_num}"
            if len(row) != len(names):
                raise InvalidError(f"{where}: has {len(row)} fields, and {len(names)} columns have a name")
            fields = dict(zip(names, row, strict=True))
            yield _record(fields.pop("prompt").strip(), fields, where)
    except csv.Error as error:
        raise InvalidError(f"{path}, line {rows.line_num}: {error}") from error


def _lines(text: str, path: Path) -> Iterator[tuple[str, str]]:
    """Lines that hold something, with their places. `str.splitlines` would end them at U+2028 and ten others, which may
    stand within a prompt and within a JSON string."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield line.removesuffix("\r"), f"{path}, line {number}"


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, a number of 5,000 digits, brackets without end
        raise InvalidError(f"{where}: not JSON ({error})") from error


def _from_object(content: Any, where: str) -> PromptRecord:
    if not isinstance(content, dict) or "prompt" not in content:
        raise InvalidError(f'{where}: needs an object with a non-empty text "prompt"; got {json.dumps(content)[:80]}')
    return _record(content["prompt"], {key: value for key, value in content.items() if key != "prompt"}, where)


def _record(prompt: Any, metadata: Mapping[str, Any], where: str) -> PromptRecord:
    if not isinstance(prompt, str) or not prompt.strip():
        raise InvalidError(f'{where}: needs an object with a non-empty text "prompt"; got {json.dumps(prompt)[:80]}')
    if not prompt.isascii() and any("\ud800" <= character <= "\udfff" for character in prompt):
        raise InvalidError(
            f"{where}: the prompt holds half of a character (a lone surrogate), {json.dumps(prompt)[:80]}"
        )
    return PromptRecord(prompt, metadata)


_READERS: dict[str, Callable[[str, Path], Iterator[PromptRecord]]] = {
    ".txt": _text,
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
}
