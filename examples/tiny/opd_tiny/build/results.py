"""Scores base and teachers on the held-out prompts, and writes the result table and image grids."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import rewards
from ..scenes import TASKS
from .flow import GUIDANCE, SAMPLING_STEPS, sample
from .models import load_pipeline
from .reader import accuracy
from .vae import load_vae, psnr

_NOISE_SEED = 7
_GRID_COLUMNS, _GRID_ZOOM, _GRID_GAP = 12, 3, 2


def write_results(world: Path, report: Path, grids: Path) -> None:
    """Score the pipeline and the teachers under ``world``; write ``report`` (Markdown) and a PNG per task in ``grids``.

    A grid has a row for base and for every teacher, a column for each of the first held-out prompts; all models start
    from the same noise.
    """
    names = ("base", *TASKS)
    rows = []
    strips: dict[str, list[Tensor]] = {task: [] for task in TASKS}
    for name in names:
        pipeline = load_pipeline(world / "base")
        if name != "base":
            pipeline.load_lora_weights(world / "teachers" / name, adapter_name=name)
        cells = []
        for task in TASKS:
            records = _records(world / "prompts" / f"{task}.heldout.jsonl")
            pictures = sample(pipeline, [r["prompt"] for r in records], _NOISE_SEED)
            cells.append(_interval(_scores(task, pictures, records)))
            strips[task].append(pictures[:_GRID_COLUMNS])
        rows.append(f"| {'base' if name == 'base' else f'teacher `{name}`'} | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    grids.mkdir(parents=True, exist_ok=True)
    for task, strip in strips.items():
        _save_grid(strip, grids / f"{task}.png")
    report.write_text("\n".join(_report(rows, world)) + "\n", encoding="utf-8")


def _report(rows: Sequence[str], world: Path) -> list[str]:
    return [
        "# Results",
        "",
        f"Mean reward and 95 % bootstrap interval on 256 held-out prompts; guidance {GUIDANCE}, {SAMPLING_STEPS} Euler",
        "steps, the same noise for every model; fp16 weights computed in fp32. Written by `python -m opd_tiny.build`.",
        "",
        f"| model | {' | '.join(TASKS)} |",
        "|---|---|---|---|",
        *rows,
        "",
        f"- Digit reader: {accuracy():.1%} of digits drawn with the 1,000 test glyphs read correctly.",
        f"- Autoencoder: {psnr(load_vae(world / 'base' / 'vae')):.1f} dB PSNR on web-style pictures of test glyphs.",
        "",
        f"Rows of each grid: base, then the teachers {', '.join(TASKS)}; columns: the first held-out prompts.",
        *(f"\n`{task}`: ![{task}](grids/{task}.png)" for task in TASKS),
    ]


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _scores(task: str, pictures: Tensor, records: Sequence[Mapping[str, Any]]) -> Tensor:
    reward: rewards.RewardFn = getattr(rewards, task)(torch.device("cpu"))
    return reward(pictures, [r["prompt"] for r in records], records)


def _interval(scores: Tensor) -> str:
    """Mean and percentile-bootstrap interval over 2,000 resamples of the prompts."""
    values = scores.numpy()
    picked = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    low, high = np.quantile(values[picked].mean(1), [0.025, 0.975])
    return f"{values.mean():.3f} ({low:.3f} to {high:.3f})"


def _save_grid(strips: Sequence[Tensor], path: Path) -> None:
    """One row of pictures ``[N, 3, H, W]`` in 0..1 per strip."""
    pictures = torch.nn.functional.pad(torch.stack(list(strips)), (0, _GRID_GAP, 0, _GRID_GAP))
    rows, columns, _, height, width = pictures.shape
    pixels = (pictures * 255).round().byte().permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3).numpy()
    zoomed = (columns * width * _GRID_ZOOM, rows * height * _GRID_ZOOM)
    Image.fromarray(pixels).resize(zoomed, Image.Resampling.NEAREST).save(path, optimize=True)
