"""What all routes share: strict parameters, the API's list object, and documents sent as they are stored."""

from functools import partial
from typing import Annotated, Any, Generic, Literal, TypeVar

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from local_api.errors import APIError, invalid_parameter
from local_api.store import Document

MAX_SIGNS = 200_000  # , [ { in a JSON body: 2,048 messages have 15,000, and a text with so many fits no model's context
MAX_NAMES = 100  # in an object of parameters
MAX_PAIRS = 16  # of metadata: the API's limit

Item = TypeVar("Item")


def parse_body(body: bytes, model: type[BaseModel]) -> BaseModel:
    body = body.removeprefix(b"\xef\xbb\xbf")  # as PowerShell writes it
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_SIGNS:
        message = (
            f"The request has more than {MAX_SIGNS:,} commas and brackets: this API has no use for so many values."
        )
        raise APIError(400, message, code="invalid_value")
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors()[0]
        raise invalid_parameter({**problem, "loc": ("body", *problem["loc"])}) from None


class Route(APIRoute):
    """A route that parses and validates a JSON body beside the event loop, as a large one takes a while. Its answers
    hold the keys that the document has and no others: absent is not the same as null."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "response_model_exclude_unset": True})

    def get_route_handler(self) -> Any:
        handle = super().get_route_handler()
        model: Any = self.body_field and self.body_field.field_info.annotation

        class BoundedRequest(Request):
            async def json(self) -> Any:
                return await run_in_threadpool(parse_body, await self.body(), model)

        async def handle_bounded(request: Request) -> Any:
            return await handle(BoundedRequest(request.scope, request.receive))

        return handle_bounded


Router = partial(APIRouter, route_class=Route)


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


def has_few_pairs(metadata: Any) -> Any:
    """Refuse too many pairs before one of them is looked at."""
    if isinstance(metadata, dict) and len(metadata) > MAX_PAIRS:
        raise ValueError(f"at most {MAX_PAIRS} pairs are allowed")
    return metadata


Key = Annotated[str, Field(max_length=64)]
Value = Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[Key, Value] | None, BeforeValidator(has_few_pairs)]


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
