"""Names of arithmetic in a spec, and what they are in torch."""

import torch

TORCH_DTYPES = {"BF16": torch.bfloat16, "FP16": torch.float16, "FP32": torch.float32}
