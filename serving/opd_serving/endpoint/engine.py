"""One thread that owns the device: it receives requests, admits them, steps and finishes their images, tick by tick.

It knows no HTTP: who asks is a name, and what cannot be taken is an error of the project's own.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

import torch
from opd_core.artifacts import SamplingDefaults
from opd_core.device import is_out_of_memory
from opd_core.diffusion.guidance import Forward
from opd_core.errors import InvalidError, UnavailableError
from opd_core.families.guidance import Guidance
from opd_core.models.networks import by_network
from opd_core.models.pipeline import Model

from opd_serving.endpoint import memory, sampling, scheduler
from opd_serving.endpoint.admission import Room
from opd_serving.endpoint.conditionings import ConditioningCache
from opd_serving.endpoint.metrics import Metrics
from opd_serving.endpoint.request import Drawn, ImageRequest, Job, Pixels, Sample

# The device is taken for broken after so many ticks in a row that failed: a CUDA error stays until the process ends.
_BROKEN_AFTER = 3
_LEAST_HANG_SECONDS = 60.0
_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


class Status(StrEnum):
    LOADING = "loading"
    READY = "ready"
    LEAVING = "leaving"  # still answers, but wants no more clients
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True)
class Limits:
    """How much the engine takes on. An image counts as one of the default size and steps here.

    Args:
        max_batch_size: images that one tick advances, and their pixels: of larger images, fewer.
        max_queued_images: admitted images beyond those, and their work.
        fixed_rows: rows of every forward pass, so that an image does not depend on its company; 0 takes as many as
            there are, rounded up to 2, 4, 8 or 16.
    """

    max_batch_size: int = 16
    max_queued_images: int = 64
    fixed_rows: int = 0

    @property
    def capacity(self) -> int:
        return self.max_batch_size + self.max_queued_images


class NotReadyError(UnavailableError):
    """Nothing is taken now; `status` says why."""

    def __init__(self, status: Status) -> None:
        why = {
            Status.LOADING: "the model is not loaded yet; try later",
            Status.FAILED: "the model has failed and this server ends; try later",
        }
        super().__init__(why.get(status, "the server is shutting down; send the request again"))
        self.status = status


class FullError(UnavailableError):
    """There is no room for the request; in `seconds` there will be."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the server has as much to do as it takes on; try again in {seconds} s")
        self.seconds = seconds


class TooLargeError(InvalidError):
    """The request can never be served here; `parameter` says what to change."""

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class GenerationError(Exception):
    """The model failed on a request; `stage` is encode, step or decode."""

    def __init__(self, stage: str) -> None:
        super().__init__(f"the image could not be computed: {stage} failed")
        self.stage = stage


