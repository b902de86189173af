"""/v1/responses, for plain text: the newer way to ask the same models. Nothing is kept, so nothing can be continued."""

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, ClassVar, Literal

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse
from openai.types.responses import Response
from pydantic import BeforeValidator, FailFast, Field

from local_api.answers import TEXT_ALONE, Answer, AnswerParameters, as_api_error, joined_text
from local_api.chat import MAX_MESSAGES
from local_api.errors import APIError, error_response
from local_api.forms import TextFormat
from local_api.generation import GenerationRequest
from local_api.models import find_model
from local_api.shapes import Parameters, Router
from local_api.store import Document, new_id, now

router = Router(prefix="/v1/responses", tags=["Responses"])
KEEPS_NOTHING = (
    "This server keeps no responses: send the whole conversation as 'input', with 'store': false, or ask "
    "/v1/chat/completions."
)


class Item(Parameters):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(joined_text)]
    # What an answer of this server has besides, so that a client can send it back as it came.
    id: str | None = None
    status: str | None = None
    phase: str | None = None


def as_items(sent: Any) -> Any:
    if isinstance(sent, str):
        return [{"role": "user", "content": sent}]
    for number, item in enumerate(sent if isinstance(sent, list) else ()):
        kind = item.get("type", "message") if isinstance(item, dict) else "message"
        if kind != "message":
            why = KEEPS_NOTHING if kind == "item_reference" else TEXT_ALONE
            raise APIError(400, f"Unsupported value: 'input[{number}]' is no message, but '{kind}'. {why}",
                           param=f"input[{number}].type", code="unsupported_value")  # fmt: skip
    return sent


class Text(Parameters):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponseRequest(AnswerParameters):
    harmless_values: ClassVar = {
        "background": (False,), "conversation": (), "include": ([],), "max_tool_calls": (), "moderation": (),
        "previous_response_id": (), "prompt": (), "reasoning": ({}, {"effort": "none"}), "store": (False,),
        "tool_choice": ("auto", "none"), "tools": ([],), "top_logprobs": (0,), "truncation": ("disabled",),
    }  # fmt: skip
    instead: ClassVar = {
        "background": KEEPS_NOTHING, "conversation": KEEPS_NOTHING, "previous_response_id": KEEPS_NOTHING,
        "store": KEEPS_NOTHING, "tool_choice": TEXT_ALONE, "tools": TEXT_ALONE,
    }  # fmt: skip

    input: Annotated[list[Item], FailFast(), BeforeValidator(as_items), Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: Annotated[int | None, Field(ge=1)] = None
    text: Text | None = None
    stream_options: Any = None


def generation_request(asked: ResponseRequest) -> GenerationRequest:
    messages = [{"role": item.role, "content": item.content} for item in asked.input]
    if asked.instructions:
        messages.insert(0, {"role": "system", "content": asked.instructions})
    form = asked.text.format.grammar() if asked.text and asked.text.format else None
    return GenerationRequest(asked.model, messages, max_tokens=asked.max_output_tokens, **asked.sampling(), form=form)


class Progress:
    """The response object while its text grows; `document` is what the API shows of it at any moment."""

    def __init__(self, asked: ResponseRequest, answer: Answer):
        self.asked, self.answer = asked, answer
        self.id, self.item_id, self.created_at = new_id("resp_"), new_id("msg_"), now()
        self.text, self.finish_reason = "", None
        form = asked.text.format if asked.text else None
        self.format = form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}

    def add(self, piece: Any) -> None:
        self.text += piece.text
        self.finish_reason = piece.finish_reason

    @property
    def status(self) -> str:
        return {None: "in_progress", "length": "incomplete"}.get(self.finish_reason, "completed")

    def part(self) -> Document:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}

    def item(self, content: list[Document]) -> Document:
        return {"id": self.item_id, "type": "message", "role": "assistant", "status": self.status, "content": content}

    def document(self) -> Document:
        cut, usage = self.status == "incomplete", self.answer.usage()
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "status": self.status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": self.asked.instructions,
            "max_output_tokens": self.asked.max_output_tokens,
            "model": self.asked.model,
            "output": [self.item([self.part()])] if self.finish_reason else [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "text": {"format": self.format},
            "tool_choice": "auto",
            "tools": [],
            **self.asked.sampling(),
            **self.asked.served(),
            "truncation": "disabled",
            "metadata": self.asked.metadata or {},
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            } if self.finish_reason else None,
        }  # fmt: skip


@router.post("", response_model=Response)
async def create_response(request: Request, asked: ResponseRequest) -> Any:
    await run_in_threadpool(find_model, request.app.state.models, asked.model)
    wanted = await run_in_threadpool(generation_request, asked)
    await request.app.state.places.take()
    answer = Answer(request, [wanted])
    progress, pieces = Progress(asked, answer), answer.pieces()
    try:
        _, first = await anext(pieces)  # what fails before the first word is still answered with an HTTP status
        if asked.stream:
            stream = events(request, progress, first, pieces)
            return StreamingResponse(stream, media_type="text/event-stream")
        progress.add(first)
        async for _, piece in pieces:
            progress.add(piece)
    except Exception as error:
        answer.close()
        return error_response(as_api_error(error, "input"))
    answer.close()
    request.state.usage = answer.usage()
    return JSONResponse(progress.document())


async def events(request: Request, progress: Progress, first: Any,
                 pieces: AsyncIterator[tuple[int, Any]]) -> AsyncIterator[str]:  # fmt: skip
    """Yield the events that the API sends for one message of one text part."""
    number = -1

    def event(kind: str, **fields: Any) -> str:
        nonlocal number
        number += 1
        return f"event: {kind}\ndata: {json.dumps({'type': kind, 'sequence_number': number, **fields})}\n\n"

    place = {"item_id": progress.item_id, "output_index": 0, "content_index": 0}
    try:
        yield event("response.created", response=progress.document())
        yield event("response.in_progress", response=progress.document())
        yield event("response.output_item.added", output_index=0, item=progress.item([]))
        yield event("response.content_part.added", **place, part=progress.part())
        progress.add(first)
        yield event("response.output_text.delta", **place, delta=first.text, logprobs=[])
        async for _, piece in pieces:
            progress.add(piece)
            if piece.text:
                yield event("response.output_text.delta", **place, delta=piece.text, logprobs=[])
        request.state.usage = progress.answer.usage()
        yield event("response.output_text.done", **place, text=progress.text, logprobs=[])
        yield event("response.content_part.done", **place, part=progress.part())
        yield event("response.output_item.done", output_index=0, item=progress.item([progress.part()]))
        yield event(f"response.{progress.status}", response=progress.document())
    except Exception as error:
        refusal = as_api_error(error, "input")
        yield event("error", code=refusal.code, message=refusal.detail, param=refusal.param)
    finally:
        progress.answer.close()
