"""For those who run the server: health of Kubernetes and of the Open Inference Protocol, and Prometheus' metrics."""

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from opd_serving.endpoint.engine import Status
from opd_serving.endpoint.errors import ApiError
from opd_serving.endpoint.service import Service


class Live(BaseModel):
    live: bool


class Ready(BaseModel):
    ready: bool
    status: Status


class ProtocolError(BaseModel):
    """What every error under /v2 answers."""

    error: str


_UNAVAILABLE: dict[int | str, dict[str, Any]] = {503: {"description": "Not now"}}
_NO_MODEL: dict[int | str, dict[str, Any]] = {404: {"model": ProtocolError, "description": "Another model"}}
_TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}, "description": "Prometheus' format"}}


def operations(service: Service) -> APIRouter:
    """These routes know no keys: probes and Prometheus have none."""
    router, engine, served = APIRouter(), service.engine, service.served

    def answer_live() -> Response:
        live = Live(live=engine.alive)
        return JSONResponse(live.model_dump(), 200 if live.live else 503)

    def answer_ready() -> Response:
        ready = Ready(ready=engine.status == Status.READY and engine.alive, status=engine.status)
        return JSONResponse(ready.model_dump(), 200 if ready.ready else 503)

    def only(name: str) -> None:
        if name not in service.names:
            raise ApiError(404, f"model {name[:100]!r} is not served here; use {served.name!r}")

    # Coroutines, so that a probe does not wait for a free thread.
    async def live() -> Response:
        return answer_live()

    async def ready() -> Response:
        return answer_ready()

    async def model_ready(name: str) -> Response:
        only(name)
        return answer_ready()

    async def version_ready(name: str, version: str) -> Response:
        only(name)
        if version != "1":
            raise ApiError(404, f"{served.name!r} has version 1 alone")
        return answer_ready()

    async def server() -> dict[str, Any]:
        return {"name": "diffusion-opd", "version": "1", "extensions": []}

    async def model(name: str) -> dict[str, Any]:
        only(name)
        return {"name": served.name, "versions": ["1"], "platform": "diffusion-opd", "inputs": [], "outputs": []}

    async def metrics() -> Response:
        return Response(generate_latest(engine.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    for path in ("/livez", "/v2/health/live"):
        router.get(path, summary="Live: a restart would not help", response_model=Live, responses=_UNAVAILABLE)(live)
    for path in ("/readyz", "/health", "/v2/health/ready"):
        router.get(path, summary="Ready: takes requests", response_model=Ready, responses=_UNAVAILABLE)(ready)
    router.get("/v2", summary="Open Inference Protocol: the server")(server)
    for path, route in (
        ("/v2/models/{name:path}/versions/{version}/ready", version_ready),
        ("/v2/models/{name:path}/ready", model_ready),
    ):
        about = "Open Inference Protocol: this model takes requests"
        router.get(path, summary=about, response_model=Ready, responses=_UNAVAILABLE | _NO_MODEL)(route)
    router.get("/v2/models/{name:path}", summary="Open Inference Protocol: the model", responses=_NO_MODEL)(model)
    router.get("/metrics", summary="Prometheus metrics", response_class=Response, responses=_TEXT)(metrics)
    return router
