"""What a spec may ask for is in the images: nobody can install anything in a container with a read-only root."""

import re
from importlib.metadata import requires
from pathlib import Path

import pytest


def pinned(file: Path) -> set[str]:
    return {name.lower() for name in re.findall(r"^([\w.-]+)==(?!.*'never')", file.read_text(), re.M)}


def extra(name: str) -> set[str]:
    """Packages that an extra of this project adds."""
    found = [each for each in requires("diffusion-opd") or [] if each.endswith(f"extra == '{name}'")]
    return {re.split(r"[^\w.-]", each, maxsplit=1)[0].lower() for each in found}


@pytest.mark.parametrize("file", ["trainer", "serving"])
def test_buckets_can_be_read(file: str, repository: Path) -> None:
    assert extra("s3") == {"s3fs"}
    assert extra("s3") <= pinned(repository / "requirements" / f"{file}.txt")


def test_the_trainer_has_what_rewards_need(repository: Path) -> None:
    """And the cv2 that rapidocr imports, without the windows that need libGL of the system."""
    found = pinned(repository / "requirements" / "trainer.txt")
    assert {"open-clip-torch", "rapidocr-onnxruntime"} == extra("rewards")
    assert extra("rewards") | {"opencv-python-headless"} <= found
    assert "opencv-python" not in found
