"""What is asked for and what becomes of it: one `ImageRequest` of a client, one `Sample` for each image."""

import time
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from opd_core.scales import Scales

from opd_serving.endpoint.sampling import Row

Pixels = NDArray[np.uint8]  # [H, W, 3], or of a video [F, H, W, 3]


@dataclass(frozen=True)
class ImageRequest:
    """What to draw, checked and complete: one image, or video of so many frames, for each of `seeds`. `guided`: each
    step makes a second forward pass, with the negative prompt."""

    prompt: str
    negative_prompt: str
    seeds: tuple[int, ...]
    width: int
    height: int
    steps: int
    scales: Scales
    guided: bool
    frames: int = 1

    @property
    def pixels(self) -> int:
        """Of all frames."""
        return self.width * self.height * self.frames

    @property
    def size(self) -> str:
        """In words."""
        return f"{self.width}x{self.height}" + (f", {self.frames} frames" if self.frames > 1 else "")

    @property
    def step_work(self) -> int:
        """Pixels that one step of one image passes through the transformer."""
        return self.pixels * (2 if self.guided else 1)

    @property
    def work(self) -> int:
        return len(self.seeds) * self.steps * self.step_work


@dataclass(frozen=True)
class Drawn:
    """`images` in the order of the request's seeds. `truncated`: no text encoder read the end of the prompt."""

    images: list[Pixels]
    truncated: bool


@dataclass(eq=False)
class Job:
    """A request from admission to answer. `id` and `client` name it in the log and in the queue."""

    id: str
    client: str
    request: ImageRequest
    work_left: float
    future: Future[Drawn] = field(default_factory=Future)
    admitted: float = field(default_factory=time.monotonic)
    samples: list["Sample"] = field(default_factory=list)
    truncated: bool = False

    @property
    def images(self) -> int:
        return len(self.request.seeds)

    def __str__(self) -> str:
        r = self.request
        return f"{self.id or 'request'}: {self.images} of {r.size}, {r.steps} steps"


@dataclass(eq=False)
class Sample:
    """One image of a job: waiting (neither `row` nor `image`), on its way (`row`), or done (`image`)."""

    job: Job
    seed: int
    row: Row | None = None
    image: Pixels | None = None

    @property
    def client(self) -> str:
        return self.job.client

    @property
    def group(self) -> tuple[int, int, int]:
        request = self.job.request
        return request.width, request.height, request.frames  # rows of unlike texts are told apart in a step

    @property
    def work(self) -> int:
        return self.job.request.step_work

    @property
    def pixels(self) -> int:
        return self.job.request.pixels
