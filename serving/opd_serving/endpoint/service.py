"""What the routes and the command line share: a body in, image files out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opd_core.errors import InvalidError, OPDError
from opd_core.families.family import Outline

from opd_serving.endpoint import images, parameters
from opd_serving.endpoint.bodies import Bodies
from opd_serving.endpoint.engine import Engine, GenerationError
from opd_serving.endpoint.errors import ApiError
from opd_serving.endpoint.keys import KeyFile
from opd_serving.endpoint.metrics import Metrics
from opd_serving.endpoint.parameters import Order
from opd_serving.endpoint.request import Pixels
from opd_serving.endpoint.served import Served


@dataclass(frozen=True)
class Service:
    """A model, the engine that draws with it, and its limits.

    Args:
        outline: of the model. keys: whose requests are taken; None: everybody's.
        loopback: only this machine can ask. metrics_port: where health and metrics are; None: beside the API.
        aliases: names that the model has beside its own, for clients that ask for one of their own.
    """

    served: Served
    outline: Outline
    engine: Engine
    max_pixels: int
    max_request_seconds: float
    keys: KeyFile | None = None
    loopback: bool = False
    metrics_port: int | None = None
    aliases: Sequence[str] = ()
    bodies: Bodies = field(default_factory=Bodies)

    @property
    def names(self) -> tuple[str, ...]:
        """The model's own name first."""
        return self.served.name, *self.aliases

    @property
    def metrics(self) -> Metrics:
        return self.engine.metrics

    def order(self, body: Mapping[str, Any]) -> Order:
        """Check a body against the model in service."""
        return parameters.parse(
            body,
            names=self.names,
            defaults=self.served.defaults,
            outline=self.outline,
            max_pixels=self.max_pixels,
        )

    def files(self, order: Order, pixels: Sequence[Pixels]) -> list[bytes]:
        """Image files, one for each seed of the order."""
        request, served = order.request, self.served
        return [
            images.encode(
                image,
                order.format,
                order.compression,
                images.Provenance(served.name, served.digest, seed, request.steps, request.scales),
                self.outline.frames_per_second,
            )
            for image, seed in zip(pixels, request.seeds, strict=True)
        ]


def generate_here(service: Service, body: Mapping[str, Any]) -> list[tuple[bytes, int]]:
    """Files and seeds that the endpoint would answer `body` with, computed in this process and without HTTP.

    Raises:
        OPDError: what the endpoint would have refused, or why the model cannot be loaded.
    """
    engine = service.engine
    try:
        order = service.order(body)
    except ApiError as error:
        raise InvalidError(error.message) from error
    engine.start()
    try:
        engine.wait_loaded()
        files = service.files(order, engine.submit(order.request).result().images)
    except GenerationError as error:
        raise OPDError(str(error)) from error
    finally:
        engine.stop()
    return list(zip(files, order.request.seeds, strict=True))
