"""The HTTP API: OpenAI's Images API and a page to try it, a shell around the engine."""

import asyncio
import base64
import hashlib
import time
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.resources import files
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from opd_serving.endpoint.engine import FullError, GenerationError, NotReadyError, Status, TooLargeError
from opd_serving.endpoint.errors import DO_NOT_RETRY, ApiError, ErrorBody, invalid
from opd_serving.endpoint.gate import App, Gate
from opd_serving.endpoint.images import Format
from opd_serving.endpoint.operations import operations
from opd_serving.endpoint.parameters import Order, body_schema, parse_json
from opd_serving.endpoint.request import Drawn
from opd_serving.endpoint.service import Service

_SHORTEST_TIMEOUT = 1.0  # seconds; less than this no image takes
_LOADING_RETRY_SECONDS = 5
_DRAINING_RETRY_SECONDS = 2  # another replica can answer at once


class ImageData(BaseModel):
    b64_json: str
    seed: int
    revised_prompt: None = None


class ImagesResponse(BaseModel):
    """`truncated`: no text encoder read the end of the prompt. `ignored`: parameters without any effect."""

    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: Format
    quality: Literal["auto"] = "auto"
    size: str
    frames: int
    steps: int
    guidance: float
    true_cfg: float
    model: str
    model_version: str
    truncated: bool
    ignored: list[str]


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "diffusion-opd"
    version: str


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


def create_app(service: Service) -> App:
    """The ASGI application of one engine."""
    service.metrics.model_info.labels(service.served.name, service.served.digest).set(1)
    api, apart = _application(service), _application(service)
    api.include_router(_openai(service))
    api.include_router(_playground())
    (apart if service.metrics_port else api).include_router(operations(service))
    return Gate(service, api, apart)


def _application(service: Service) -> FastAPI:
    app = FastAPI(title="Diffusion OPD image endpoint", version="1", docs_url=None, redoc_url=None)
    app.state.metrics = service.metrics
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(RequestValidationError, _answer_validation)
    app.add_exception_handler(Exception, _answer_crash)

    def describe() -> dict[str, Any]:
        """FastAPI's document without the 422 that it adds to whatever has a parameter, and that never comes."""
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for operation in (each for path in document["paths"].values() for each in path.values()):
                operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                document.get("components", {}).get("schemas", {}).pop(name, None)
            if service.keys:
                document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                for path, operations_of in document["paths"].items():
                    for operation in operations_of.values() if path.startswith("/v1/") else ():
                        operation["security"] = [{"key": []}]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]
    return app


# ---------------------------------------------------------------------------------------------------- OpenAI's routes


def _errors(described: dict[int, str]) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody, "description": text} for status, text in described.items()}


_REFUSALS = _errors({401: "No key, or an unknown one", 403: "Asked under a name that is not this machine's"})
_NO_MODEL = _errors({404: "Another model"})
_GENERATION_ERRORS = {
    **_REFUSALS,
    **_NO_MODEL,
    **_errors(
        {
            400: "A parameter is wrong; `param` says which",
            408: "`X-Request-Timeout` is over, or the body did not come",
            413: "The body is too large",
            415: "The body is not said to be JSON",
            429: "No room now; Retry-After says when",
            500: "The model failed on this request",
            503: "Loading, shutting down or failed",
            504: "The server's own limit of time is over",
        }
    ),
}


