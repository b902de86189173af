"""What the two routes that answer share: their parameters, and answers in the making.

Each choice of each request is one generation, whose pieces the engine's thread hands to the event loop.
"""

import asyncio
import contextlib
import json
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from local_api.base_models import ModelUnavailable
from local_api.errors import APIError, explain, model_not_found
from local_api.generation import EngineError, Generation, GenerationRequest, Piece
from local_api.models import find_model
from local_api.shapes import Metadata, Parameters
from local_api.store import Document, new_id, now

log = logging.getLogger("local_api")
KEEPS_NOTHING = (
    "This server keeps no answers: send the whole conversation, with 'store': false, or ask /v1/chat/completions."
)
TEXT_ALONE = "It answers with text alone: leave tools out, or send 'tool_choice': 'none'; for an object, a JSON schema."
MAX_ANSWERS = 64  # that the engine has at once, each choice of a request being one; more wait
MAX_WAITING = 256  # answers; a request for more is answered with 429
MAX_WAIT_SECONDS = 60.0  # so is one that has waited for so long

# Labels for the operator of a service, and hints on caching and scheduling: they change no answer.
IGNORED = ("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options",
           "parallel_tool_calls")  # fmt: skip
# Parameters that change what is answered or kept, with the values that leave it as it is here. Others are refused.
HARMLESS_VALUES: dict[str, tuple] = {
    "audio": (), "background": (False,), "conversation": (), "function_call": ("none",), "functions": ([],),
    "include": ([],), "max_tool_calls": (), "modalities": (["text"],), "moderation": (), "prediction": (),
    "previous_response_id": (), "prompt": (), "reasoning": ({}, {"effort": "none"}), "reasoning_effort": ("none",),
    "store": (False,), "tool_choice": ("none", "auto"), "tools": ([],), "truncation": ("disabled",),
    "verbosity": ("medium",), "web_search_options": (),
}  # fmt: skip
INSTEAD = {  # what a client can do
    **dict.fromkeys(("background", "conversation", "previous_response_id", "store"), KEEPS_NOTHING),
    **dict.fromkeys(("functions", "tool_choice", "tools"), TEXT_ALONE),
}


class AnswerParameters(Parameters):
    """The parameters that chat completions and responses have in common."""

    model: str
    stream: bool | None = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None
    metadata: Metadata = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None  # answered by the default one

    @model_validator(mode="before")
    @classmethod
    def refuse_unsupported(cls, sent: Any) -> Any:
        if not isinstance(sent, dict):
            return sent
        for name in HARMLESS_VALUES:
            if name != "tools" or sent.get("tool_choice") != "none":  # then they change nothing
                refuse_unless_harmless(name, sent.get(name))
        return {name: value for name, value in sent.items() if name not in HARMLESS_VALUES and name not in IGNORED}

    def generation_requests(self) -> list[GenerationRequest]:
        """Return one request to the engine for each choice."""
        raise NotImplementedError

    def sampling(self) -> dict[str, Any]:
        values = {"temperature": self.temperature, "top_p": self.top_p}
        return {name: 1.0 if value is None else value for name, value in values.items()}

    def served(self) -> Document:
        """Return what an answer says of the service tier: whoever named one is told which it got."""
        return {"service_tier": "default"} if self.service_tier else {}


def refuse_unless_harmless(name: str, value: Any) -> None:
    harmless, instead = HARMLESS_VALUES[name], INSTEAD.get(name, "")
    if value is None or value in harmless:
        return
    only = " or ".join(json.dumps(one) for one in harmless if one not in ([], {}, "none"))
    if not only:
        raise APIError(400, f"Unsupported parameter: '{name}' is not supported with this model. {instead}".strip(),
                       param=name, code="unsupported_parameter")  # fmt: skip
    why = f"does not support {json.dumps(value)[:100]} with this model. Only {only} is supported. {instead}"
    raise APIError(400, f"Unsupported value: '{name}' {why}".strip(), param=name, code="unsupported_value")


def joined_text(content: Any) -> Any:
    """Accept a message's content as text or as a list of text parts; refuse images, audio and files."""
    if not isinstance(content, list):
        return content
    for part in content:
        is_text = isinstance(part, dict) and part.get("type") in ("text", "input_text", "output_text")
        if not is_text or not isinstance(part.get("text"), str):
            raise PydanticCustomError("value_error", "this is a text model: every content part must be text")
    return "".join(part["text"] for part in content)


class Places:
    """Places for MAX_ANSWERS answers; more wait for one: first come, first served."""

    def __init__(self) -> None:
        self.free, self.turn = asyncio.Semaphore(MAX_ANSWERS), asyncio.Lock()
        self.waiting = 0
        self.ended, self.seconds = 0, 10.0  # answers; what one took, lately (a guess until the first has ended)

    async def take(self, count: int) -> None:
        """Take the places of a request, which `give_back` gives back."""
        if self.waiting + count > MAX_WAITING:
            raise self.busy()
        self.waiting += count
        try:
            await asyncio.wait_for(self.take_in_turn(count), MAX_WAIT_SECONDS)
        except asyncio.TimeoutError:
            raise self.busy() from None
        finally:
            self.waiting -= count

    async def take_in_turn(self, count: int) -> None:
        """One request after the other: two that have some of their places would wait for each other."""
        taken = 0
        try:
            async with self.turn:
                while taken < count:
                    await self.free.acquire()
                    taken += 1
        except asyncio.CancelledError:
            for _ in range(taken):
                self.free.release()
            raise

    def give_back(self, seconds: float) -> None:
        """Give back the place of an answer that took so long."""
        self.ended += 1
        self.seconds += (seconds - self.seconds) / min(self.ended, 20)
        self.free.release()

    def busy(self) -> APIError:
        """Return the refusal; Retry-After is how long a request that comes now would wait, as things go."""
        seconds = math.ceil((self.waiting + 1) * self.seconds / MAX_ANSWERS)
        sentence = f"This server has {MAX_ANSWERS} answers to write, and {self.waiting} more wait"
        return APIError(429, f"{sentence}; try again in {seconds} s.", code="rate_limit_exceeded",
                        headers={"Retry-After": str(seconds)})  # fmt: skip


