"""/v1/responses, for plain text: the newer way to ask the same models. Nothing is kept, so nothing can be continued."""

import json
from collections.abc import AsyncIterator
from itertools import count
from typing import Annotated, Any, Literal

from fastapi import Request
from openai.types.responses import Response
from pydantic import BeforeValidator, FailFast, Field

from local_api.answers import KEEPS_NOTHING, TEXT_ALONE, Answer, AnswerParameters, as_api_error, joined_text, respond
from local_api.chat import MAX_MESSAGES
from local_api.errors import APIError
from local_api.forms import TextFormat
from local_api.generation import GenerationRequest
from local_api.shapes import Parameters, Router
from local_api.store import Document

router = Router(prefix="/v1/responses", tags=["Responses"])


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
    input: Annotated[list[Item], FailFast(), BeforeValidator(as_items), Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: Annotated[int | None, Field(ge=1)] = None
    text: Text | None = None
    stream_options: Any = None
    top_logprobs: Literal[0] | None = None

    def generation_requests(self) -> list[GenerationRequest]:
        messages = [{"role": item.role, "content": item.content} for item in self.input]
        if self.instructions:
            messages.insert(0, {"role": "system", "content": self.instructions})
        form = self.text.format.grammar() if self.text and self.text.format else None
        return [GenerationRequest(self.model, messages, self.max_output_tokens, **self.sampling(), form=form)]


@router.post("", response_model=Response)
async def create_response(request: Request, asked: ResponseRequest) -> Any:
    return await respond(request, asked, document, events, "input")


def status(answer: Answer) -> str:
    return {None: "in_progress", "length": "incomplete"}.get(answer.choices[0].finish_reason, "completed")


def part(answer: Answer) -> Document:
    return {"type": "output_text", "text": answer.choices[0].text, "annotations": [], "logprobs": []}


def item(answer: Answer, content: list[Document]) -> Document:
    return {"id": f"msg_{answer.id}", "type": "message", "role": "assistant", "status": status(answer),
            "content": content}  # fmt: skip


def document(asked: ResponseRequest, answer: Answer) -> Document:
    """Return what the API shows of the response, at any moment."""
    form, usage = asked.text and asked.text.format, answer.usage()
    ended = status(answer) != "in_progress"
    return {
        "id": f"resp_{answer.id}",
        "object": "response",
        "created_at": answer.created,
        "status": status(answer),
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status(answer) == "incomplete" else None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "model": asked.model,
        "output": [item(answer, [part(answer)])] if ended else [],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "store": False,
        "text": {"format": form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        **asked.sampling(),
        **asked.served(),
        "truncation": "disabled",
        "metadata": asked.metadata or {},
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        } if ended else None,
    }  # fmt: skip


async def events(asked: ResponseRequest, answer: Answer) -> AsyncIterator[str]:
    """Yield the events that the API sends for one message of one text part."""
    numbers = count()

    def event(kind: str, **fields: Any) -> str:
        return f"event: {kind}\ndata: {json.dumps({'type': kind, 'sequence_number': next(numbers), **fields})}\n\n"

    place = {"item_id": f"msg_{answer.id}", "output_index": 0, "content_index": 0}
    try:
        yield event("response.created", response=document(asked, answer))
        yield event("response.in_progress", response=document(asked, answer))
        yield event("response.output_item.added", output_index=0, item=item(answer, []))
        yield event("response.content_part.added", **place, part=part(answer))
        async for _, piece in answer.pieces():
            if piece.text:
                yield event("response.output_text.delta", **place, delta=piece.text, logprobs=[])
        yield event("response.output_text.done", **place, text=answer.choices[0].text, logprobs=[])
        yield event("response.content_part.done", **place, part=part(answer))
        yield event("response.output_item.done", output_index=0, item=item(answer, [part(answer)]))
        yield event(f"response.{status(answer)}", response=document(asked, answer))
    except Exception as error:
        refusal = as_api_error(error, "input")
        yield event("error", code=refusal.code, message=refusal.detail, param=refusal.param)
    finally:
        answer.close()
