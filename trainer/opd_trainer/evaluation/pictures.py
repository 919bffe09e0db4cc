"""Images and videos as files, for the report: the one as PNG, the other as animated WebP."""

from pathlib import Path

from opd_core.errors import StorageError
from opd_core.video import animated_webp
from PIL import Image
from torch import Tensor

_LOOK_SIDE = 256  # pixels: of what is kept of every look


def save_image(image: Tensor, file: Path, frames_per_second: int) -> None:
    """[3, H, W] in 0..1 as FILE.png, or the frames of a video [F, 3, H, W] as FILE.webp; `file` has no suffix.

    Raises:
        StorageError: it cannot be written.
    """
    _write(_pictures(image), file, frames_per_second)


def save_look(image: Tensor, file: Path, frames_per_second: int) -> None:
    """As `save_image`, and no larger than 256 pixels a side: there are some of every look."""
    pictures = _pictures(image)
    for picture in pictures:
        picture.thumbnail((_LOOK_SIDE, _LOOK_SIDE))
    _write(pictures, file, frames_per_second)


def _pictures(image: Tensor) -> list[Image.Image]:
    frames = image if image.ndim == 4 else image[None]
    return [Image.fromarray((frame * 255).round().byte().permute(1, 2, 0).numpy()) for frame in frames]


def _write(pictures: list[Image.Image], file: Path, frames_per_second: int) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if len(pictures) == 1:
            pictures[0].save(file.with_suffix(".png"))
        else:
            file.with_suffix(".webp").write_bytes(animated_webp(pictures, frames_per_second))
    except OSError as error:
        raise StorageError(f"cannot write {file}: {error}; free some space and start again") from error
