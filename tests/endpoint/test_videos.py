"""Videos as MP4: what plays is what was made."""

import base64
import io

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from opd_core.scales import Scales
from opd_serving.endpoint.images import Provenance, encode

from tests.browser import browsing

MADE_BY = Provenance("a <model>", "sha256:0", seed=7, steps=4, scales=Scales(3.0))


@pytest.fixture(scope="module")
def frames() -> NDArray[np.uint8]:
    """Smooth colours that move, [9, 48, 64, 3]."""
    i, y, x = np.meshgrid(np.arange(9), np.arange(48), np.arange(64), indexing="ij")
    return np.stack([20 * i + y, 2 * y + x, 255 - 2 * x - 3 * i], axis=-1).clip(0, 255).astype(np.uint8)


def play(file: bytes) -> tuple[NDArray[np.uint8], float, str]:
    """Frames, how many a second, and the comment."""
    with av.open(io.BytesIO(file)) as opened:
        (stream,) = opened.streams.video
        assert stream.codec_context.name == "h264"
        assert stream.average_rate is not None
        played = np.stack([frame.to_ndarray(format="rgb24") for frame in opened.decode(stream)])
        return played, float(stream.average_rate), opened.metadata["comment"]


def test_it_plays_as_it_was_made(frames: NDArray[np.uint8]) -> None:
    played, rate, comment = play(encode(frames, "mp4", 100, MADE_BY, 16))
    assert (played.shape, rate) == (frames.shape, 16)
    away = np.abs(played.astype(int) - frames)
    assert away.mean() < 3, "colours of 4:2:0"
    for text in ("trainedAlgorithmicMedia", 'opd:seed="7"', 'opd:model="a &lt;model&gt;"'):
        assert text in comment


def test_a_browser_plays_it(frames: NDArray[np.uint8]) -> None:
    file = base64.b64encode(encode(frames, "mp4", 90, MADE_BY, 16)).decode()
    with browsing() as (page, wrong):
        page.set_content(f'<video muted src="data:video/mp4;base64,{file}"></video>')
        video = page.locator("video")
        shown = video.evaluate(
            "async (it) => { await it.play(); return [it.videoWidth, it.videoHeight, it.duration]; }"
        )
    assert shown[:2] == [64, 48]
    assert abs(shown[2] - 9 / 16) < 0.05
    assert not wrong


def test_the_same_frames_give_the_same_bytes(frames: NDArray[np.uint8]) -> None:
    assert encode(frames, "mp4", 100, MADE_BY, 16) == encode(frames, "mp4", 100, MADE_BY, 16)


def test_less_quality_is_a_smaller_file_that_is_further_away(frames: NDArray[np.uint8]) -> None:
    noisy = (frames + np.random.default_rng(0).integers(0, 40, frames.shape)).clip(0, 255).astype(np.uint8)
    files = [encode(noisy, "mp4", quality, MADE_BY, 16) for quality in (100, 50, 0)]
    assert sorted(map(len, files), reverse=True) == list(map(len, files))
    away = [np.abs(play(file)[0].astype(int) - noisy).mean() for file in files]
    assert sorted(away) == away
