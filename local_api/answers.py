"""What the two routes that answer share: their parameters, and answers in the making.

The routes are asynchronous, the engine's iterators block: each choice of each request is one generation, followed by a
thread of its own that hands its pieces to the event loop.
"""

import asyncio
import contextlib
import json
import logging
import math
import threading
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, ClassVar, Literal

from fastapi import Request
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from local_api.base_models import ModelUnavailable
from local_api.engine import Engine
from local_api.errors import APIError, explain, model_not_found
from local_api.generation import EngineError, GenerationRequest
from local_api.shapes import Metadata, Parameters
from local_api.store import Document

log = logging.getLogger("local_api")
TEXT_ALONE = "It answers with text alone: leave tools out, or send 'tool_choice': 'none'; for an object, a JSON schema."
MAX_GENERATIONS = 64  # that the engine has at once; more wait
MAX_WAITING = 256  # generations; one more is answered with 429
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


class Generating:
    """The engine, how many generations it has, and the requests that wait for a place: first come, first served."""

    def __init__(self, app_state: Any):
        self.state = app_state
        self.running = 0
        self.waiting: list[tuple[int, asyncio.Future]] = []  # places wanted, what is done when they are there
        self.ended, self.seconds = 0, 10.0  # generations; what one took, lately (a guess until the first has ended)
        self.lock = threading.Lock()

    def engine(self) -> Any:
        with self.lock:
            if self.state.engine is None:
                worker, limit = self.state.worker, self.state.settings.max_memory
                self.state.engine = Engine(self.state.models.locate, limit, lambda: worker.training)
            return self.state.engine

    # What follows runs on the event loop only: no lock.

    async def reserve(self, http: Request, count: int) -> None:
        """Take `count` places, which `release` gives back one by one; wait until there are so many."""
        if self.wanted() + count > MAX_WAITING:
            raise self.busy(count)
        turn = asyncio.get_running_loop().create_future()
        self.waiting.append((count, turn))
        self.let_in()
        if turn.done():
            return
        gone = asyncio.create_task(until_gone(http))
        try:
            await asyncio.wait({turn, gone}, timeout=MAX_WAIT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not turn.done():
                self.waiting.remove((count, turn))
                self.let_in()  # one that wants less may have stood behind it
        if not turn.done():
            raise APIError(499, "The client has closed the connection.") if gone.done() else self.busy(count)

    def wanted(self) -> int:
        return sum(count for count, _ in self.waiting)

    def let_in(self) -> None:
        while self.waiting and self.running + self.waiting[0][0] <= MAX_GENERATIONS:
            count, turn = self.waiting.pop(0)
            self.running += count
            turn.set_result(None)

    def release(self, seconds: float) -> None:
        """Give back the place of a generation that took so long."""
        self.running -= 1
        self.ended += 1
        self.seconds += (seconds - self.seconds) / min(self.ended, 20)
        self.let_in()

    def busy(self, count: int) -> APIError:
        """Return the refusal; Retry-After is how long a request that comes now would wait, as things go."""
        seconds = math.ceil((self.wanted() + count) * self.seconds / MAX_GENERATIONS)
        sentence = f"This server has {self.running} answers to write, and {self.wanted()} more wait"
        return APIError(429, f"{sentence}; try again in {seconds} s.", code="rate_limit_exceeded",
                        headers={"Retry-After": str(seconds)})  # fmt: skip


async def until_gone(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


class Answer:
    """The generations of one HTTP request: an async stream of (index, piece) in order of arrival.

    It has its places already (Generating.reserve). `close` it in any case: it stops what is still being generated. A
    client that closes its connection does the same.
    """

    def __init__(self, http: Request, requests: list[GenerationRequest]):
        self.generating: Generating = http.app.state.generating
        self.count = len(requests)
        self.generations: list[Any] = []
        self.abandoned = False
        self.arrived: asyncio.Queue = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.started = time.monotonic()
        self.leaving = asyncio.create_task(self._close_when_gone(http))
        threading.Thread(target=self._submit, args=(requests,), name="submit", daemon=True).start()

    def _submit(self, requests: list[GenerationRequest]) -> None:
        """In a thread: the first engine takes its time, and a database may be locked."""
        try:
            self.generations = self.generating.engine().submit_together(requests)
        except Exception as error:
            for index in range(self.count):
                self._hand_over(self._end, index, error)
            return
        if self.abandoned:
            self._cancel()
        for index, generation in enumerate(self.generations):
            threading.Thread(target=self._follow, args=(index, generation), name="generation", daemon=True).start()

    def _follow(self, index: int, generation: Any) -> None:
        """In a thread: hand every piece of one generation to the event loop."""
        last: Any = None  # None says that it is complete, an exception that it failed
        try:
            for piece in generation:
                self._hand_over(self.arrived.put_nowait, (index, piece))
        except Exception as error:
            last = error
        self._hand_over(self._end, index, last)

    def _hand_over(self, function: Any, *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
            self.loop.call_soon_threadsafe(function, *arguments)

    def _end(self, index: int, last: Any) -> None:
        self.generating.release(time.monotonic() - self.started)
        self.arrived.put_nowait((index, last))

    async def pieces(self) -> AsyncIterator[tuple[int, Any]]:
        remaining = self.count
        while remaining:
            index, piece = await self.arrived.get()
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                remaining -= 1
            else:
                yield index, piece

    def close(self) -> None:
        self.leaving.cancel()
        self.abandoned = True
        self._cancel()

    def _cancel(self) -> None:
        for generation in self.generations:
            generation.cancel()

    async def _close_when_gone(self, http: Request) -> None:
        await until_gone(http)
        self.close()

    def usage(self) -> Document:
        """Return the tokens of prompt and choices; as at OpenAI, the prompt counts once."""
        prompt = self.generations[0].prompt_tokens if self.generations else 0
        completion = sum(generation.completion_tokens for generation in self.generations)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0, "accepted_prediction_tokens": 0,
                                          "rejected_prediction_tokens": 0},
        }  # fmt: skip


def as_api_error(error: Exception, prompt: str) -> APIError:
    """Return what the client is told about a generation that failed. prompt: the parameter that held the prompt."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, KeyError):  # deleted in this very moment
        return model_not_found(str(error.args[0]))
    if isinstance(error, EngineError) and error.code in ("context_length_exceeded", "invalid_value"):
        return APIError(400, str(error), param=error.param or prompt, code=error.code)
    if isinstance(error, EngineError):
        passing = error.code in ("server_shutting_down", "model_not_available")
        return APIError(503 if passing else 500, str(error), code=error.code)
    if isinstance(error, ModelUnavailable):
        return APIError(503, str(error), param="model", code="model_not_available")
    log.error("An answer failed", exc_info=error)
    return explain(error)
