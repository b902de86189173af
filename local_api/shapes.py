"""What all routes share: strict parameters, the API's list object, and documents sent as they are stored."""

import json
from typing import Annotated, Any, Generic, Literal, TypeVar

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from local_api.errors import APIError, invalid_parameter
from local_api.store import Document

MAX_VALUES = 100_000  # in a JSON body: 2,048 messages have 10,000
MAX_NAMES = 100  # in an object of parameters
MAX_PAIRS = 16  # of metadata: the API's limit

Item = TypeVar("Item")


def parse_body(body: bytes, model: type[BaseModel] | None) -> Any:
    """Parse a JSON body and validate it. It holds values in a number that this API can have a use for, and Unicode."""
    if has_many_values(body):
        raise APIError(400, f"The request holds more than {MAX_VALUES:,} values.", code="invalid_value")
    sent = json.loads(body)
    if b"\\u" in body:  # JSON can escape half a character ("\\ud800"), which no one can store, answer or encode
        try:
            json.dumps(sent, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            message = "The request holds text that is not valid Unicode (half a surrogate pair)."
            raise APIError(400, message, code="invalid_value") from None
    try:
        return model.model_validate(sent) if model else sent
    except ValidationError as error:
        problem = error.errors()[0]
        raise invalid_parameter({**problem, "loc": ("body", *problem["loc"])}) from None


def has_many_values(body: bytes) -> bool:
    """Count the commas outside strings, before the values are made."""
    if body.count(b",") <= MAX_VALUES:
        return False
    bare = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # so that every quote begins or ends a string
    return bare.count(b'"') > 4 * MAX_VALUES or sum(part.count(b",") for part in bare.split(b'"')[::2]) > MAX_VALUES


class BoundedRequest(Request):
    """A request whose JSON body is parsed and validated beside the event loop."""

    model: type[BaseModel] | None

    async def json(self) -> Any:
        return await run_in_threadpool(parse_body, await self.body(), self.model)


class BoundedRoute(APIRoute):
    def get_route_handler(self) -> Any:
        handle = super().get_route_handler()
        model: Any = self.body_field and self.body_field.field_info.annotation

        async def handle_bounded(request: Request) -> Any:
            bounded = BoundedRequest(request.scope, request.receive)
            bounded.model = model
            return await handle(bounded)

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
    if not isinstance(metadata, dict):
        return metadata  # pydantic says what is wrong with it
    if len(metadata) > MAX_PAIRS:
        raise ValueError(f"at most {MAX_PAIRS} pairs are allowed")
    for key, value in metadata.items():
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
