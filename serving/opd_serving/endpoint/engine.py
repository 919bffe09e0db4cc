"""One thread that owns the device and advances everything that is in flight, tick by tick."""

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from opd_core.artifacts import SamplingDefaults
from opd_core.diffusion.guidance import Forward
from opd_core.models.pipeline import Model

from opd_serving.endpoint import sampling, scheduler
from opd_serving.endpoint.conditionings import ConditioningCache
from opd_serving.endpoint.errors import ApiError, invalid
from opd_serving.endpoint.metrics import Metrics

Pixels = NDArray[np.uint8]  # [H, W, 3]
# The device is taken for broken after so many ticks in a row that failed: a CUDA error stays until the process ends.
_BROKEN_AFTER = 3
_LOADING_RETRY_SECONDS = 5
_DRAINING_RETRY_SECONDS = 2  # another replica can answer at once
_MAX_RETRY_SECONDS = 60  # clients ignore longer ones
_log = logging.getLogger(__name__)


class Status(StrEnum):
    LOADING = "loading"
    READY = "ready"
    LEAVING = "leaving"  # still answers, but wants no more clients
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True)
class ImageRequest:
    """What to draw, checked and complete: one image for each of `seeds`."""

    prompt: str
    negative_prompt: str
    seeds: tuple[int, ...]
    width: int
    height: int
    steps: int
    guidance: float

    @property
    def step_work(self) -> int:
        """Pixels that one step of one image passes through the transformer."""
        return self.width * self.height * (1 if self.guidance == 1 else 2)


@dataclass(frozen=True)
class Limits:
    """How much the engine takes on.

    Args:
        max_batch_size: images that one tick advances. max_queued_images: admitted images beyond those.
        fixed_rows: rows of every forward pass, so that an image does not depend on its company; 0 takes rows as they
            come, which is faster where they do not fill a batch, and equal up to rounding.
    """

    max_batch_size: int = 16
    max_queued_images: int = 64
    fixed_rows: int = 8

    @property
    def capacity(self) -> int:
        return self.max_batch_size + self.max_queued_images


class GenerationError(Exception):
    """The model failed on a request; `stage` is encode, step or decode."""

    def __init__(self, stage: str) -> None:
        super().__init__(f"the image could not be computed: {stage} failed")
        self.stage = stage


@dataclass(eq=False)
class _Job:
    request: ImageRequest
    admitted: float = field(default_factory=time.monotonic)
    future: Future[list[Pixels]] = field(default_factory=Future)
    samples: list[int] = field(default_factory=list)  # ids, in the order of the request's seeds
    images: dict[int, Pixels] = field(default_factory=dict)


