"""Scores of base and teachers, which runs of one spec have in common."""

import os
import shutil
from pathlib import Path


def copy_scores(source: Path, target: Path) -> None:
    """Of base and teachers, with their images, from one evaluation's folder to another's that has none yet.

    The evaluator reads back what was scored under its own key, which names all that scores depend on: what does not
    belong there is scored again.
    """
    models = [file.stem for file in source.glob("*.json") if file.stem == "base" or file.stem.startswith("teacher-")]
    for model in models:
        if not (target / f"{model}.json").exists():
            shutil.copytree(source / "images" / model, target / "images" / model, dirs_exist_ok=True)
            partial = target / f".{model}.{os.getpid()}"
            shutil.copy(source / f"{model}.json", partial)
            partial.replace(target / f"{model}.json")  # whole, or not there: runs go side by side