@dataclass
class Choice:
    """What has arrived of one of an answer's texts."""

    text: str = ""
    logprobs: list[Document] = field(default_factory=list)
    finish_reason: str | None = None


class Answer:
    """The generations of one HTTP request, one for each choice. Each has a place until it has ended.

    `close` it in any case: it stops what is still being generated. A client that closes its connection does the same.
    """

    def __init__(self, http: Request, requests: list[GenerationRequest]):
        self.http, self.state = http, http.app.state
        self.id, self.created = new_id(""), now()
        self.choices = [Choice() for _ in requests]
        self.loop = asyncio.get_running_loop()
        self.arrived: asyncio.Queue = asyncio.Queue()
        self.generations = [Generation(one, partial(self.hand_over, index)) for index, one in enumerate(requests)]
        self.running: set[int] = set()  # choices that have a place
        self.closed = False
        self.taking = asyncio.create_task(self.state.places.take(len(requests)))
        self.leaving = asyncio.create_task(self.close_when_gone())

    def submit(self) -> None:
        """In a thread: the base model may have to be fetched first."""
        try:
            self.state.engine.submit_together(self.generations)
        except Exception as error:
            self.hand_over(0, error)

    def hand_over(self, index: int, piece: Any) -> None:
        """In any thread: let the event loop have a piece, or an exception that ends the answer."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
            self.loop.call_soon_threadsafe(self.arrive, index, piece)

    def arrive(self, index: int, piece: Any) -> None:
        """Keep a piece, unless its choice has ended; the place of one that ends with it is free, read or not."""
        if index in self.running:
            self.arrived.put_nowait((index, piece))
            if isinstance(piece, Exception):
                self.give_back(*self.running)
            elif piece.finish_reason:
                self.give_back(index)

    def give_back(self, *choices: int) -> None:
        for choice in choices:
            self.running.remove(choice)
            self.state.places.give_back(time.monotonic() - self.started)

    async def begin(self) -> None:
        """Wait for places and for the first piece: what fails before that is still answered with an HTTP status."""
        try:
            await self.taking
        except asyncio.CancelledError:
            if not self.closed:  # close() has left an exception to arrive
                raise
        else:
            self.started, self.running = time.monotonic(), set(range(len(self.choices)))
            if self.closed:  # the client has left at this very moment
                self.give_back(*self.running)
            else:
                threading.Thread(target=self.submit, name="submit", daemon=True).start()
        self.first = await self.arrived.get()
        if isinstance(self.first[1], Exception):
            raise self.first[1]

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yield (index of the choice, piece) as they arrive."""
        index, piece = self.first
        while True:
            if isinstance(piece, Exception):
                raise piece
            choice = self.choices[index]
            choice.text += piece.text
            choice.logprobs += piece.logprobs or []
            choice.finish_reason = piece.finish_reason
            yield index, piece
            if all(choice.finish_reason for choice in self.choices):
                return
            index, piece = await self.arrived.get()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.taking.cancel()
            self.leaving.cancel()
            self.http.state.usage = self.usage()  # for the log
            for generation in self.generations:
                generation.cancel()
            self.give_back(*self.running)
            self.arrived.put_nowait((0, APIError(499, "The client has closed its connection.")))  # if one still waits

    async def close_when_gone(self) -> None:
        while (await self.http.receive())["type"] != "http.disconnect":
            pass
        self.close()

    def usage(self) -> Document:
        """Return the tokens of prompt and choices; as at OpenAI, the prompt counts once."""
        prompt = self.generations[0].prompt_tokens
        completion = sum(generation.completion_tokens for generation in self.generations)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def respond(
    http: Request,
    asked: AnswerParameters,
    document: Callable[[Any, Answer], Document],
    events: Callable[[Any, Answer], AsyncIterator[str]],
    prompt: str,
) -> Response:
    """Let the engine answer, and send what it says: one document, or events. prompt: the parameter that holds it."""
    await run_in_threadpool(find_model, http.app.state.models, asked.model)
    requests = await run_in_threadpool(asked.generation_requests)  # a large schema takes its time
    answer = Answer(http, requests)
    try:
        await answer.begin()
        if asked.stream:
            return StreamingResponse(events(asked, answer), media_type="text/event-stream")
        async for _ in answer.pieces():
            pass
    except Exception as error:
        answer.close()
        raise as_api_error(error, prompt) from None
    answer.close()
    return JSONResponse(document(asked, answer))


# Of an EngineError; others are 500.
STATUS_OF_CODE = {
    "context_length_exceeded": 400,
    "invalid_value": 400,
    "model_not_available": 503,
    "server_shutting_down": 503,
}


def as_api_error(error: Exception, prompt: str) -> APIError:
    """Return what the client is told about a generation that failed. prompt: the parameter that held the prompt."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, KeyError):  # deleted in this very moment
        return model_not_found(str(error.args[0]))
    if isinstance(error, EngineError):
        status = STATUS_OF_CODE.get(error.code, 500)
        return APIError(status, str(error), param=error.param or (prompt if status == 400 else None), code=error.code)
    if isinstance(error, ModelUnavailable):
        return APIError(503, str(error), param="model", code="model_not_available")
    log.error("An answer failed", exc_info=error)
    return explain(error)
