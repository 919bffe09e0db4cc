"""The arithmetic of one tick. Nothing is shared between samples: every row carries its own path, step and guidance.

A scheduler object of diffusers counts steps, so two requests that share one corrupt each other
(https://github.com/huggingface/diffusers/issues/3672); here a step is two coefficients.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from opd_core.conditioning import Conditioning
from opd_core.diffusion.guidance import Forward, guided_velocity
from opd_core.diffusion.transitions import Transition, transitions
from opd_core.models.pipeline import Model
from opd_core.precision import arithmetic
from opd_core.scales import Scales
from torch import Tensor


@dataclass(eq=False)
class Row:
    """One image or video on the device: its `latents` float32 before step `step` of `path`."""

    latents: Tensor
    path: tuple[Transition, ...]
    conditioning: Conditioning
    negative: Conditioning
    scales: Scales
    step: int = 0


def euler_path(model: Model, steps: int, width: int, height: int) -> tuple[Transition, ...]:
    """The deterministic sampler of rectified flow, on the model's own schedule."""
    return transitions(model.schedule(steps, width, height), "Flow", 0.0)


def initial_noise(seed: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """Standard normal [*shape], float32, from the CPU's generator: equal on every device and in any company."""
    return torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(seed)).to(device)


BUCKETS = (2, 4, 8, 16)


def in_buckets(forward: Forward, fixed_rows: int = 0) -> Forward:
    """`forward` in pieces of at most 16 rows, each padded to 2, 4, 8 or 16 rows: few shapes, for each of which kernels
    are chosen once. With `fixed_rows`, every piece has exactly so many.

    The kernels that libraries choose depend on the number of rows, and the last bits of a result on the kernel.
    Measured on a CPU: the same row differs by 1e-6 (float32) or 1e-2 (bfloat16) between batches of 1, 2 and 4. With one
    shape for all, an image is the same alone and in company, and a lone one pays for the whole shape.
    """
    sizes = (fixed_rows,) if fixed_rows else BUCKETS

    def run(latents: Tensor, sigmas: Tensor, prompts: Mapping[str, Tensor], guidance: Tensor) -> Tensor:
        pieces = []
        for start in range(0, len(latents), sizes[-1]):
            present = len(latents[start : start + sizes[-1]])
            rows = next(size for size in sizes if size >= present)

            def piece(tensor: Tensor, start: int = start, present: int = present, rows: int = rows) -> Tensor:
                part = tensor[start : start + present]
                return part if present == rows else torch.cat([part, part[:1].expand(rows - present, *part.shape[1:])])

            told = {name: piece(tensor) for name, tensor in prompts.items()}
            pieces.append(forward(piece(latents), piece(sigmas), told, piece(guidance))[:present])
        return torch.cat(pieces)

    return run


def advance(model: Model, forward: Forward, rows: Sequence[Row]) -> None:
    """One solver step for every row, or, where it raises, for none. Rows share the shape of their latents and nothing
    else. `forward`: the model's own, in buckets."""
    device, steps = model.device, [row.path[row.step] for row in rows]
    prompts = model.prompts(
        [row.conditioning for row in rows], [row.negative for row in rows], [row.scales for row in rows]
    )
    sigmas = torch.tensor([step.sigma for step in steps], dtype=torch.float32, device=device)
    with arithmetic(device, model.dtype):
        velocity = guided_velocity(forward, torch.stack([row.latents for row in rows]), sigmas, prompts)
    # Row by row: a batched update would round differently where vector registers end.
    after = [step.a * row.latents + step.b * v for row, step, v in zip(rows, steps, velocity, strict=True)]
    if device.type == "cuda":
        # Errors of a kernel belong to the tick that launched it, and so does its time.
        torch.cuda.synchronize(device)
    for row, latents in zip(rows, after, strict=True):
        row.latents = latents
        row.step += 1
