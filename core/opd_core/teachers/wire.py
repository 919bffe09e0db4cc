"""Tensors as they travel: requests of the contract as tritonclient wants them, answers checked."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import tritonclient.grpc.aio as triton
from torch import Tensor

from opd_core.conditioning import Conditioning
from opd_core.errors import RefusedError
from opd_core.precision import TORCH_DTYPES
from opd_core.teachers import contract
from opd_core.teachers.contract import ServiceInfo
from opd_core.teachers.payload import write_conditioning


@dataclass(frozen=True, eq=False)
class Rows:
    """B states of one teacher's task, on the CPU: `latents` [B, *latent]; `sigmas` [B] and `scales` [B, 2] (`Scales`)
    float32. `base`: the teacher's base answers. `branches`: both branches of guidance are asked for."""

    teacher: str
    latents: Tensor
    sigmas: Tensor
    scales: Tensor
    conditioning: Sequence[Conditioning]
    negative: Conditioning
    base: bool = False
    branches: bool = False

    def split(self, size: int) -> "list[Rows]":
        spans = [slice(i, i + size) for i in range(0, len(self.latents), size)]
        return [
            replace(
                self,
                latents=self.latents[s],
                sigmas=self.sigmas[s],
                scales=self.scales[s],
                conditioning=self.conditioning[s],
            )
            for s in spans
        ]


def query_inputs(info: ServiceInfo, rows: Rows) -> list[Any]:
    """Asks a server that holds the teacher."""
    count = len(rows.latents)
    number = contract.BASE if rows.base else list(info.teachers).index(rows.teacher)
    states = rows.latents.to(TORCH_DTYPES[info.precision]).contiguous()
    if info.precision == "BF16":
        states = states.view(torch.int16)
    return [
        _input(contract.LATENTS, contract.WIRE_TYPES[info.precision], states.numpy()),
        _input(contract.SIGMA, "FP32", rows.sigmas.view(count, 1).numpy()),
        *(
            _input(name, "FP32", column.view(count, 1).numpy())
            for name, column in zip((contract.GUIDANCE, contract.TRUE_CFG), rows.scales.unbind(1), strict=True)
            if name == contract.GUIDANCE or (column != 1).any()
        ),
        _input(contract.TEACHER, "INT32", np.full((count, 1), number, np.int32)),
        _input(contract.KEY, "UINT8", _keys(key_of(info, c) for c in rows.conditioning)),
        _input(contract.NEGATIVE_KEY, "UINT8", _keys([key_of(info, rows.negative)] * count)),
    ]


def register_inputs(info: ServiceInfo, conditioning: Sequence[Conditioning]) -> list[Any]:
    """Registers prompts of equal shapes under their keys."""
    files = [write_conditioning(info, c) for c in conditioning]
    return [
        _input(contract.KEY, "UINT8", _keys(key_of(info, c) for c in conditioning)),
        _input(contract.CONDITIONING, "UINT8", np.frombuffer(b"".join(files), np.uint8).reshape(len(files), -1)),
    ]


def key_of(info: ServiceInfo, conditioning: Conditioning) -> bytes:
    """The key of a prompt at a server: of its numbers as they travel."""
    return conditioning.cast(TORCH_DTYPES[info.precision]).key


def checked_velocity(answer: np.ndarray[Any, Any], rows: Rows, address: str) -> Tensor:
    """Velocities [B, *latent], or both branches [B, 2, *latent], float32.

    Raises:
        RefusedError: another shape, or a number that is not finite.
    """
    count, *latent = rows.latents.shape
    if answer.shape != ((count, 2, *latent) if rows.branches else (count, *latent)):
        raise RefusedError(
            f"teacher {rows.teacher} at {address} answered shape {answer.shape} to states {tuple(rows.latents.shape)}"
        )
    velocity = torch.from_numpy(answer.astype(np.float32))
    if not torch.isfinite(velocity).all():
        raise RefusedError(f"teacher {rows.teacher} at {address} {contract.NOT_FINITE}")
    return velocity


def _keys(keys: Iterable[bytes]) -> np.ndarray[Any, Any]:
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, contract.KEY_BYTES)


def _input(name: str, datatype: str, array: np.ndarray[Any, Any]) -> Any:
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(np.ascontiguousarray(array))
    return tensor
