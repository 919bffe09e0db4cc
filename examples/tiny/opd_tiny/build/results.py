"""Scores bases and teachers on the held-out prompts, and writes the result tables and image grids."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from opd_core.models.pipeline import load_model
from PIL import Image
from torch import Tensor

from .. import rewards
from ..scenes import TASKS
from .flow import GUIDANCE, SAMPLING_STEPS, sample
from .reader import accuracy
from .vae import load_vae, psnr
from .world import World
from .worlds import WORLDS

_NOISE_SEED = 7
_GRID_COLUMNS, _GRID_ZOOM, _GRID_GAP = 12, 3, 2
_RUNS = Path("runs")


def write_results(place: Path) -> None:
    """Score base and teachers of every world under ``place``; write RESULTS.md there (Markdown) and a PNG per task in
    ``grids``.

    A grid has a row for base and for every teacher, a column for each of the first held-out prompts; all models start
    from the same noise. What students keep is taken from the finished runs of the worlds' specs under ``runs``.
    """
    first, students = WORLDS[0], list(_of_students(place))
    lines = [
        "# Results",
        "",
        f"Mean reward and 95 % bootstrap interval on 256 held-out prompts; guidance {GUIDANCE}, {SAMPLING_STEPS} Euler",
        "steps, the same noise for every model of a world; fp16 weights computed in fp32. Written by",
        "`python -m opd_tiny.build`.",
    ]
    for world in WORLDS:
        lines += ["", f"## {world.title}", "", *_of_world(world, place, Path("grids", world.name))]
    lines += [
        "",
        f"- Digit reader: {accuracy():.1%} of digits drawn with the 1,000 test glyphs read correctly.",
        f"- Autoencoder: {psnr(load_vae(place / first.folder / 'base' / 'vae')):.1f} dB PSNR on web-style pictures of"
        " test glyphs.",
        "",
        "## Students",
        "",
        *students,
    ]
    (place / "RESULTS.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _of_world(world: World, place: Path, grids: Path) -> Iterator[str]:
    """The table and the grids, which are written to ``place / grids``."""
    yield f"| model | {' | '.join(TASKS)} |"
    yield "|---|---|---|---|"
    strips: dict[str, list[Tensor]] = {task: [] for task in TASKS}
    for name in ("base", *TASKS):
        model = load_model(place / world.folder / "base")
        if name != "base":
            model.pipeline.load_lora_weights(place / world.folder / "teachers" / name, adapter_name=name)
        cells = []
        for task in TASKS:
            records = _records(place / WORLDS[0].folder / "prompts" / f"{task}.heldout.jsonl")
            pictures = sample(model, [r["prompt"] for r in records], world.tokens, _NOISE_SEED)
            cells.append(_interval(_scores(task, pictures, records)))
            strips[task].append(pictures[:_GRID_COLUMNS])
        row = f"| {'base' if name == 'base' else f'teacher `{name}`'} | {' | '.join(cells)} |"
        print(f"{world.name}: {row}", flush=True)
        yield row
    yield ""
    yield f"Rows of each grid: base, then the teachers {', '.join(TASKS)}; columns: the first held-out prompts."
    (place / grids).mkdir(parents=True, exist_ok=True)
    for task, strip in strips.items():
        _save_grid(strip, place / grids / f"{task}.png")
        yield f"\n`{task}`: ![{task}]({grids / f'{task}.png'})"


def _of_students(place: Path) -> Iterator[str]:
    """What the worlds' runs say: shares of the teachers' gains."""
    yield "Share of each teacher's gain over its base that the student keeps, with a paired 95 % bootstrap interval, by"
    yield "the evaluation of `opd run` (evaluation/summary.json): as many prompts and steps as the spec says."
    yield ""
    yield f"| spec | family | rounds | {' | '.join(TASKS)} |"
    yield "|---|---|---|---|---|---|"
    for world in WORLDS:
        run = _RUNS / Path(world.spec).stem
        file = run / "evaluation" / "summary.json"
        if not file.is_file():
            raise SystemExit(f"{file} is not there; run opd run {place / world.spec} --work {run} first")
        kept = json.loads(file.read_text())["kept"]
        rounds = json.loads((run / "spec.json").read_text())["spec"]["training"]["rounds"]
        cells = [f"{kept[task]['share']:.3f} ({kept[task]['low']:.3f} to {kept[task]['high']:.3f})" for task in TASKS]
        yield f"| [{world.spec}]({world.spec}) | {world.title} | {rounds} | {' | '.join(cells)} |"


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
