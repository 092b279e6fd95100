"""What goes wrong, as OpenAI's clients read it."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    error: ErrorDetail


class ApiError(Exception):
    """A status, what to tell, and the field that it is about."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None, wait: int = 0):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.wait = status, message, param, code, wait

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        detail = ErrorDetail(message=self.message, type=kind, param=self.param, code=self.code)
        return ErrorBody(error=detail).model_dump()

    def response(self) -> JSONResponse:
        headers = {"Retry-After": str(self.wait)} if self.wait else {}
        return JSONResponse(self.body, self.status, headers)


def add_handlers(app: FastAPI) -> None:
    """Every error in that form."""

    @app.exception_handler(ApiError)
    async def own(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first, *more = error.errors()
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        others = f" (and {len(more)} more)" if more else ""
        message = f"{where}: {first['msg']}{others}" if where else f"{first['msg']}{others}"
        return ApiError(400, whole(message), param=whole(where) or None).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        response = ApiError(error.status_code, str(error.detail)).response()
        response.headers.update(error.headers or {})
        return response


def whole(text: str) -> str:
    """At most 500 characters, all of which can be written."""
    return text[:500].encode("utf-8", "replace").decode()
