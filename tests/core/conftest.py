from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.peft_loras import save_trained


@pytest.fixture
def trained(tiny_base: Path, tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """A function that makes a PEFT model whose every number is trained, and its save_pretrained folder."""

    def make(**options: Any) -> tuple[Any, Path]:
        return save_trained(tiny_base, tmp_path / "peft", **options), tmp_path / "peft"

    return make
