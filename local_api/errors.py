"""Errors in the API's shape: {"error": {"message", "type", "param", "code"}}, for everything that can go wrong.

Handlers raise `APIError`; whatever FastAPI itself refuses (an unknown route, a parameter of the wrong type) is put
into the same shape here, with the API's status, wording and code.
"""

import errno
import re
import sqlite3
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from openai.types import ErrorObject
from pydantic import BaseModel
from starlette.exceptions import HTTPException


class ErrorResponse(BaseModel):
    error: ErrorObject


# For the OpenAPI document that the server has of itself at /openapi.json.
RESPONSES: dict[int | str, dict[str, Any]] = {status: {"model": ErrorResponse} for status in ("4XX", "5XX")}


class APIError(HTTPException):
    """A refusal that the client reads: HTTP status, one sentence, and the API's `param` and `code`.

    It is an HTTPException so that FastAPI lets it through unchanged when it is raised while a body is being read.
    """

    def __init__(self, status_code: int, message: str, *, param: str | None = None, code: str | None = None,
                 headers: Mapping[str, str] | None = None):  # fmt: skip
        super().__init__(status_code, message, headers)
        self.param, self.code = param, code


def model_not_found(model: str) -> APIError:
    message = f"The model `{model}` does not exist or you do not have access to it."
    return APIError(404, message, param="model", code="model_not_found")


def error_body(status_code: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = "server_error" if status_code >= 500 else "invalid_request_error"
    kind = "rate_limit_error" if status_code == 429 else kind
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: APIError) -> JSONResponse:
    body = error_body(error.status_code, error.detail, error.param, error.code)
    return JSONResponse(body, error.status_code, headers=error.headers)


def explain(error: Exception) -> APIError:
    """Return what the client is told about an exception that no handler expected (the log holds its traceback)."""
    number = getattr(error, "errno", None)
    database = str(error) if isinstance(error, sqlite3.Error) else ""
    if not isinstance(error, (sqlite3.Error, OSError)):
        sentence = "The server had an error it was not prepared for; its log holds the details."
    elif number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "full" in database:
        sentence = "The disk that holds the server's data directory is full."
    elif number in (errno.EMFILE, errno.ENFILE):
        sentence = "The server has too many files and connections open."
    elif "locked" in database:
        sentence = "The server's database is locked by another process."
    else:
        sentence = "The server cannot read or write its data directory; was it moved or deleted?"
    return APIError(500, sentence, code="server_error")


def parameter_name(location: tuple[int | str, ...]) -> str | None:
    """("body", "messages", 0, "content") -> "messages[0].content"."""
    name = ""
    for part in location[1:]:
        if part == "[key]":  # of a table: its name stands before
            continue
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    return name or None


def invalid_parameter(problem: Any) -> APIError:
    """Put one of pydantic's complaints into the API's words: 400, with `param` and `code`."""
    kind, param = problem["type"], parameter_name(problem["loc"])
    if kind == "json_invalid" or param is None:
        sentence = f"We could not parse the JSON body of your request ({problem['msg']})"
        return APIError(400, f"{sentence}: send an object, with the header Content-Type: application/json.")
    if kind == "missing":
        return APIError(400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    if kind == "extra_forbidden":
        return APIError(400, f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
    reason = re.sub("^(Input should be|[A-Z][a-z]+ should have)", "expected", problem["msg"]).rstrip(".")
    reason = reason.removeprefix("Value error, ").replace(" after validation, not ", ", got ")
    what = "type" if kind.endswith(("_type", "_parsing", "_from_float")) else "value"
    return APIError(400, f"Invalid {what} for '{param}': {reason}.", param=param, code=f"invalid_{what}")


# Part of a path that this server does not have, though others do: what to do instead. The first one counts.
LEFT_OUT = {
    "/openai/deployments": "This server has no Azure paths: use the plain OpenAI client, base URL ending in /v1.",
    "/batches": "This server has no batches: send the requests to /v1/chat/completions, as many at once as you like.",
    "/uploads": "This server takes a file of up to 512 MB whole: POST /v1/files, in the SDK files.create.",
    "/v1/completions": "This server has chat models alone: use /v1/chat/completions.",
    "/embeddings": "This server has no embedding models.",
    "/assistants": "This server has no assistants: use /v1/chat/completions.",
    "/responses/": "This server keeps no responses: each is sent once, in answer to POST /v1/responses.",
    "/chat/completions/": "This server keeps no answers: each is sent once, in answer to POST /v1/chat/completions.",
    "/v1/v1/": "The base URL ends in /v1 once.",
    "/v1/": "",
    "/": "The base URL must end in /v1.",
}


def install(app: FastAPI) -> None:
    """Give every error of this app the API's shape."""

    @app.exception_handler(RequestValidationError)
    async def refuse_parameter(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(invalid_parameter(error.errors()[0]))

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error, APIError):
            return error_response(error)
        where = f"{request.method} {request.url.path}"
        hint = next((hint for part, hint in LEFT_OUT.items() if part in request.url.path), "")
        sentences = {404: f"Invalid URL ({where}) {hint}".strip(), 405: f"Not allowed: {where}"}
        sentence = sentences.get(error.status_code, str(error.detail))
        return error_response(APIError(error.status_code, sentence, headers=error.headers))