def _openai(service: Service) -> APIRouter:
    def authorize(
        request: Request, authorization: Annotated[str | None, Header(include_in_schema=False)] = None
    ) -> None:
        if service.keys:
            request.state.client = service.keys.owner(authorization)

    router = APIRouter(prefix="/v1", dependencies=[Depends(authorize)])
    served = service.served
    cards = {name: ModelCard(id=name, created=served.created, version=served.digest) for name in service.names}
    schema = {"content": {"application/json": {"schema": body_schema()}}, "required": True}

    @router.post(
        "/images/generations",
        response_model=ImagesResponse,
        responses=_GENERATION_ERRORS,
        openapi_extra={"requestBody": schema},
    )
    async def generate_images(request: Request) -> Response:
        """Make images or videos; extensions to OpenAI's parameters: frames, seed, steps, guidance, true_cfg,
        negative_prompt."""
        began = time.monotonic()
        try:
            service.engine.require_ready()
            limit = _time_limit(request, service.max_request_seconds)
            _require_json(request)
            order = service.order(parse_json(await service.bodies.read(request)))
            asked = order.request
            request.state.what = f"{len(asked.seeds)} of {asked.size}, {asked.steps} steps"
            # Without keys, a client is who asks from one address.
            if not service.keys:
                request.state.client = request.client.host if request.client else ""
            future = service.engine.submit(asked, request.state.client, request.state.request_id)
            drawn = await _wait(request, service, future, limit, began)
        except NotReadyError as error:
            leaves = error.status == Status.DRAINING
            seconds = _DRAINING_RETRY_SECONDS if leaves else _LOADING_RETRY_SECONDS
            raise ApiError(503, str(error), code=error.status.value, retry_after=seconds) from error
        except FullError as error:
            raise ApiError(429, str(error), code="queue_full", retry_after=error.seconds) from error
        except TooLargeError as error:
            raise invalid(error.parameter, str(error), "too_large") from error
        except GenerationError as error:
            # What a batch failed with may have been another request's; the rest would come again.
            again = {} if error.stage == "step" else DO_NOT_RETRY
            raise ApiError(500, str(error), code=f"{error.stage}_failed", headers=again) from error
        content = await asyncio.to_thread(_content, service, order, drawn)
        return Response(content, media_type="application/json")

    @router.get("/models", responses=_REFUSALS)
    async def list_models() -> ModelList:
        return ModelList(data=list(cards.values()))

    @router.get("/models/{name:path}", responses=_REFUSALS | _NO_MODEL)
    async def show_model(name: str) -> ModelCard:
        if name not in cards:
            message = f"model {name[:100]!r} is not served here; use {served.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return cards[name]

    for path in ("/images/edits", "/images/variations"):

        @router.post(path, include_in_schema=False)
        async def refuse(request: Request) -> None:
            message = f"{request.url.path} is not supported: this model makes images from text alone"
            raise ApiError(404, f"{message}; use /v1/images/generations", code="not_supported")

    return router


def _require_json(request: Request) -> None:
    """A form on any page of the web can send the other types, without its browser asking this server first."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"Content-Type is {kind[:100]!r}; send JSON, and say so: Content-Type: application/json"
        raise ApiError(415, message, code="unsupported_media_type")


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


async def _wait(request: Request, service: Service, future: Future[Drawn], limit: _TimeLimit, began: float) -> Drawn:
    """The images, unless the client leaves or the time is up: then the rows leave the batch at the next tick."""
    answer = asyncio.wrap_future(future)
    gone = asyncio.create_task(_disconnected(request))
    try:
        both: set[asyncio.Future[Any]] = {answer, gone}
        left = limit.seconds - (time.monotonic() - began)
        await asyncio.wait(both, timeout=max(left, 0), return_when=asyncio.FIRST_COMPLETED)
        if answer.cancelled():
            raise ApiError(503, "the server stopped before the images were done", code="stopped", retry_after=2)
        if answer.done():
            return answer.result()
        service.metrics.cancelled.labels("disconnect" if gone.done() else "timeout").inc()
        if gone.done():
            raise ClientDisconnect
        message = f"no answer within {limit.seconds:g} seconds; send less at once, or later"
        raise ApiError(limit.status, message, code="timeout", headers=DO_NOT_RETRY)
    finally:
        gone.cancel()
        answer.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _content(service: Service, order: Order, drawn: Drawn) -> str:
    request, served = order.request, service.served
    encoded = service.files(order, drawn.images)
    data = [
        ImageData(b64_json=base64.b64encode(file).decode(), seed=seed)
        for file, seed in zip(encoded, request.seeds, strict=True)
    ]
    return ImagesResponse(
        created=int(time.time()),
        data=data,
        output_format=order.format,
        size=f"{request.width}x{request.height}",
        frames=request.frames,
        steps=request.steps,
        guidance=request.scales.guidance,
        true_cfg=request.scales.true_cfg,
        model=served.name,
        model_version=served.digest,
        truncated=drawn.truncated,
        ignored=list(order.ignored),
    ).model_dump_json()


# -------------------------------------------------------------------------------------------------------- playground


def _playground() -> APIRouter:
    router = APIRouter()
    page = files(__package__).joinpath("playground.html").read_text()
    policy = _only_its_own(page)

    @router.get("/", include_in_schema=False)
    async def playground() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

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


# ------------------------------------------------------------------------------------------------------------ errors


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.answer(request.url.path)


async def _answer_http(request: Request, error: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    message = f"{request.method} {path[:100]}: {error.detail}; GET /openapi.json shows what there is"
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    return ApiError(error.status_code, message, code=code, headers=error.headers).answer(path)


async def _answer_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return invalid(str(first["loc"][-1]), first["msg"]).answer(request.url.path)


async def _answer_crash(request: Request, error: Exception) -> Response:
    """The stack trace goes to the log, not to the client."""
    request.app.state.metrics.failures.labels("internal").inc()
    message = "the server failed on this request; its log says why"
    return ApiError(500, message, code="internal_error").answer(request.url.path)
