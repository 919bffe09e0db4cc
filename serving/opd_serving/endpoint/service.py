"""What the routes and the command line share: a body in, image files out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd_core.errors import InvalidError, OPDError, UnavailableError

from opd_serving.endpoint import images, parameters
from opd_serving.endpoint.engine import Engine, GenerationError, Pixels
from opd_serving.endpoint.errors import ApiError
from opd_serving.endpoint.parameters import Order
from opd_serving.endpoint.served import Served


@dataclass(frozen=True)
class Service:
    """A model, the engine that draws with it, and its limits. `keys`: digests of the API keys; none: open to all."""

    served: Served
    engine: Engine
    max_pixels: int
    max_request_seconds: float
    keys: tuple[str, ...] = ()

    def order(self, body: Mapping[str, Any]) -> Order:
        """Check a body against the model in service; needs a loaded engine."""
        return parameters.parse(
            body,
            served_name=self.served.name,
            defaults=self.served.defaults,
            model=self.engine.model,
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
                images.Provenance(served.name, served.digest, seed, request.steps, request.guidance),
            )
            for image, seed in zip(pixels, request.seeds, strict=True)
        ]


def generate_here(service: Service, body: Mapping[str, Any]) -> list[tuple[bytes, int]]:
    """Files and seeds that the endpoint would answer `body` with, computed in this process and without HTTP.

    Raises:
        OPDError: what the endpoint would have refused, or why the model cannot be loaded.
    """
    engine = service.engine
    engine.start()
    try:
        engine.wait_loaded()
        order = service.order(body)
        files = service.files(order, engine.submit(order.request).result())
    except ApiError as error:
        raise (InvalidError if error.status < 429 else UnavailableError)(error.message) from error
    except GenerationError as error:
        raise OPDError(str(error)) from error
    finally:
        engine.stop()
    return list(zip(files, order.request.seeds, strict=True))
