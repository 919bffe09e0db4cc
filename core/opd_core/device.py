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
