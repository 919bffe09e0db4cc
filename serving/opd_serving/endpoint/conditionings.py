"""Encoded prompts, kept on the device while they are likely to be asked for again."""

from collections import OrderedDict

import torch
from opd_core.conditioning import Conditioning
from opd_core.models.pipeline import Model


class ConditioningCache:
    """The most recently used conditionings, up to `budget` bytes; the negative prompt is in nearly every request."""

    def __init__(self, model: Model, max_sequence_length: int, budget: int = 256 * 2**20) -> None:
        self._model, self._max_sequence_length, self._budget = model, max_sequence_length, budget
        self._entries: OrderedDict[str, Conditioning] = OrderedDict()
        self._bytes = 0

    def get(self, prompt: str) -> Conditioning:
        if prompt in self._entries:
            self._entries.move_to_end(prompt)
            return self._entries[prompt]
        (encoded,) = self._model.encode([prompt], self._max_sequence_length)
        device = self._model.device
        entry = Conditioning(encoded.embeds.to(device), encoded.pooled.to(device))
        if not (torch.isfinite(entry.embeds).all() and torch.isfinite(entry.pooled).all()):
            raise ArithmeticError("the text encoders gave non-finite numbers")
        self._entries[prompt] = entry
        self._bytes += entry.nbytes
        while self._bytes > self._budget and len(self._entries) > 1:
            _, oldest = self._entries.popitem(last=False)
            self._bytes -= oldest.nbytes
        return entry
