"""The HTTP API: OpenAI's Images API, Open Inference Protocol health, Prometheus metrics: a shell around the engine."""

import asyncio
import base64
import hashlib
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.resources import files
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from opd_serving.endpoint.engine import GenerationError, Pixels, Status
from opd_serving.endpoint.errors import ApiError, invalid
from opd_serving.endpoint.images import Format
from opd_serving.endpoint.keys import require_key
from opd_serving.endpoint.parameters import GenerationBody, Order, parse_json
from opd_serving.endpoint.service import Service

_MAX_BODY = 2**20
_CLIENT_CLOSED_REQUEST = 499  # nginx's; nobody reads it, the metrics count it
_DO_NOT_RETRY = {"x-should-retry": "false"}  # OpenAI's clients repeat 408 and 5xx, unless they are told
_SHORTEST_TIMEOUT = 1.0  # seconds; less than this no image takes

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class ImageData(BaseModel):
    b64_json: str
    seed: int
    revised_prompt: None = None


class ImagesResponse(BaseModel):
    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: Format
    quality: Literal["auto"] = "auto"
    size: str
    steps: int
    guidance: float
    model: str
    model_version: str


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "diffusion-opd"
    version: str


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


def create_app(service: Service) -> FastAPI:
    """The ASGI application of one engine."""
    app = FastAPI(title="Diffusion OPD image endpoint", version="1", docs_url=None, redoc_url=None)
    app.state.metrics = service.engine.metrics
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    app.add_exception_handler(Exception, _answer_crash)
    app.add_middleware(RequestIds, service=service)
    app.include_router(_openai(service))
    app.include_router(_operations(service))
    service.engine.metrics.model_info.labels(service.served.name, service.served.digest).set(1)
    return app


# ---------------------------------------------------------------------------------------------------- OpenAI's routes


def _openai(service: Service) -> APIRouter:
    def authorize(authorization: Annotated[str | None, Header(include_in_schema=False)] = None) -> None:
        if service.keys:
            require_key(authorization, service.keys)

    router = APIRouter(prefix="/v1", dependencies=[Depends(authorize)])
    served = service.served
    card = ModelCard(id=served.name, created=served.created, version=served.digest)
    schema = {"content": {"application/json": {"schema": GenerationBody.model_json_schema()}}, "required": True}

    @router.post("/images/generations", response_model=ImagesResponse, openapi_extra={"requestBody": schema})
    async def generate_images(request: Request) -> Response:
        """Make images; extensions to OpenAI's parameters: seed, steps, guidance, negative_prompt."""
        service.engine.require_ready()
        began = time.monotonic()
        # Not FastAPI's body: curl -d says it sends a form, and OpenAI answers it all the same.
        order = service.order(parse_json(await _read(request)))
        time_limit = _time_limit(request, service.max_request_seconds)
        pixels = await _wait(request, service, service.engine.submit(order.request), time_limit)
        content = await asyncio.to_thread(_content, service, order, pixels)
        service.engine.metrics.request_seconds.observe(time.monotonic() - began)
        return Response(content, media_type="application/json")

    @router.get("/models")
    async def list_models() -> ModelList:
        return ModelList(data=[card])

    @router.get("/models/{name}")
    async def show_model(name: str) -> ModelCard:
        if name != served.name:
            raise ApiError(404, f"model {name[:100]!r} is not served here", param="model", code="model_not_found")
        return card

    return router


async def _read(request: Request) -> bytes:
    content = b""
    async for chunk in request.stream():
        content += chunk
        if len(content) > _MAX_BODY:
            raise ApiError(413, f"the body is larger than {_MAX_BODY} bytes", code="body_too_large")
    return content


@dataclass(frozen=True)
class _TimeLimit:
    """After `seconds` the answer is `status`: 408 where the client asked for the limit, 504 where the server has it."""

    seconds: float
    status: int


def _time_limit(request: Request, most: float) -> _TimeLimit:
    wish = request.headers.get("x-request-timeout")
    if wish is None:
        return _TimeLimit(most, 504)
    try:
        seconds = float(wish)
    except ValueError:
        seconds = 0
    if not seconds >= _SHORTEST_TIMEOUT:
        raise invalid(
            "X-Request-Timeout",
            f"header X-Request-Timeout is {wish[:100]!r}; send seconds, at least {_SHORTEST_TIMEOUT:g}",
        )
    return _TimeLimit(seconds, 408) if seconds < most else _TimeLimit(most, 504)


