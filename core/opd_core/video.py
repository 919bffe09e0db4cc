"""Videos as files: animated WebP, which browsers show as they show an image, and which needs no codec's library."""

import io
from collections.abc import Sequence
from itertools import pairwise

from PIL import Image


def animated_webp(
    frames: Sequence[Image.Image], frames_per_second: int, *, quality: int = 90, xmp: bytes = b""
) -> bytes:
    """A file that plays `frames` again and again. A frame lasts whole milliseconds there; all of them together last as
    long as they should. `quality`: 0..100."""
    ends = [round(1000 * i / frames_per_second) for i in range(len(frames) + 1)]
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        "webp",
        save_all=True,
        append_images=frames[1:],
        duration=[end - begin for begin, end in pairwise(ends)],
        loop=0,
        quality=quality,
        xmp=xmp,
    )
    return buffer.getvalue()
