"""From settings to a running server, and down again without losing an image."""

import asyncio
import logging
import re
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from opd_core.artifacts import SamplingDefaults
from opd_core.device import choose_device
from opd_core.errors import InvalidError
from opd_core.exit_codes import ExitCode
from opd_core.models.outline import read_outline
from opd_core.ports import in_url, listen
from opd_core.precision import TORCH_DTYPES
from opd_core.uris import resolve

from opd_serving.endpoint.app import create_app
from opd_serving.endpoint.connections import KEEP_ALIVE_SECONDS, Connection
from opd_serving.endpoint.engine import Engine, Limits, Status
from opd_serving.endpoint.gate import is_loopback
from opd_serving.endpoint.keys import KeyFile
from opd_serving.endpoint.served import Served, load, open_model, open_student
from opd_serving.endpoint.service import Service

_POLL_SECONDS = 0.05
_TAKE_SECONDS = 30  # for clients to take their answers, after the last image is made
_NAME = r"[A-Za-z0-9]([A-Za-z0-9._:@/+-]{0,126}[A-Za-z0-9])?"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """One of `student` (directory or URI) and `model` (URI or path); None leaves a sampling default to them.

    Args:
        served_name: of the model; those after the first are aliases. None: the student's own.
    """

    claims: Path
    student: str | None = None
    model: str | None = None
    served_name: Sequence[str] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    metrics_port: int | None = None
    api_keys: Path | None = None
    device: str = "auto"
    precision: str = "auto"
    limits: Limits = field(default_factory=Limits)
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    max_sequence_length: int | None = None
    max_pixels: int | None = None
    max_request_seconds: float = 600.0
    leave_seconds: float = 0.0
    drain_seconds: float = 120.0


def open_served(settings: Settings) -> Served:
    """What is to be served, with the settings' name and sampling defaults."""
    if settings.student is not None:
        student = settings.student
        folder = resolve(student, settings.claims) if "://" in student else Path(student)
        served = open_student(folder, settings.claims)
    elif settings.model is not None:
        served = open_model(settings.model, settings.claims)
    else:
        raise InvalidError("nothing to serve; name a student directory or a model")
    name = next(iter(settings.served_name), served.name)
    for each in (name, *settings.served_name):
        if not re.fullmatch(_NAME, each):
            raise InvalidError(
                f"--served-name {each!r} cannot stand in an address; use letters, digits and . _ : @ / + -"
            )
    fields = SamplingDefaults.model_fields
    changes: dict[str, Any] = {name: getattr(settings, name) for name in fields if getattr(settings, name) is not None}
    defaults = SamplingDefaults(**{**served.defaults.model_dump(), **changes})
    return replace(served, name=name, defaults=defaults)


def make_service(settings: Settings) -> Service:
    """A service whose engine loads the model once it is started."""
    served = open_served(settings)
    device = choose_device(settings.device)
    precision = settings.precision
    if precision == "auto":
        precision = "BF16" if device.startswith("cuda") else "FP32"
    if precision not in TORCH_DTYPES:
        raise InvalidError(f"--precision {precision} is unknown; write auto, {', '.join(TORCH_DTYPES)}")
    d, outline = served.defaults, read_outline(served.base)
    return Service(
        served=served,
        outline=outline,
        engine=Engine(partial(load, served, device, TORCH_DTYPES[precision]), outline.guidance, d, settings.limits),
        max_pixels=settings.max_pixels or 4 * d.width * d.height * d.frames,
        max_request_seconds=settings.max_request_seconds,
        keys=KeyFile(settings.api_keys) if settings.api_keys else None,
        loopback=is_loopback(settings.host),
        metrics_port=settings.metrics_port,
        aliases=tuple(settings.served_name[1:]),
    )


def run(settings: Settings) -> ExitCode:
    """Serve until SIGTERM or Ctrl-C, then finish what is in flight.

    Raises:
        OPDError: nothing to serve, the port is taken, or the model cannot be loaded.
    """
    service = make_service(settings)
    engine = service.engine
    listeners = [listen(settings.host, port) for port in (settings.port, settings.metrics_port) if port is not None]
    engine.start()
    asyncio.run(_serve(service, listeners, settings))
    if engine.status == Status.FAILED:
        engine.wait_loaded()  # raises why it could not be loaded
    code = ExitCode.INTERNAL if engine.status == Status.FAILED else ExitCode.OK
    engine.stop()
    return code


class _Server(uvicorn.Server):
    """The first signal asks for a drain, during which health and metrics still answer; a second one ends at once."""

    drain_asked = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.drain_asked:
            self.should_exit = self.force_exit = True
        self.drain_asked = True


def uvicorn_config(service: Service, take_seconds: float) -> uvicorn.Config:
    """`take_seconds`: how long clients may take for their answers when the server ends."""
    return uvicorn.Config(
        create_app(service),
        http=Connection,
        ws="none",
        log_level="error",
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(int(take_seconds), 1),
    )


async def _serve(service: Service, listeners: list[socket.socket], settings: Settings) -> None:
    server = _Server(uvicorn_config(service, min(settings.drain_seconds, _TAKE_SECONDS)))
    watcher = asyncio.create_task(_watch(server, service, settings))
    host, port = listeners[-1].getsockname()[:2]
    _log.info("%s loads; http://%s:%d/readyz says when it is there", service.served.name, in_url(host), port)
    await server.serve(sockets=listeners)
    await watcher


async def _watch(server: _Server, service: Service, settings: Settings) -> None:
    """Follows the engine: says when it is ready, ends the server when the engine has failed or the drain is done.

    A load balancer takes its time to hear that this server leaves, and keeps connections for as long as both sides do.
    So first everything is answered, with a wish to close the connection; only then nothing is admitted any more.
    """
    engine, announced = service.engine, False
    while not server.drain_asked and engine.alive:
        if engine.status == Status.READY and not announced:
            announced = True
            _log.info("%s (%s) takes requests", service.served.name, service.served.digest)
        await asyncio.sleep(_POLL_SECONDS)
    if not engine.alive:
        if announced:
            _log.error("the engine has failed; this process ends")
        engine.abandon()
    engine.leave()
    until = time.monotonic() + settings.leave_seconds
    while engine.alive and time.monotonic() < until and not server.force_exit:
        await asyncio.sleep(_POLL_SECONDS)
    engine.drain()
    service.bodies.close()
    _log.info("draining")
    deadline = time.monotonic() + settings.drain_seconds
    while not engine.idle and engine.alive and time.monotonic() < deadline and not server.force_exit:
        await asyncio.sleep(_POLL_SECONDS)
    if not engine.alive:
        engine.abandon()
    server.should_exit = True


def log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
