"""What all routes share: strict parameters, the API's list object, and documents sent as they are stored."""

import json
import re
from typing import Annotated, Any, Generic, Literal, TypeVar

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from local_api.errors import APIError
from local_api.store import Document

MAX_VALUES = 100_000  # in a JSON body: 2,048 messages have 10,000, an upload of 8 GB in parts of 64 MB has 128
STRINGS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\Z)', re.DOTALL)  # of JSON; one without an end counts to the end
MAX_NAMES = 100  # in an object of parameters
MAX_PAIRS = 16  # of metadata: the API's limit

Item = TypeVar("Item")


def parse_body(body: bytes) -> Any:
    """Parse a JSON body. It holds values in a number that a request of this API can have a use for, and Unicode."""
    if body.count(b",") > MAX_VALUES and STRINGS.sub(b"", body).count(b",") > MAX_VALUES:  # before they are made
        raise APIError(400, f"The request holds more than {MAX_VALUES:,} values.", code="invalid_value")
    sent = json.loads(body)
    if b"\\u" in body:  # JSON can escape half a character ("\\ud800"), which no one can store, answer or encode
        try:
            json.dumps(sent, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            message = "The request holds text that is not valid Unicode (half a surrogate pair)."
            raise APIError(400, message, code="invalid_value") from None
    return sent


class BoundedRequest(Request):
    """A request whose JSON body is parsed beside the event loop."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = await run_in_threadpool(parse_body, await self.body())
        return self._json


class BoundedRoute(APIRoute):
    def get_route_handler(self) -> Any:
        handle = super().get_route_handler()

        async def handle_bounded(request: Request) -> Any:
            return await handle(BoundedRequest(request.scope, request.receive))

        return handle_bounded


class Router(APIRouter):
    """A router whose answers hold the keys that the document has and no others: absent is not the same as null."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(route_class=BoundedRoute, **kwargs)

    def add_api_route(self, *args: Any, **kwargs: Any) -> None:
        super().add_api_route(*args, **{**kwargs, "response_model_exclude_unset": True})


class Parameters(BaseModel):
    """What a client sends: an unknown name or another type is refused, as the API does, and not passed over."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def has_few_names(cls, sent: Any) -> Any:
        """Of many unknown names one is told: pydantic would make an error of each."""
        if isinstance(sent, dict) and len(sent) > MAX_NAMES:
            unknown = next(name for name in sent if name not in cls.model_fields)
            raise APIError(400, f"Unknown parameter: '{unknown[:100]}'.", param=unknown, code="unknown_parameter")
        return sent


def check_metadata(metadata: Any) -> Any:
    """Refuse what is too much before the single pairs are looked at."""
    if isinstance(metadata, dict) and len(metadata) > MAX_PAIRS:
        raise ValueError(f"at most {MAX_PAIRS} pairs are allowed")
    for key, value in metadata.items() if isinstance(metadata, dict) else ():
        if len(key) > 64 or (isinstance(value, str) and len(value) > 512):
            raise ValueError("a key has at most 64 characters and a value at most 512")
    return metadata


Metadata = Annotated[dict[str, str] | None, BeforeValidator(check_metadata)]


class Page(BaseModel, Generic[Item]):
    """The API's list object."""

    object: Literal["list"]
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


def page(data: list[Document], has_more: bool = False) -> Document:
    ends = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": ends[0], "last_id": ends[1], "has_more": has_more}