class Engine:
    """Start it, `submit` requests from any thread, cancel by cancelling their future, `stop` it."""

    def __init__(
        self, load: Callable[[], Model], defaults: SamplingDefaults, limits: Limits, metrics: Metrics | None = None
    ) -> None:
        self.limits, self.metrics = limits, metrics or Metrics()
        self._load, self._defaults = load, defaults
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._wake = threading.Condition()
        # Shared with submitters, under _wake:
        self._status = Status.LOADING
        self._error: BaseException | None = None
        self._inbox: list[_Job] = []
        self._in_flight = 0
        self._backlog = 0.0
        self._stopping = False
        self._loaded = threading.Event()
        # The engine thread's own:
        self._ids = itertools.count()
        self._state = scheduler.State()
        self._jobs: dict[int, _Job] = {}
        self._rows: dict[int, sampling.Row] = {}
        self._failed_ticks = 0
        self._rate = 0.0  # work per second, a moving average

    # ------------------------------------------------------------------------------------------ from any thread

    def start(self) -> None:
        self._thread.start()

    def wait_loaded(self) -> Model:
        """The model, once it is loaded and warm; raises what loading raised."""
        self._loaded.wait()
        if self._error is not None:
            raise self._error
        return self._model

    @property
    def status(self) -> Status:
        return self._status

    @property
    def model(self) -> Model:
        return self._model

    @property
    def alive(self) -> bool:
        """False when only a restart helps."""
        return self._thread.is_alive() and self._failed_ticks < _BROKEN_AFTER

    @property
    def idle(self) -> bool:
        return self._in_flight == 0

    def require_ready(self) -> None:
        """Raises the 503 that a client gets now, if it gets one."""
        if self._status in (Status.READY, Status.LEAVING):
            return
        draining = self._status == Status.DRAINING
        self.metrics.rejected.labels("draining" if draining else "loading").inc()
        raise ApiError(
            503,
            "the server is shutting down; send the request again"
            if draining
            else "the model is not loaded yet; try later",
            code=str(self._status),
            retry_after=_DRAINING_RETRY_SECONDS if draining else _LOADING_RETRY_SECONDS,
        )

    def submit(self, request: ImageRequest) -> Future[list[Pixels]]:
        """Images in the order of `request.seeds`; the future raises GenerationError. Cancel it to give up.

        Raises:
            ApiError: 503 not ready, 429 full, 400 more images than this server ever takes at once.
        """
        n, capacity = len(request.seeds), self.limits.capacity
        if n > capacity:
            raise invalid("n", f"n is {n}; this server takes at most {capacity} images at once")
        with self._wake:
            self.require_ready()
            excess = self._in_flight + n - capacity
            if excess > 0:
                self.metrics.rejected.labels("queue_full").inc()
                raise ApiError(
                    429,
                    f"{self._in_flight} images are being made or wait, of {capacity}; try again later",
                    code="queue_full",
                    retry_after=self._seconds_until_free(excess),
                )
            job = _Job(request)
            self._in_flight += n
            self._backlog += n * request.steps * request.step_work
            self._inbox.append(job)
            self._wake.notify()
        return job.future

    @property
    def leaving(self) -> bool:
        """Whether clients should go elsewhere with their next request."""
        return self._status in (Status.LEAVING, Status.DRAINING)

    def leave(self) -> None:
        """Be not ready any more, and still take what comes."""
        with self._wake:
            if self._status == Status.READY:
                self._status = Status.LEAVING

    def drain(self) -> None:
        """Finish what is in flight and admit nothing more."""
        with self._wake:
            if self._status != Status.FAILED:
                self._status = Status.DRAINING

    def stop(self) -> None:
        """End the thread after its tick; what is unfinished is cancelled."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._loaded.is_set():  # loading cannot be interrupted, and a daemon thread need not be waited for
            self._thread.join()

    def _seconds_until_free(self, images: int) -> int:
        """When `images` of those in flight will be done, at the measured speed."""
        if not self._rate:
            return 1
        seconds = self._backlog / self._rate * images / self._in_flight
        return min(max(math.ceil(seconds), 1), _MAX_RETRY_SECONDS)

    # ------------------------------------------------------------------------------------------ engine thread

    def _run(self) -> None:
        try:
            self._model = self._load()
            self._conditionings = ConditioningCache(self._model, self._defaults.max_sequence_length)
            self._forward: Forward = self._model.forward
            if self.limits.fixed_rows:
                self._forward = sampling.fixed_rows(self._model.forward, self.limits.fixed_rows)
            with torch.inference_mode():
                self._warm_up()
        except BaseException as error:
            self._error, self._status = error, Status.FAILED
            self._loaded.set()
            return
        with self._wake:
            if self._status == Status.LOADING:
                self._status = Status.READY
        self._loaded.set()
        with torch.inference_mode():
            while self._take():
                self._tick()
        for job in {*self._jobs.values(), *self._inbox}:
            job.future.cancel()

    def _warm_up(self) -> None:
        """One step and one decoding: compiles kernels, and finds a model that does not work before a user does."""
        d = self._defaults
        row = self._start(ImageRequest("", "", (0,), d.width, d.height, 1, d.guidance_scale), 0)
        self._advance([row])
        self._decode(row)

    def _take(self) -> bool:
        """Let new jobs in and cancelled ones out; waits for work. False: stop."""
        with self._wake:
            while not (self._inbox or self._state.samples or self._stopping):
                self._wake.wait()
            if self._stopping:
                return False
            arrived, self._inbox = self._inbox, []
        for job in arrived:
            self._admit(job)
        for job in {job for job in self._jobs.values() if job.future.cancelled()}:
            self._release(job)
        self._gauge()
        return True

    def _admit(self, job: _Job) -> None:
        request = job.request
        group = (request.width, request.height)  # text length is one for all
        job.samples = [next(self._ids) for _ in request.seeds]
        self._jobs.update(dict.fromkeys(job.samples, job))
        samples = (scheduler.Sample(id, group, request.steps) for id in job.samples)
        self._state = scheduler.admit(self._state, samples)

    def _tick(self) -> None:
        began = time.monotonic()
        for sample in scheduler.plan(self._state, self.limits.max_batch_size):
            if sample.step == 0 and sample.id in self._jobs:
                self._first_step(sample.id)
        # Again, because jobs whose prompt could not be encoded have left.
        batch = tuple(s for s in scheduler.plan(self._state, self.limits.max_batch_size) if s.id in self._rows)
        if not batch:
            return
        jobs = [self._jobs[sample.id] for sample in batch]
        try:
            self._advance([self._rows[sample.id] for sample in batch])
        except Exception:
            self._failed_ticks += 1
            for job in dict.fromkeys(jobs):
                self._fail(job, "step")
            return
        self._failed_ticks = 0
        self.metrics.step_seconds.observe(time.monotonic() - began)
        self.metrics.batch_size.observe(len(batch))
        self._state, finished = scheduler.advance(self._state, batch)
        work = float(sum(job.request.step_work for job in jobs))
        with self._wake:
            self._backlog -= work
        for sample in finished:
            if sample.id in self._jobs:  # an image of the same request may have failed just now
                self._finish(sample.id)
        rate = work / (time.monotonic() - began)
        self._rate = 0.9 * self._rate + 0.1 * rate if self._rate else rate

    def _first_step(self, id: int) -> None:
        job = self._jobs[id]
        try:
            self._rows[id] = self._start(job.request, job.request.seeds[job.samples.index(id)])
        except Exception:
            self._fail(job, "encode")
            return
        if id == job.samples[0]:
            self.metrics.queue_seconds.observe(time.monotonic() - job.admitted)

    def _start(self, request: ImageRequest, seed: int) -> sampling.Row:
        model = self._model
        conditioning = self._conditionings.get(request.prompt)
        return sampling.Row(
            sampling.initial_noise(seed, model.latent_shape(request.width, request.height), model.device),
            sampling.euler_path(model, request.steps, request.width, request.height),
            conditioning,
            conditioning if request.guidance == 1 else self._conditionings.get(request.negative_prompt),
            request.guidance,
        )

    def _advance(self, rows: list[sampling.Row]) -> None:
        sampling.advance(self._forward, rows, self._model.device, self._model.dtype)
        if self._model.device.type == "cuda":
            # Errors of a kernel belong to the tick that launched it, and so does its time.
            torch.cuda.synchronize(self._model.device)

    def _finish(self, id: int) -> None:
        job = self._jobs[id]
        try:
            job.images[id] = self._decode(self._rows.pop(id))
        except Exception:
            self._fail(job, "decode")
            return
        self.metrics.images.inc()
        if len(job.images) == len(job.samples):
            self._release(job)
            if job.future.set_running_or_notify_cancel():
                job.future.set_result([job.images[id] for id in job.samples])

    def _decode(self, row: sampling.Row) -> Pixels:
        """One image at a time: its bytes do not depend on others, its memory is bounded, a failure is its own."""
        if not torch.isfinite(row.latents).all():
            raise ArithmeticError("the transformer gave non-finite numbers")
        (image,) = self._model.decode(row.latents[None])
        if not torch.isfinite(image).all():
            raise ArithmeticError("the image decoder gave non-finite numbers")
        pixels: Pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
        return pixels

    def _fail(self, job: _Job, stage: str) -> None:
        """Called while an exception is handled: it goes to the log, its stage to the client."""
        _log.exception("request failed: %s", stage)
        self.metrics.failures.labels(stage).inc(len(job.samples) - len(job.images))
        self._release(job)
        if job.future.set_running_or_notify_cancel():
            job.future.set_exception(GenerationError(stage))

    def _release(self, job: _Job) -> None:
        """Forget a job that is done, failed or cancelled."""
        ids = frozenset(job.samples)
        left = sum(s.steps - s.step for s in self._state.samples if s.id in ids)
        self._state = scheduler.drop(self._state, ids)
        for id in ids:
            self._jobs.pop(id, None)
            self._rows.pop(id, None)
        with self._wake:
            self._in_flight -= len(ids)
            self._backlog -= left * job.request.step_work
        self._gauge()

    def _gauge(self) -> None:
        waiting = [s for s in self._state.samples if s.step == 0]
        pixels: list[Any] = [self._jobs[s.id].request for s in waiting]
        self.metrics.queue_depth.set(len(waiting))
        self.metrics.queue_pixels.set(sum(request.width * request.height for request in pixels))
        self.metrics.active_samples.set(len(self._state.samples) - len(waiting))
        self.metrics.backlog.set(max(self._backlog, 0.0))
        if self._model.device.type == "cuda":
            self.metrics.gpu_memory.set(torch.cuda.memory_allocated(self._model.device))
