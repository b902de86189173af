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
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from fastapi import Request
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from local_api.base_models import ModelUnavailable
from local_api.errors import APIError, explain, model_not_found
from local_api.generation import EngineError, Generation, GenerationRequest
from local_api.shapes import Metadata, Parameters
from local_api.store import Document

log = logging.getLogger("local_api")
TEXT_ALONE = "It answers with text alone: leave tools out, or send 'tool_choice': 'none'; for an object, a JSON schema."
MAX_ANSWERS = 64  # requests that the engine has at once; more wait
MAX_WAITING = 256  # requests; one more is answered with 429
MAX_WAIT_SECONDS = 60.0  # so is one that has waited for so long


class AnswerParameters(Parameters):
    """The parameters that chat completions and responses have in common."""

    # Parameters that change what is answered or kept, with the values that leave it as it is here. Others are refused,
    # with what a client can do instead where there is something.
    harmless_values: ClassVar[dict[str, tuple]]
    instead: ClassVar[dict[str, str]]

    model: str
    stream: bool | None = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None
    # Labels for the operator of a service, and hints on caching and scheduling: they change no answer.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Any = None
    metadata: Metadata = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None  # answered by the default one
    parallel_tool_calls: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def refuse_unsupported(cls, sent: Any) -> Any:
        if not isinstance(sent, dict):
            return sent
        for name, harmless in cls.harmless_values.items():
            if name != "tools" or sent.get("tool_choice") != "none":  # then they change nothing
                refuse_unless_harmless(name, sent.get(name), harmless, cls.instead.get(name, ""))
        return {name: value for name, value in sent.items() if name not in cls.harmless_values}

    def sampling(self) -> dict[str, Any]:
        values = {"temperature": self.temperature, "top_p": self.top_p}
        return {name: 1.0 if value is None else value for name, value in values.items()}

    def served(self) -> Document:
        """Return what an answer says of the service tier: whoever named one is told which it got."""
        return {"service_tier": "default"} if self.service_tier else {}


def refuse_unless_harmless(name: str, value: Any, harmless: tuple, instead: str) -> None:
    if value is None or any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in harmless):
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
    """Places for MAX_ANSWERS requests; more wait for one: first come, first served."""

    def __init__(self) -> None:
        self.free = asyncio.Semaphore(MAX_ANSWERS)
        self.waiting = 0
        self.ended, self.seconds = 0, 10.0  # requests; what one took, lately (a guess until the first has ended)

    async def take(self) -> None:
        """Take a place, which `give_back` gives back."""
        if self.waiting >= MAX_WAITING:
            raise self.busy()
        self.waiting += 1
        try:
            await asyncio.wait_for(self.free.acquire(), MAX_WAIT_SECONDS)
        except asyncio.TimeoutError:
            raise self.busy() from None
        finally:
            self.waiting -= 1

    def give_back(self, seconds: float) -> None:
        """Give back the place of a request that took so long."""
        self.ended += 1
        self.seconds += (seconds - self.seconds) / min(self.ended, 20)
        self.free.release()

    def busy(self) -> APIError:
        """Return the refusal; Retry-After is how long a request that comes now would wait, as things go."""
        seconds = math.ceil((self.waiting + 1) * self.seconds / MAX_ANSWERS)
        sentence = f"This server has {MAX_ANSWERS} requests to answer, and {self.waiting} more wait"
        return APIError(429, f"{sentence}; try again in {seconds} s.", code="rate_limit_exceeded",
                        headers={"Retry-After": str(seconds)})  # fmt: skip


class Answer:
    """The generations of one HTTP request: an async stream of (index, piece) in order of arrival.

    It has its place already. `close` it in any case: it stops what is still being generated and gives the place back. A
    client that closes its connection does the same.
    """

    def __init__(self, http: Request, requests: list[GenerationRequest]):
        self.state = http.app.state
        self.loop = asyncio.get_running_loop()
        self.arrived: asyncio.Queue = asyncio.Queue()
        self.generations = [Generation(one, partial(self.hand_over, index)) for index, one in enumerate(requests)]
        self.started = time.monotonic()
        self.closed = False
        self.leaving = asyncio.create_task(self.close_when_gone(http))
        threading.Thread(target=self.submit, name="submit", daemon=True).start()

    def submit(self) -> None:
        """In a thread: the base model may have to be fetched first."""
        try:
            self.state.engine.submit_together(self.generations)
        except Exception as error:
            self.hand_over(0, error)

    def hand_over(self, index: int, piece: Any) -> None:
        """In any thread: let the event loop have a piece, or an exception that ends the answer."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
            self.loop.call_soon_threadsafe(self.arrived.put_nowait, (index, piece))

    async def pieces(self) -> AsyncIterator[tuple[int, Any]]:
        unfinished = len(self.generations)
        while unfinished:
            index, piece = await self.arrived.get()
            if isinstance(piece, Exception):
                raise piece
            unfinished -= piece.finish_reason is not None
            yield index, piece

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.state.places.give_back(time.monotonic() - self.started)
            self.leaving.cancel()
            for generation in self.generations:
                generation.cancel()

    async def close_when_gone(self, http: Request) -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        self.close()

    def usage(self) -> Document:
        """Return the tokens of prompt and choices; as at OpenAI, the prompt counts once."""
        prompt = self.generations[0].prompt_tokens
        completion = sum(generation.completion_tokens for generation in self.generations)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0, "accepted_prediction_tokens": 0,
                                          "rejected_prediction_tokens": 0},
        }  # fmt: skip


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
