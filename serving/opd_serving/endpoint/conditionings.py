"""Encoded prompts, kept on the device while they are likely to be asked for again."""

from collections import OrderedDict
from dataclasses import dataclass

from opd_core.conditioning import Conditioning
from opd_core.models.pipeline import Model
from opd_core.models.tokens import read_windows


@dataclass(frozen=True, eq=False)
class Encoded:
    """A prompt on the device. `truncated`: its end was read by no text encoder."""

    conditioning: Conditioning
    truncated: bool


class ConditioningCache:
    """The most recently used conditionings, up to `budget` bytes; the negative prompt is in nearly every request."""

    def __init__(self, model: Model, max_sequence_length: int, budget: int = 256 * 2**20) -> None:
        self._model, self._max_sequence_length, self._budget = model, max_sequence_length, budget
        self._entries: OrderedDict[tuple[str, bool], Encoded] = OrderedDict()
        self._bytes = 0

    def get(self, prompt: str, *, negative: bool = False) -> Encoded:
        key = prompt, negative
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        (encoded,) = self._model.encode([prompt], self._max_sequence_length, negative=negative)
        conditioning = encoded.to(self._model.device)
        if not conditioning.finite:
            raise ArithmeticError("the text encoders gave non-finite numbers")
        entry = Encoded(conditioning, self._truncates(prompt))
        self._entries[key] = entry
        self._bytes += conditioning.nbytes
        while self._bytes > self._budget and len(self._entries) > 1:
            _, oldest = self._entries.popitem(last=False)
            self._bytes -= oldest.conditioning.nbytes
        return entry

    def _truncates(self, prompt: str) -> bool:
        """Whether the prompt has more tokens than any text encoder reads."""
        windows = read_windows(self._model.family, self._model.pipeline.components, self._max_sequence_length)
        return all(count > window.tokens for window in windows for count in window.lengths([prompt]))
