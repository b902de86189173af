"""An answer that is asked for, and what becomes of it: what those who ask the engine share with those who write."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class EngineError(Exception):
    """A request that cannot be answered; `code` is the API's error code, `param` what is at fault if not the prompt."""

    def __init__(self, message: str, code: str = "server_error", param: str | None = None):
        super().__init__(message)
        self.code, self.param = code, param


@dataclass(frozen=True)
class GenerationRequest:
    """One answer asked for. `max_tokens` None: as long as the model's context allows. `top_logprobs`: 0 to 20.

    logit_bias: what is added to the logits of tokens, by their ids in the model's own vocabulary.
    form: the grammar that the answer keeps to (forms.py).
    """

    model: str
    messages: list[dict]
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stop: Sequence[str] = ()
    seed: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    form: str | None = None


class Piece(NamedTuple):
    """Text that became certain with one step; the last piece of an answer carries "stop" or "length"."""

    text: str
    logprobs: list[dict] | None = None
    finish_reason: str | None = None


class Generation:
    """An answer in the making. `put` gets each piece of it as it comes, and the EngineError that ends it if one does.

    Where no `put` is given, iterate over it for its pieces (blocks until there is one; raises EngineError).
    """

    def __init__(self, request: GenerationRequest, put: Callable[[Any], None] | None = None):
        self.request = request
        self.prompt_tokens = self.completion_tokens = 0
        self.cancelled = False
        self.pieces: queue.SimpleQueue = queue.SimpleQueue()
        self.put = put or self.pieces.put

    def cancel(self) -> None:
        """Stop writing this answer; whoever still reads it gets its end."""
        self.cancelled = True
        self.put(Piece("", None, "stop"))

    def __iter__(self) -> Iterator[Piece]:
        while True:
            piece = self.pieces.get()
            if isinstance(piece, EngineError):
                raise piece
            yield piece
            if piece.finish_reason:
                return
