"""Out of memory is no defect of the device: a smaller batch may fit."""

import torch

# What is raised where memory ends, besides torch.OutOfMemoryError: the CPU's allocator, and CUDA's libraries, whose
# workspaces do not come from PyTorch (https://github.com/pytorch/pytorch/issues/67978).
_WORDS = ("DefaultCPUAllocator: ", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
_TICKS_UNTIL_MORE = 256


def ran_out(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


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
