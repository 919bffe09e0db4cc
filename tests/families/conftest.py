"""The tiny pipelines as folders, made once a session."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from . import pipelines


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """The folder of a tiny pipeline by its name in `pipelines`; the package in `elsewhere` is installed meanwhile."""
    made: dict[str, Path] = {}
    sys.path.insert(0, str(Path(__file__).parent / "elsewhere"))

    def make(name: str) -> Path:
        if name not in made:
            torch.manual_seed(0)
            made[name] = tmp_path_factory.mktemp("families") / name
            pipelines.randomised(getattr(pipelines, name)()).save_pretrained(made[name])
        return made[name]

    yield make
    sys.path.remove(str(Path(__file__).parent / "elsewhere"))
