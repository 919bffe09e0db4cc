"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}` with all four keys."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

DO_NOT_RETRY = {"x-should-retry": "false"}  # OpenAI's clients repeat 408 and 5xx, unless they are told
CLOSE = {"Connection": "close"}  # the rest of the body is not read


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every error under /v1 answers."""

    error: ErrorDetail


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status. message: what is wrong and what to do.
        param: the parameter it is about. code: for programs.
        retry_after: seconds after which the same request may work.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(retry_after)

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": _type(self.status), "param": self.param, "code": self.code}}

    def answer(self, path: str) -> Response:
        """Under /v2, the Open Inference Protocol's clients expect a string."""
        body = {"error": self.message} if path.startswith("/v2") else self.body()
        return JSONResponse(body, self.status, headers=self.headers)


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def _type(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"
