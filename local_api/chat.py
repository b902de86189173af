"""/v1/chat/completions: plain and streamed, from a base model or a fine-tuned one.

What this server cannot do is refused with the API's error, never ignored in silence.
"""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import Request
from openai.types.chat import ChatCompletion
from pydantic import BeforeValidator, Field, model_validator

from local_api.answers import MAX_ANSWERS, Answer, AnswerParameters, as_api_error, joined_text, respond
from local_api.errors import APIError, error_body
from local_api.forms import ResponseFormat
from local_api.generation import GenerationRequest
from local_api.shapes import Parameters, Router
from local_api.store import Document

MAX_MESSAGES = 2048
TokenId = Annotated[str, Field(pattern="^[0-9]{1,9}$")]  # in the model's own vocabulary
Stops = Annotated[list[Annotated[str, Field(min_length=1)]], Field(fail_fast=True, max_length=4)]
router = Router(prefix="/v1/chat/completions", tags=["Chat"])


class Message(Parameters):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(joined_text)]
    name: str | None = None
    # What an answer of this server has besides, so that a client can send it back as it came.
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None


class StreamOptions(Parameters):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against listeners on the network: of no use here


class ChatRequest(AnswerParameters):
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    stream_options: StreamOptions | None = None
    n: Annotated[int | None, Field(ge=1, le=MAX_ANSWERS)] = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    stop: Annotated[Stops | None, BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    logit_bias: Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(fail_fast=True)] | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def fits_together(self) -> "ChatRequest":
        """Refuse what the types of the single parameters do not."""
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise APIError(400, "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.",
                           param="max_tokens", code="invalid_parameter_combination")  # fmt: skip
        for name, needed in (("top_logprobs", "logprobs"), ("stream_options", "stream")):
            if getattr(self, name) is not None and not getattr(self, needed):
                raise APIError(400, f"The '{name}' parameter is only allowed when '{needed}' is enabled.", param=name,
                               code="invalid_parameter_combination")  # fmt: skip
        return self

    def generation_requests(self) -> list[GenerationRequest]:
        """With a seed, each choice has its own that follows from it."""
        request = GenerationRequest(
            model=self.model,
            messages=[message.model_dump(include={"role", "content"}) for message in self.messages],
            max_tokens=self.max_completion_tokens or self.max_tokens,
            **self.sampling(),
            stop=tuple(self.stop or ()),
            logprobs=bool(self.logprobs),
            top_logprobs=self.top_logprobs or 0,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias={int(token): value for token, value in (self.logit_bias or {}).items()},
            form=self.response_format.grammar() if self.response_format else None,
        )
        return [replace(request, seed=None if self.seed is None else self.seed + i) for i in range(self.n or 1)]


@router.post("", response_model=ChatCompletion)
async def create_chat_completion(request: Request, chat: ChatRequest) -> Any:
    return await respond(request, chat, completion, chunks, "messages")


def head(chat: ChatRequest, answer: Answer) -> Document:
    return {"id": f"chatcmpl-{answer.id}", "created": answer.created, "model": chat.model,
            "system_fingerprint": "fp_local", **chat.served()}  # fmt: skip


def completion(chat: ChatRequest, answer: Answer) -> Document:
    choices: list[Document] = [
        {"index": index, "message": {"role": "assistant", "content": choice.text, "refusal": None, "annotations": []},
         "logprobs": shown_logprobs(chat, choice.logprobs), "finish_reason": choice.finish_reason}
        for index, choice in enumerate(answer.choices)
    ]  # fmt: skip
    return {**head(chat, answer), "object": "chat.completion", "choices": choices, "usage": answer.usage()}


def shown_logprobs(chat: ChatRequest, content: list[Document] | None) -> Document | None:
    return {"content": content or [], "refusal": None} if chat.logprobs else None


async def chunks(chat: ChatRequest, answer: Answer) -> AsyncIterator[str]:
    """Yield the answer as server-sent events, one chunk each, as the API does."""
    with_usage = chat.stream_options and chat.stream_options.include_usage
    chunk = {**head(chat, answer), "object": "chat.completion.chunk"}
    if with_usage:  # then every chunk has the key, and the last one, without choices, the figures
        chunk["usage"] = None

    def event(index: int, delta: Document, logprobs: Document | None, finish_reason: str | None = None) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return f"data: {json.dumps({**chunk, 'choices': [choice]})}\n\n"

    try:
        for index in range(len(answer.choices)):
            yield event(index, {"role": "assistant", "content": "", "refusal": None}, shown_logprobs(chat, []))
        async for index, piece in answer.pieces():
            if piece.text or piece.logprobs:
                yield event(index, {"content": piece.text}, shown_logprobs(chat, piece.logprobs))
                answer.choices[index].logprobs.clear()  # who streams needs them no more
            if piece.finish_reason:
                yield event(index, {}, None, piece.finish_reason)
        if with_usage:
            yield f"data: {json.dumps({**chunk, 'choices': [], 'usage': answer.usage()})}\n\n"
    except Exception as error:
        refusal = as_api_error(error, "messages")
        yield f"data: {json.dumps(error_body(refusal.status_code, refusal.detail, refusal.param, refusal.code))}\n\n"
    finally:
        answer.close()
    yield "data: [DONE]\n\n"