class Engine:
    """Start it, `submit` requests from any thread, cancel by cancelling their future, `stop` it."""

    def __init__(
        self,
        load: Callable[[], Model],
        guidance: Guidance,
        defaults: SamplingDefaults,
        limits: Limits,
        metrics: Metrics | None = None,
    ) -> None:
        self.limits, self.metrics = limits, metrics or Metrics()
        self.hang_seconds = _LEAST_HANG_SECONDS  # for one piece of work; more on a device that is slow
        self._load, self._defaults = load, defaults
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._guided = guidance.guides(defaults.scales)
        default = self._default(defaults.steps)
        # Shared with submitters, under _wake:
        self._wake = threading.Condition()
        self._status = Status.LOADING
        self._error: BaseException | None = None
        self._jobs: dict[Job, None] = {}  # in flight, in order of arrival
        self._inbox: list[Job] = []
        self._room = Room(limits.capacity, limits.capacity * default.work, limits.max_batch_size)
        self._rate = 0.0  # work per second
        self._stopping = False
        self._loaded = threading.Event()
        # The engine thread's own:
        self._samples: list[Sample] = []  # unfinished, in order of arrival
        self._served: scheduler.Served = {}
        self._batch = memory.BatchLimit(limits.max_batch_size * default.pixels)
        self._measured = (0.0, 0.0)  # work and seconds of the last ticks
        self._failed_ticks = 0
        self._busy_since: float | None = None  # the piece of work that is being done

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
        """False when only a restart helps: the thread has ended, hangs, or fails at whatever it does."""
        return self._thread.is_alive() and self._failed_ticks < _BROKEN_AFTER and not self.hangs

    @property
    def hangs(self) -> bool:
        """Whether a piece of work takes longer than any should."""
        busy_since = self._busy_since
        return busy_since is not None and time.monotonic() - busy_since > self.hang_seconds

    @property
    def idle(self) -> bool:
        return not self._jobs

    @property
    def leaving(self) -> bool:
        """Whether clients should go elsewhere with their next request."""
        return self._status in (Status.LEAVING, Status.DRAINING, Status.FAILED)

    def require_ready(self) -> None:
        """Raises NotReadyError where a request would not be taken."""
        status = self._status
        if status in (Status.READY, Status.LEAVING):
            if self.alive:
                return
            status = Status.FAILED
        self.metrics.rejected.labels(status.value).inc()
        raise NotReadyError(status)

    def submit(self, request: ImageRequest, client: str = "", id: str = "") -> Future[Drawn]:
        """The future raises GenerationError or TooLargeError. Cancel it to give up.

        Args:
            client: in whose turn it is drawn. id: its name in the log.

        Raises:
            NotReadyError. FullError: not now. TooLargeError: more images than this server ever takes at once.
        """
        images, capacity = len(request.seeds), self.limits.capacity
        if images > capacity:
            raise TooLargeError("n", f"n is {images}; this server takes at most {capacity} images at once")
        with self._wake:
            self.require_ready()
            seconds = self._room.ask(client, images, request.work, self._jobs, self._rate, time.monotonic())
            if seconds is not None:
                self.metrics.rejected.labels("queue_full").inc()
                raise FullError(seconds)
            job = Job(id, client, request, request.work)
            self._jobs[job] = None
            self._inbox.append(job)
            self._wake.notify()
        return job.future

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

    def abandon(self) -> None:
        """Answer everybody at once, and wait for nothing: the thread has ended, or hangs."""
        with self._wake:
            self._status, self._stopping = Status.FAILED, True
            jobs = list(self._jobs)
            self._wake.notify()
        for job in jobs:
            job.future.cancel()

    def stop(self) -> None:
        """End the thread after its tick; what is unfinished is cancelled."""
        alive = self.alive
        with self._wake:
            self._stopping = True
            self._wake.notify()
        # Loading cannot be interrupted, nor what hangs, and a daemon thread need not be waited for.
        if self._loaded.is_set() and alive:
            self._thread.join()

    # ------------------------------------------------------------------------------------------ engine thread

    def _run(self) -> None:
        try:
            self._prepare()
            with torch.inference_mode():
                while self._receive():
                    self._tick()
        except BaseException as error:
            self._status = Status.FAILED
            if self._loaded.is_set():
                _log.exception("the engine has ended")
            else:
                self._error = error  # whoever waits for the model raises it
        finally:
            with self._wake:
                jobs, self._jobs = list(self._jobs), {}
            for job in jobs:
                job.future.cancel()
            self._busy_since = None
            self._loaded.set()

    def _prepare(self) -> None:
        self._model = self._load()
        self._conditionings = ConditioningCache(self._model, self._defaults.max_sequence_length)
        self._forward: Forward = by_network(
            self._model, sampling.in_buckets(self._model.forward, self.limits.fixed_rows)
        )
        with torch.inference_mode():
            self._warm_up()
        with self._wake:
            if self._status == Status.LOADING:
                self._status = Status.READY
        self._loaded.set()

    def _warm_up(self) -> None:
        """Two steps and one decoding: compiles kernels, finds a model that does not work before a user does, and
        measures."""
        request = self._default(steps=2)
        sample = Sample(Job("", "", request, 0.0), 0)
        began = time.monotonic()
        row = self._start(sample)
        self._advance([row])
        second = time.monotonic()
        self._advance([row])
        self._measure(request.step_work, time.monotonic() - second)
        self._decode(row)
        self.hang_seconds = max(self.hang_seconds, 4 * self.limits.max_batch_size * (time.monotonic() - began))

    def _default(self, steps: int) -> ImageRequest:
        """An image as it is when nobody asks for anything else."""
        d = self._defaults
        return ImageRequest("", "", (0,), d.width, d.height, steps, d.scales, self._guided, d.frames)

    def _receive(self) -> bool:
        """Let new jobs in and cancelled ones out; waits for work. False: stop."""
        with self._wake:
            self._busy_since = None
            while not (self._inbox or self._samples or self._stopping):
                self._wake.wait()
            if self._stopping:
                return False
            arrived, self._inbox = self._inbox, []
            cancelled = [job for job in self._jobs if job.future.cancelled()]
        self._beat()
        for job in arrived:
            job.samples = [Sample(job, seed) for seed in job.request.seeds]
            self._samples += job.samples
        for job in cancelled:
            self._release(job)
        self._gauge()
        return True

    def _beat(self) -> None:
        self._busy_since = time.monotonic()

    def _tick(self) -> None:
        began = time.monotonic()
        for sample in self._plan():
            if sample.row is None and sample.job in self._jobs:
                self._begin(sample)
        # Again, because jobs whose prompt could not be encoded have left.
        batch = [sample for sample in self._plan() if sample.row is not None]
        if not batch or not self._step(batch):
            return
        self._failed_ticks = 0
        self.metrics.step_seconds.observe(time.monotonic() - began)
        self.metrics.batch_size.observe(len(batch))
        self._served = scheduler.charge(self._served, self._samples, batch)
        with self._wake:
            for sample in batch:
                sample.job.work_left -= sample.work
        for sample in batch:
            if sample.row is not None and sample.row.step == len(sample.row.path) and sample.job in self._jobs:
                self._finish(sample)
        if not self._samples:
            self._served = {}
        self._measure(sum(sample.work for sample in batch), time.monotonic() - began)

    def _plan(self) -> list[Sample]:
        return scheduler.plan(self._samples, self._served, self.limits.max_batch_size, self._batch.pixels)

    def _begin(self, sample: Sample) -> None:
        """Prompt and noise of a sample whose turn has come for the first time."""
        sample.row = self._attempt(sample.job, "encode", lambda: self._start(sample))
        if sample is sample.job.samples[0]:
            self.metrics.queue_seconds.observe(time.monotonic() - sample.job.admitted)

    def _start(self, sample: Sample) -> sampling.Row:
        model, request = self._model, sample.job.request
        prompt = self._conditionings.get(request.prompt)
        negative = self._conditionings.get(request.negative_prompt, negative=True) if request.guided else prompt
        sample.job.truncated = prompt.truncated or negative.truncated
        shape = model.latent_shape(request.width, request.height, request.frames)
        return sampling.Row(
            sampling.initial_noise(sample.seed, shape, model.device),
            sampling.euler_path(model, request.steps, request.width, request.height),
            prompt.conditioning,
            negative.conditioning,
            request.scales,
        )

    def _step(self, batch: list[Sample]) -> bool:
        """One step of every sample in `batch`; False: of none."""
        pixels = sum(sample.pixels for sample in batch)
        try:
            self._advance([sample.row for sample in batch if sample.row])
        except Exception as error:
            if not is_out_of_memory(error):
                self._failed_ticks += 1
                for job in dict.fromkeys(sample.job for sample in batch):
                    self._fail(job, "step")
                return False
        else:
            self._batch.fitted()
            return True
        self._ran_out("a step of %d images, %d pixels", len(batch), pixels)
        if len(batch) > 1:
            self._batch.too_much(pixels)  # the next tick takes fewer
        else:
            self._refuse(batch[0].job)
        return False

    def _advance(self, rows: list[sampling.Row]) -> None:
        self._beat()
        sampling.advance(self._model, self._forward, rows)

    def _finish(self, sample: Sample) -> None:
        job, row = sample.job, sample.row
        assert row is not None
        sample.image = self._attempt(job, "decode", lambda: self._decode(row))
        if sample.image is None:
            return
        sample.row = None
        self._samples.remove(sample)
        self.metrics.images.inc()
        images = [each.image for each in job.samples if each.image is not None]
        if len(images) == len(job.samples):
            self._release(job)
            if job.future.set_running_or_notify_cancel():
                job.future.set_result(Drawn(images, job.truncated))

    def _decode(self, row: sampling.Row) -> Pixels:
        """One image at a time: its bytes do not depend on others, its memory is bounded, a failure is its own."""
        if not torch.isfinite(row.latents).all():
            raise ArithmeticError("the transformer gave non-finite numbers")
        (image,) = self._model.decode(row.latents[None])
        if not torch.isfinite(image).all():
            raise ArithmeticError("the image decoder gave non-finite numbers")
        pixels: Pixels = (image * 255).round().to(torch.uint8).movedim(-3, -1).contiguous().cpu().numpy()
        return pixels

    # ------------------------------------------------------------------------------------------ what goes wrong

    def _attempt(self, job: Job, stage: str, work: Callable[[], _Result]) -> _Result | None:
        """The result of `work`, which cannot be done in smaller pieces, or None: then the job has failed. Where memory
        ran out, it is done again without what PyTorch kept of it for later."""
        for _ in range(2):
            self._beat()
            try:
                return work()
            except Exception as error:
                if not is_out_of_memory(error):
                    self._fail(job, stage)
                    return None
            self._ran_out("%s of one image, %d pixels", stage, job.request.pixels)
        self._refuse(job)
        return None

    def _ran_out(self, what: str, *values: object) -> None:
        _log.warning(f"out of memory: {what}", *values)
        self.metrics.out_of_memory.inc()
        memory.free(self._model.device)

    def _refuse(self, job: Job) -> None:
        """One image alone does not fit: the request's fault, and no reason to repeat it."""
        message = f"an image of {job.request.size} does not fit into this server's memory; ask for a smaller size"
        self._end(job, TooLargeError("size", message))

    def _fail(self, job: Job, stage: str) -> None:
        """Called while an exception is handled: it goes to the log, its stage to the client."""
        _log.exception("%s failed: %s", stage, job)
        self.metrics.failures.labels(stage).inc(sum(sample.image is None for sample in job.samples))
        self._end(job, GenerationError(stage))

    def _end(self, job: Job, error: Exception) -> None:
        self._release(job)
        if job.future.set_running_or_notify_cancel():
            job.future.set_exception(error)

    def _release(self, job: Job) -> None:
        """Forget a job that is done, failed or cancelled."""
        self._samples = [sample for sample in self._samples if sample.job is not job]
        with self._wake:
            self._jobs.pop(job, None)
        self._gauge()

    def _measure(self, work: float, seconds: float) -> None:
        """A moving average, in which a tick weighs as much as it took: lone images say little about a full batch."""
        self._measured = (0.9 * self._measured[0] + work, 0.9 * self._measured[1] + seconds)
        self._rate = self._measured[0] / max(self._measured[1], 1e-9)

    def _gauge(self) -> None:
        waiting = [sample for sample in self._samples if sample.row is None]
        self.metrics.queue_depth.set(len(waiting))
        self.metrics.queue_pixels.set(sum(sample.pixels for sample in waiting))
        self.metrics.active_samples.set(len(self._samples) - len(waiting))
        with self._wake:
            self.metrics.backlog.set(sum(job.work_left for job in self._jobs))
        self.metrics.batch_pixels.set(self._batch.pixels)
        if self._model.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self._model.device)
            self.metrics.gpu_memory.labels("allocated").set(torch.cuda.memory_allocated(self._model.device))
            self.metrics.gpu_memory.labels("reserved").set(torch.cuda.memory_reserved(self._model.device))
            self.metrics.gpu_memory.labels("free").set(free)
