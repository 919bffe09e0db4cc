"""Random numbers that depend on what they are for, not on who draws them."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def keyed_seed(*key: int | str) -> int:
    """A 63-bit seed from a key such as (seed, "rollout", round, task, sample)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform(*key: int | str) -> float:
    """A number in [0, 1), a function of the key alone."""
    return keyed_seed(*key) / 2**63


def draw(shape: Sequence[int], *key: int | str) -> Tensor:
    """Standard normal numbers [*shape], float32 on the CPU, a function of the key alone.

    World size, order of calls and restarts do not change them, and neither does the device: the CPU generator is used
    because the streams of CUDA generators differ between GPU models.
    """
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(keyed_seed(*key)))
