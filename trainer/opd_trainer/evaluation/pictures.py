"""Images as files, for the report."""

from pathlib import Path

from opd_core.errors import StorageError
from PIL import Image
from torch import Tensor

_LOOK_SIDE = 256  # pixels: of what is kept of every look


def save_image(image: Tensor, file: Path) -> None:
    """[3, H, W] in 0..1 as PNG.

    Raises:
        StorageError: it cannot be written.
    """
    _write(_picture(image), file)


def save_look(image: Tensor, file: Path) -> None:
    """As `save_image`, and no larger than 256 pixels a side: there are some of every look."""
    picture = _picture(image)
    picture.thumbnail((_LOOK_SIDE, _LOOK_SIDE))
    _write(picture, file)


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def _write(picture: Image.Image, file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file)
    except OSError as error:
        raise StorageError(f"cannot write {file}: {error}; free some space and start again") from error
