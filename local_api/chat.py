"""/v1/chat/completions: plain and streamed, from a base model or a fine-tuned one.

What this server cannot do is refused with the API's error, never ignored in silence.
"""

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, ClassVar, Literal

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse
from openai.types.chat import ChatCompletion
from pydantic import BeforeValidator, Field

from local_api.answers import MAX_ANSWERS, TEXT_ALONE, Answer, AnswerParameters, as_api_error, joined_text
from local_api.errors import APIError, error_body, error_response
from local_api.forms import ResponseFormat
from local_api.generation import GenerationRequest
from local_api.models import find_model
from local_api.shapes import Parameters, Router
from local_api.store import Document, new_id, now

MAX_MESSAGES = 2048
TokenId = Annotated[str, Field(pattern="^[0-9]{1,9}$")]  # in the model's own vocabulary
router = Router(prefix="/v1/chat/completions", tags=["Chat"])


def as_list(stop: Any) -> Any:
    stops = [stop] if isinstance(stop, str) else stop
    if isinstance(stops, list) and "" in stops:
        raise ValueError("a stop sequence has at least one character")
    return stops


class Message(Parameters):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | None, BeforeValidator(joined_text)] = None
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
    harmless_values: ClassVar = {
        "audio": (), "function_call": ("none",), "functions": ([],), "modalities": (["text"],), "moderation": (),
        "prediction": (), "reasoning_effort": ("none",), "store": (False,), "tool_choice": ("none", "auto"),
        "tools": ([],), "verbosity": ("medium",), "web_search_options": (),
    }  # fmt: skip
    instead: ClassVar = {
        "functions": TEXT_ALONE,
        "store": "This server keeps no answers.",
        "tool_choice": TEXT_ALONE,
        "tools": TEXT_ALONE,
    }

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    stream_options: StreamOptions | None = None
    n: Annotated[int | None, Field(ge=1, le=MAX_ANSWERS)] = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    stop: Annotated[Annotated[list[str], Field(fail_fast=True, max_length=4)] | None, BeforeValidator(as_list)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    logit_bias: Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(fail_fast=True)] | None = None
    response_format: ResponseFormat | None = None


def check_combinations(chat: ChatRequest) -> None:
    """Refuse what the types of the single parameters do not."""
    if chat.max_tokens is not None and chat.max_completion_tokens is not None:
        raise APIError(400, "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.",
                       param="max_tokens", code="invalid_parameter_combination")  # fmt: skip
    if chat.top_logprobs is not None and not chat.logprobs:
        raise APIError(400, "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.",
                       param="top_logprobs", code="invalid_parameter_combination")  # fmt: skip
    if chat.stream_options is not None and not chat.stream:
        raise APIError(400, "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
                       param="stream_options", code="invalid_parameter_combination")  # fmt: skip
    for number, message in enumerate(chat.messages):
        if message.content is None:
            raise APIError(400, f"Invalid value for 'messages[{number}].content': expected a string, got null.",
                           param=f"messages[{number}].content", code="invalid_type")  # fmt: skip


def generation_requests(chat: ChatRequest) -> list[GenerationRequest]:
    """Return one request to the engine for each choice; with a seed, each choice has its own that follows from it."""
    form = chat.response_format.grammar() if chat.response_format else None
    bias = {int(token): value for token, value in (chat.logit_bias or {}).items()}
    return [GenerationRequest(
        model=chat.model,
        messages=[message.model_dump(include={"role", "content"}) for message in chat.messages],
        max_tokens=chat.max_completion_tokens or chat.max_tokens,
        **chat.sampling(),
        stop=tuple(chat.stop or ()),
        seed=None if chat.seed is None else chat.seed + index,
        logprobs=bool(chat.logprobs),
        top_logprobs=chat.top_logprobs or 0,
        frequency_penalty=chat.frequency_penalty or 0.0,
        presence_penalty=chat.presence_penalty or 0.0,
        logit_bias=bias,
        form=form,
    ) for index in range(chat.n or 1)]  # fmt: skip


@router.post("", response_model=ChatCompletion)
async def create_chat_completion(request: Request, chat: ChatRequest) -> Any:
    check_combinations(chat)
    await run_in_threadpool(find_model, request.app.state.models, chat.model)
    asked = await run_in_threadpool(generation_requests, chat)  # a large schema takes its time
    await request.app.state.places.take()
    answer = Answer(request, asked)
    head = {"id": new_id("chatcmpl-"), "created": now(), "model": chat.model, "system_fingerprint": "fp_local",
            **chat.served()}  # fmt: skip
    try:
        if not chat.stream:
            return await complete(request, chat, answer, head)
        pieces = answer.pieces()
        first = await anext(pieces)  # what fails before the first word is still answered with an HTTP status
    except Exception as error:
        answer.close()
        return error_response(as_api_error(error, "messages"))
    stream = events(request, chat, answer, head, first, pieces)
    return StreamingResponse(stream, media_type="text/event-stream")


async def complete(request: Request, chat: ChatRequest, answer: Answer, head: Document) -> JSONResponse:
    choices: list[Document] = [
        {"index": index, "message": {"role": "assistant", "content": "", "refusal": None, "annotations": []},
         "logprobs": {"content": [], "refusal": None} if chat.logprobs else None, "finish_reason": None}
        for index in range(len(answer.generations))
    ]  # fmt: skip
    async for index, piece in answer.pieces():
        choices[index]["message"]["content"] += piece.text
        choices[index]["finish_reason"] = piece.finish_reason
        if chat.logprobs:
            choices[index]["logprobs"]["content"] += piece.logprobs or []
    answer.close()
    usage = request.state.usage = answer.usage()
    return JSONResponse({**head, "object": "chat.completion", "choices": choices, "usage": usage})


async def events(request: Request, chat: ChatRequest, answer: Answer, head: Document, first: tuple[int, Any],
                 pieces: AsyncIterator[tuple[int, Any]]) -> AsyncIterator[str]:  # fmt: skip
    """Yield the answer as server-sent events, one chunk each, as the API does."""
    with_usage = bool(chat.stream_options and chat.stream_options.include_usage)

    def event(choices: list[Document], usage: Document | None = None) -> str:
        chunk = {**head, "object": "chat.completion.chunk", "choices": choices}
        if with_usage:  # then every chunk has the key, and the last one, without choices, the figures
            chunk["usage"] = usage
        return f"data: {json.dumps(chunk)}\n\n"

    def choice(index: int, delta: Document, finish_reason: str | None = None, logprobs: Any = None) -> Document:
        shown = {"content": logprobs or [], "refusal": None} if chat.logprobs and delta else None
        return {"index": index, "delta": delta, "logprobs": shown, "finish_reason": finish_reason}

    try:
        for index in range(len(answer.generations)):
            yield event([choice(index, {"role": "assistant", "content": "", "refusal": None})])
        async for index, piece in chain(first, pieces):
            if piece.text or piece.logprobs:
                yield event([choice(index, {"content": piece.text}, logprobs=piece.logprobs)])
            if piece.finish_reason:
                yield event([choice(index, {}, piece.finish_reason)])
        request.state.usage = answer.usage()
        if with_usage:
            yield event([], answer.usage())
    except Exception as error:
        refusal = as_api_error(error, "messages")
        yield f"data: {json.dumps(error_body(refusal.status_code, refusal.detail, refusal.param, refusal.code))}\n\n"
    finally:
        answer.close()
    yield "data: [DONE]\n\n"


async def chain(first: Any, rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
    yield first
    async for one in rest:
        yield one
