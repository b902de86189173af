"""What all routes share: strict parameters, the API's list object, and documents sent as they are stored."""

import json
from typing import Any, Generic, Literal, TypeVar

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from local_api.store import Document

Item = TypeVar("Item")


class Router(APIRouter):
    """A router whose answers hold the keys that the document has and no others: absent is not the same as null."""

    def add_api_route(self, *args: Any, **kwargs: Any) -> None:
        super().add_api_route(*args, **{**kwargs, "response_model_exclude_unset": True})


class Parameters(BaseModel):
    """What a client sends: an unknown name or another type is refused, as the API does, and not passed over."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def is_unicode(cls, sent: Any) -> Any:
        """JSON can escape half a character ("\\ud800"), which no one can store, answer or encode."""
        try:
            json.dumps(sent, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            raise PydanticCustomError("string_unicode", "valid Unicode") from None
        return sent


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
