"""Names of arithmetic in a spec, what they are in torch, and how a network computes in them."""

from contextlib import AbstractContextManager, nullcontext

import torch

TORCH_DTYPES = {"BF16": torch.bfloat16, "FP16": torch.float16, "FP32": torch.float32}


def arithmetic(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Multiply in `dtype`: the one arithmetic of students, teachers and evaluation, so that equal weights give equal
    velocities. A student's float32 adapter is cast on the way, once per context."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
