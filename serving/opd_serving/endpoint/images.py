"""Image and video files that say what made them. The same pixels and provenance give the same bytes: no dates, no host
names."""

import io
from dataclasses import dataclass
from typing import Literal
from xml.sax.saxutils import quoteattr

import numpy as np
from numpy.typing import NDArray
from opd_core.scales import Scales
from opd_core.video import animated_webp
from PIL import Image, PngImagePlugin

from opd_serving.endpoint.mp4 import mp4

Format = Literal["png", "jpeg", "webp", "mp4"]
VIDEO_FORMATS: tuple[Format, ...] = ("webp", "mp4")
_MEDIA = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


@dataclass(frozen=True)
class Provenance:
    """What is written into the file: enough to make the image again, and nothing about who asked for it."""

    model: str
    digest: str
    seed: int
    steps: int
    scales: Scales


def encode(
    pixels: NDArray[np.uint8], format: Format, compression: int, provenance: Provenance, frames_per_second: int
) -> bytes:
    """An image file of pixels [H, W, 3], or, of a video's [F, H, W, 3], an animated WebP or an MP4. `compression` is
    OpenAI's 0..100, not of png: 100 keeps the most."""
    packet = xmp(provenance)
    if pixels.ndim == 4:
        if format == "mp4":
            return mp4(pixels, frames_per_second, quality=compression, comment=packet)
        assert format == "webp"
        pictures = [Image.fromarray(frame) for frame in pixels]
        return animated_webp(pictures, frames_per_second, quality=compression, xmp=packet.encode())
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    if format == "png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", packet)
        image.save(buffer, "png", pnginfo=info)
    elif format == "jpeg":
        image.save(buffer, "jpeg", quality=compression, subsampling=0, xmp=packet.encode())
    else:
        image.save(buffer, "webp", quality=compression, xmp=packet.encode())
    return buffer.getvalue()


def xmp(provenance: Provenance) -> str:
    """XMP with IPTC's DigitalSourceType, which image viewers and platforms read as "made with AI"."""
    fields = {"model": provenance.model, "modelDigest": provenance.digest, "seed": provenance.seed}
    guidance, true_cfg = provenance.scales
    fields |= {"steps": provenance.steps, "guidance": guidance, **({"trueCfg": true_cfg} if true_cfg != 1 else {})}
    ours = " ".join(f"opd:{key}={quoteattr(str(value))}" for key, value in fields.items())
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
        f'xmlns:opd="https://opd.dev/ns/1.0/" Iptc4xmpExt:DigitalSourceType="{_MEDIA}" {ours}/>'
        '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    )
