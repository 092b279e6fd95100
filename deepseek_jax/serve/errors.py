"""What goes wrong, as OpenAI's clients read it."""

import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_FIELDS = ("logit_bias", "stop_token_ids", "prompt", "tools", "tool_choice", "chat_template_kwargs")


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


def field_of(message: str, otherwise: str | None = None) -> str | None:
    """The field of a body that a message of the engine's, or of a prompt's writer, begins with."""
    name = re.split(r"\W", message.removeprefix("the ").removeprefix("a "))[0]
    return name if name in _FIELDS else otherwise


def add_handlers(app: FastAPI) -> None:
    """Every error in that form."""

    @app.exception_handler(ApiError)
    async def own(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        message, where = _told(error, request.headers.get("content-type", ""))
        return ApiError(400, whole(message), param=whole(where) or None).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        told = str(error.detail)
        if error.status_code == 400 and error.__cause__ is not None:  # FastAPI could not read a body
            told = f"the body could not be read: {type(error.__cause__).__name__}: {error.__cause__}"
        if error.status_code == 404 and told == "Not Found":  # what Starlette says of a path
            told = f"nothing is at {request.url.path}: /openapi.json tells what is, and clients' base_url ends in /v1"
        response = ApiError(error.status_code, whole(told)).response()
        response.headers.update(error.headers or {})
        return response


def _told(error: RequestValidationError, content_type: str) -> tuple[str, str]:
    """What to say of a body, and which field of it is meant.

    Of a field that takes several kinds, pydantic complains once for each: the complaint that got furthest is told.
    """
    complaints = error.errors()
    worst = max(complaints, key=lambda each: len(_place(each, error.body)))
    if worst["type"] == "json_invalid":
        return f"the body is no JSON: {worst['ctx']['error']} at character {worst['loc'][-1]}", ""
    if isinstance(error.body, bytes):  # FastAPI parses nothing else
        return f"a body's Content-Type must be application/json, and not {content_type or 'left out'}", ""
    where = ".".join(_place(worst, error.body))
    if worst["type"] == "extra_forbidden" and len(complaints) > 1:
        names = [".".join(_place(each, error.body)) for each in complaints if each["type"] == worst["type"]]
        return f"{', '.join(names)}: {worst['msg']}", names[0]
    shown = isinstance(worst["input"], bool | int | float | str) and worst["type"] != "extra_forbidden"
    given = f"={worst['input']!r:.100}" if shown else ""
    others = f" (and {len(complaints) - 1} more)" if len(complaints) > 1 else ""
    return f"{where}{given}: {worst['msg']}{others}" if where else f"{worst['msg']}{others}", where


def _place(complaint: dict[str, Any], body: Any) -> list[str]:
    """Keys and indices from the body to what is wrong, without pydantic's names for the kinds that it tried."""
    place = []
    for part in complaint["loc"][1:]:
        if isinstance(body, dict) and part in body or isinstance(body, list) and isinstance(part, int):
            place.append(str(part))
            body = body[part]
    if complaint["type"] == "missing":
        place.append(str(complaint["loc"][-1]))
    return place


def whole(text: str) -> str:
    """At most 500 characters, all of which can be written."""
    return text[:500].encode("utf-8", "replace").decode()
