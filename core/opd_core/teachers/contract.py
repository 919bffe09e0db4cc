"""What client and server of the teacher service must agree on: names, dtypes, limits and the description of a server.

The Triton model `MODEL` takes two kinds of requests, told apart by their inputs:

    query     LATENTS [B, ...], SIGMA [B, 1], GUIDANCE [B, 1], TEACHER [B, 1], KEY [B, 16], NEGATIVE_KEY [B, 16]
              and, where it is not 1, TRUE_CFG [B, 1] (`Scales`); for means, A [B, 1], B [B, 1]
              -> VELOCITY [B, ...] FP16; on request MEAN [B, ...] FP32 = a x + b v, and BRANCHES [B, 2, ...] FP16:
              the conditional and the unconditional velocity that guidance combines
    register  KEY [B, 16], CONDITIONING [B, bytes] -> REGISTERED [B, 1]

Latents have the shape that the server's description gives, [C, h, w] of an image and [C, t, h, w] of a video. The
velocity is v = e - x0 and sigma is in [0, 1], whatever the network behind them takes. TEACHER is a number of the
description's order, or BASE.
What a prompt is to its network is twenty times the size of a latent, so it travels once and is named afterwards by its
key. A row of CONDITIONING is a safetensors file with the tensors that the description names, all in the server's
precision but for one called `mask`, which is BOOL. Rows of one request have equal shapes, hence equal lengths. A key is
16 bytes of a digest of what travelled, which the server computes again.
Means are answered in precision FP32 alone: x in half precision would round away what they are asked for.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MODEL = "teacher"
DESCRIPTION = "opd.dev/description"  # key in the model configuration's parameters; holds a ServiceInfo as JSON

LATENTS, SIGMA, GUIDANCE, TEACHER, KEY, NEGATIVE_KEY = "latents", "sigma", "guidance", "teacher", "key", "negative_key"
TRUE_CFG = "true_cfg"
MEAN_A, MEAN_B = "a", "b"
CONDITIONING, MASK = "conditioning", "mask"
FREE = -1  # a size that differs from prompt to prompt, or from image to image
TRIAL_SIDE, TRIAL_TOKENS = 8, 2  # such a size of latents and prompts where a server is tried
VELOCITY, MEAN, BRANCHES, REGISTERED = "velocity", "mean", "branches", "registered"

KEY_BYTES = 16
MAX_ROWS = 64  # rows of one request; the server's batcher never merges beyond it
BASE = -1  # the number that the base answers to, without any teacher's adapter
UNKNOWN_KEY = "unknown conditioning"  # begins the NOT_FOUND message that makes a client register again
NOT_FINITE = "answered NaN or infinity"  # in the message about a teacher that nobody may learn from

# How latents travel, by precision. bfloat16 goes as its 16 bits: what numpy and tritonclient make of BF16 differs
# between their versions.
WIRE_TYPES = {"BF16": "INT16", "FP16": "FP16", "FP32": "FP32"}
ITEM_BYTES = {"BF16": 2, "FP16": 2, "FP32": 4}
DTYPES = {"BF16": "torch.bfloat16", "FP16": "torch.float16", "FP32": "torch.float32"}  # without PyTorch
FILE_TYPES = {"BF16": "BF16", "FP16": "F16", "FP32": "F32"}  # of tensors in a safetensors file


def sized(shape: Sequence[int], free: int) -> list[int]:
    """`shape` with `free` in the place of every size that is FREE."""
    return [free if size == FREE else size for size in shape]


def content_key(tensors: Mapping[str, tuple[str, Sequence[int], bytes | memoryview]]) -> bytes:
    """The key of a prompt's tensors by name, each as PyTorch's name of its type, its shape and its bytes."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for name, (dtype, shape, content) in sorted(tensors.items()):
        digest.update(f"{name} {dtype}{tuple(shape)}".encode())
        digest.update(content)
    return digest.digest()


def missing_keys(message: str) -> set[bytes]:
    """The keys that an answer NOT_FOUND names."""
    return {bytes.fromhex(word) for word in re.findall(f"[0-9a-f]{{{2 * KEY_BYTES}}}", message)}


class ServiceInfo(BaseModel):
    """Who answers at an address; the trainer compares it with what the spec asks for before it starts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: Annotated[str, Field(description="Fingerprint of the base, whose student these teachers teach.")]
    teachers: Annotated[
        dict[str, str], Field(description="Fingerprint of every teacher, in the order of their numbers.")
    ]
    precision: Annotated[str, Field(description="BF16, FP16 or FP32: arithmetic and wire format of latents.")]
    max_sequence_length: int
    latents: Annotated[tuple[int, ...], Field(description="Shape of one row of latents; -1: as the image is large.")]
    conditioning: Annotated[
        dict[str, tuple[int, ...]],
        Field(description="Shape of each tensor that a prompt is, by name; -1: as the prompt is long."),
    ]
    versions: dict[str, str]