async def _wait(request: Request, service: Service, future: Future[list[Pixels]], limit: _TimeLimit) -> list[Pixels]:
    """The images, unless the client leaves or the time is up: then the rows leave the batch at the next tick."""
    metrics = service.engine.metrics
    answer = asyncio.wrap_future(future)
    gone = asyncio.create_task(_disconnected(request))
    try:
        both: set[asyncio.Future[Any]] = {answer, gone}
        await asyncio.wait(both, timeout=limit.seconds, return_when=asyncio.FIRST_COMPLETED)
        if answer.cancelled():
            raise ApiError(503, "the server stopped before the images were done", code="stopped", retry_after=2)
        if answer.done():
            try:
                return answer.result()
            except GenerationError as error:
                raise ApiError(500, str(error), code=f"{error.stage}_failed") from error
        metrics.cancelled.labels("disconnect" if gone.done() else "timeout").inc()
        if gone.done():
            raise ClientDisconnect
        raise ApiError(
            limit.status,
            f"no answer within {limit.seconds:g} seconds; send less at once, or later",
            code="timeout",
            headers=_DO_NOT_RETRY,
        )
    finally:
        gone.cancel()
        answer.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _content(service: Service, order: Order, pixels: list[Pixels]) -> str:
    request, served = order.request, service.served
    files = service.files(order, pixels)
    data = [
        ImageData(b64_json=base64.b64encode(file).decode(), seed=seed)
        for file, seed in zip(files, request.seeds, strict=True)
    ]
    return ImagesResponse(
        created=int(time.time()),
        data=data,
        output_format=order.format,
        size=f"{request.width}x{request.height}",
        steps=request.steps,
        guidance=request.guidance,
        model=served.name,
        model_version=served.digest,
    ).model_dump_json()


# -------------------------------------------------------------------------------------------------------- operations


def _operations(service: Service) -> APIRouter:
    router = APIRouter()
    engine = service.engine
    page = files(__package__).joinpath("playground.html").read_text()
    policy = _only_its_own(page)

    def live() -> Response:
        return JSONResponse({"live": engine.alive}, 200 if engine.alive else 503)

    def ready() -> Response:
        ok = engine.status == Status.READY and engine.alive
        return JSONResponse({"ready": ok, "status": engine.status}, 200 if ok else 503)

    async def model_ready(name: str) -> Response:
        if name != service.served.name:
            raise ApiError(404, f"model {name[:100]!r} is not served here", param="model", code="model_not_found")
        return ready()

    async def metrics() -> Response:
        return Response(generate_latest(engine.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def answer_live() -> Response:
        return live()

    async def answer_ready() -> Response:
        return ready()

    async def playground() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    for path in ("/livez", "/v2/health/live"):
        router.get(path, summary="Live: a restart would not help")(answer_live)
    for path in ("/readyz", "/v2/health/ready"):
        router.get(path, summary="Ready: takes requests")(answer_ready)
    router.get("/v2/models/{name}/ready", summary="Open Inference Protocol: this model takes requests")(model_ready)
    router.get("/metrics", summary="Prometheus metrics")(metrics)
    router.get("/", include_in_schema=False)(playground)
    return router


def _only_its_own(page: str) -> str:
    """A Content-Security-Policy: `page` runs its own script and style and loads nothing, for keys are typed there."""

    def digest(tag: str) -> str:
        content = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


# -------------------------------------------------------------------------------------------------------- errors


def _respond(error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _respond(error)


async def _answer_http(request: Request, error: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:100]}: {error.detail}; GET /openapi.json shows what there is"
    return _respond(ApiError(error.status_code, message, code="not_found", headers=error.headers))


async def _answer_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return _respond(invalid(str(first["loc"][-1]), first["msg"]))


async def _answer_crash(request: Request, error: Exception) -> Response:
    """The stack trace goes to the log, not to the client."""
    request.app.state.metrics.failures.labels("internal").inc()
    return _respond(ApiError(500, "the server failed on this request; its log says why", code="internal_error"))


class RequestIds:
    """Plain ASGI, because Starlette's BaseHTTPMiddleware hides the client's disconnect from the route
    (https://github.com/encode/starlette/issues/2094). Counts, names, and ends requests that nobody waits for."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, status = f"req_{uuid.uuid4().hex}", 500

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(b"x-request-id", request_id.encode())]
                if self._service.engine.leaving:
                    own.append((b"connection", b"close"))  # the client's next request finds another pod
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        except ClientDisconnect:
            status = _CLIENT_CLOSED_REQUEST
        finally:
            if scope["path"].startswith("/v1/"):
                self._service.engine.metrics.requests.labels(self._service.served.name, str(status)).inc()
