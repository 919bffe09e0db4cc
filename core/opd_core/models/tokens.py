"""How much of a prompt the text encoders see."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_core.families.family import Family, TextWindow
from opd_core.families.registry import family_of
from opd_core.imports import without_collection
from opd_core.models.headers import read_json

with without_collection():
    import transformers


@dataclass(frozen=True)
class Longer:
    """So many prompts are longer than some encoders see, in words."""

    count: int
    words: str


@dataclass(frozen=True)
class Reading:
    """One window of a model: `tokens` is how many of a prompt it sees."""

    window: TextWindow
    tokenizer: Any
    tokens: int

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, with what stands around it."""
        ids = self.tokenizer(list(prompts), truncation=False, verbose=False)["input_ids"]
        return [len(of_prompt) + self.window.template for of_prompt in ids]


def read_windows(family: Family, tokenizers: Mapping[str, Any], max_sequence_length: int) -> Iterator[Reading]:
    """The windows of a model that has these tokenizers, by component; one that is None is not there."""
    for window in family.windows:
        present = [tokenizers[name] for name in window.tokenizers if tokenizers.get(name) is not None]
        if present:
            own = min(tokenizer.model_max_length for tokenizer in present)
            yield Reading(window, present[0], own if window.own_limit else max_sequence_length)


def longer_prompts(base: Path, prompts: Sequence[str], max_sequence_length: int) -> list[Longer]:
    """Prompts of which an encoder of the model in `base` sees only the beginning; none where all are seen whole.

    Raises:
        InvalidError: `base` is no model.
    """
    family, index = family_of(base), read_json(base / "model_index.json")
    tokenizers = {
        name: getattr(transformers, index[name][1]).from_pretrained(base / name, local_files_only=True)
        for window in family.windows
        for name in window.tokenizers
        if index.get(name, [None])[0] is not None
    }
    found = []
    for reading in read_windows(family, tokenizers, max_sequence_length):
        count = sum(length > reading.tokens for length in reading.lengths(prompts))
        if count:
            found.append(Longer(count, _words(reading)))
    return found


def _words(reading: Reading) -> str:
    encoder = reading.window.encoder
    if reading.window.own_limit:
        return f"are longer than the {reading.tokens} tokens that {encoder} sees"
    limit = f"spec.model.maxSequenceLength, {reading.tokens} tokens of {encoder}"
    return f"are longer than {limit}; no encoder sees the rest"
