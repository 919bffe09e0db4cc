"""Where tensors live."""

from opd_core.errors import InvalidError


def choose_device(name: str) -> str:
    """A torch device from "auto", "cpu", "cuda" or "cuda:N"; auto takes the GPU if there is one."""
    if name == "cpu":
        return name
    import torch  # takes a second, more than all else that the preparation of a teacher server does

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidError(f"--device {name} is not a device; write auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidError(f"--device {name}: this machine has no usable CUDA device; write cpu or auto")
    return str(device)


# How allocators without an exception of their own say it: cuBLAS, cuDNN, PyTorch's on the CPU. What they allocate does
# not come from PyTorch's cache (https://github.com/pytorch/pytorch/issues/67978).
_NO_ROOM = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had too little memory for what was asked of it."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_ROOM)
    )
