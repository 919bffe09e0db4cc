"""How much of a prompt the text encoders see."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opd_core.imports import without_collection
from opd_core.models.headers import read_json

with without_collection():
    import transformers

_CLIP, _T5 = ("tokenizer", "tokenizer_2"), "tokenizer_3"


@dataclass(frozen=True)
class Longer:
    """So many prompts are longer than some encoders see, in words."""

    count: int
    words: str


def longer_prompts(base: Path, prompts: Sequence[str], max_sequence_length: int) -> list[Longer]:
    """Prompts of which an encoder of the model in `base` sees only the beginning; none where all are seen whole.

    Raises:
        InvalidError: `base` is no model.
    """
    index = read_json(base / "model_index.json")
    present = [name for name in (*_CLIP, _T5) if index.get(name, [None])[0] is not None]
    tokenizers = {
        name: getattr(transformers, index[name][1]).from_pretrained(base / name, local_files_only=True)
        for name in present
    }
    found = []
    clip = min((tokenizers[name].model_max_length for name in _CLIP if name in tokenizers), default=None)
    if clip is not None and (count := _longer(tokenizers[_CLIP[0]], prompts, clip)):
        found.append(Longer(count, f"are longer than the {clip} tokens that CLIP sees"))
    if _T5 in tokenizers and (count := _longer(tokenizers[_T5], prompts, max_sequence_length)):
        limit = f"spec.model.maxSequenceLength, {max_sequence_length} tokens of T5"
        found.append(Longer(count, f"are longer than {limit}; no encoder sees the rest"))
    return found


def _longer(tokenizer: transformers.PreTrainedTokenizerBase, prompts: Sequence[str], limit: int) -> int:
    ids = tokenizer(list(prompts), truncation=False, verbose=False)["input_ids"]
    return sum(len(of_prompt) > limit for of_prompt in ids)
