"""Out of memory is no defect of the device: a smaller batch may fit."""

import torch

_TICKS_UNTIL_MORE = 256


def free(device: torch.device) -> None:
    """Give back what PyTorch keeps for later. Not inside `except`: the error holds the tensors that did not fit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


class BatchLimit:
    """How many pixels a batch may have: less after one did not fit, and twice as many after a while in which all did,
    because the memory may have been somebody else's."""

    def __init__(self, most: int) -> None:
        self.pixels = self._most = most
        self._ticks = 0

    def too_much(self, pixels: int) -> None:
        """A batch of so many did not fit."""
        self.pixels, self._ticks = pixels // 2, 0

    def fitted(self) -> None:
        self._ticks += 1
        if self.pixels < self._most and self._ticks >= _TICKS_UNTIL_MORE:
            self.pixels, self._ticks = min(2 * self.pixels, self._most), 0
