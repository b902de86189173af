"""Answering: one thread lets all requests that wait for the same model go through it together (continuous batching).

Most of the time of a small model goes into reading its weights from memory; a step that carries eight answers one token
further reads them once instead of eight times. Requests join between two steps and leave when they are done, so a long
answer holds nobody up.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

MAX_ROWS = 16  # answers that one model writes at the same time; more wait
MAX_MODELS = 4  # models kept in memory; the one unused for longest goes first
DEFAULT_CONTEXT = 4096  # for models whose configuration names no longest input


class EngineError(Exception):
    """A request that cannot be answered; `code` is the API's error code."""

    def __init__(self, message: str, code: str = "server_error"):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class GenerationRequest:
    """One answer asked for. `max_tokens` None: as long as the model's context allows. `top_logprobs`: 0 to 20."""

    model: str
    messages: list[dict]
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stop: Sequence[str] = ()
    seed: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0


class Piece(NamedTuple):
    """Text that became certain with one step; the last piece of an answer carries "stop" or "length"."""

    text: str
    logprobs: list[dict] | None = None
    finish_reason: str | None = None


@dataclass
class Generation:
    """An answer in the making: iterate over it for its pieces (blocks until there is one; raises EngineError)."""

    request: GenerationRequest
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cancelled: bool = False
    pieces: queue.SimpleQueue = field(default_factory=queue.SimpleQueue, repr=False)

    def cancel(self) -> None:
        """Stop writing this answer; whoever still reads it gets its end."""
        self.cancelled = True
        self.pieces.put(Piece("", None, "stop"))

    def __iter__(self) -> Iterator[Piece]:
        while True:
            piece = self.pieces.get()
            if isinstance(piece, EngineError):
                raise piece
            yield piece
            if piece.finish_reason:
                return


class Engine:
    """Answers requests for any model that `locate(model_id) -> (base model directory, adapter directory or None)` has.

    `locate` raises KeyError for an unknown model. PyTorch is imported by the engine's thread, at the first request.
    """

    def __init__(self, locate: Callable[[str], tuple[Path, Path | None]]):
        self.locate = locate
        self.waiting: list[Generation] = []
        self.batches: dict[str, Batch] = {}
        self.forgotten: set[str] = set()
        self.changed = threading.Condition()
        self.closed = False
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.thread.start()

    def submit(self, request: GenerationRequest) -> Generation:
        """Queue a request; KeyError if its model is unknown."""
        self.locate(request.model)
        generation = Generation(request)
        with self.changed:
            if self.closed:
                raise EngineError("The server is shutting down.", "server_shutting_down")
            self.waiting.append(generation)
            self.changed.notify()
        return generation

    def load(self) -> int:
        """Return how many answers are being written or wait."""
        return len(self.waiting) + sum(len(batch.rows) for batch in list(self.batches.values()))

    def forget(self, model_id: str) -> None:
        """Drop a deleted model from memory once its running answers are done."""
        with self.changed:
            self.forgotten.add(model_id)
            self.changed.notify()

    def close(self) -> None:
        """Stop after the current step; unfinished answers end with an EngineError."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    # --- the engine's thread ---

    def run(self) -> None:
        while True:
            with self.changed:
                while not (self.waiting or self.closed or self.forgotten or any(b.rows for b in self.batches.values())):
                    self.changed.wait()
                if self.closed:
                    break
                admitted = self.admit()
            for model_id, generations in admitted.items():
                self.attempt(model_id, partial(Batch.add, generations=generations), generations)
            for model_id in list(self.batches):
                self.attempt(model_id, Batch.step, [])
        self.abandon(self.waiting + [row.generation for batch in self.batches.values() for row in batch.rows])

    def admit(self) -> dict[str, list[Generation]]:
        """Take from the queue, first come first served, what finds room beside the answers being written."""
        self.drop_forgotten()
        admitted: dict[str, list[Generation]] = {}
        left = []
        for generation in self.waiting:
            model_id = generation.request.model
            writing = len(self.batches[model_id].rows) if model_id in self.batches else 0
            if generation.cancelled:
                continue
            if writing + len(admitted.get(model_id, [])) < MAX_ROWS:
                admitted.setdefault(model_id, []).append(generation)
            else:
                left.append(generation)
        self.waiting = left
        return admitted

    def attempt(self, model_id: str, action: Callable[[Batch], None], generations: list[Generation]) -> None:
        """Do one thing with a model's batch; a fault ends its answers, never the thread."""
        from .base_models import ModelUnavailable

        try:
            action(self.batch(model_id))
        except ModelUnavailable as error:
            self.abandon(generations, str(error))
        except Exception:
            traceback.print_exc(file=sys.stderr)
            batch = self.batches.pop(model_id, None)
            lost = generations + [row.generation for row in (batch.rows if batch else [])]
            self.abandon(lost, "The model failed while answering.")

    def abandon(self, generations: list[Generation], message: str = "The server is shutting down.") -> None:
        for generation in generations:
            generation.pieces.put(EngineError(message))

    def batch(self, model_id: str) -> Batch:
        """Return a model's batch, loading the model first if it is not in memory."""
        if model_id not in self.batches:
            from . import base_models

            idle = sorted((b for b in self.batches.values() if not b.rows), key=lambda b: b.used)
            for batch in idle[: max(0, len(self.batches) + 1 - MAX_MODELS)]:
                del self.batches[batch.model_id]
            try:
                model_dir, adapter_dir = self.locate(model_id)
            except KeyError:
                raise base_models.ModelUnavailable(f"The model {model_id} was deleted.") from None
            self.batches[model_id] = Batch(model_id, *base_models.load(model_dir, adapter_dir))
        return self.batches[model_id]

    def drop_forgotten(self) -> None:
        for model_id in list(self.forgotten):
            if model_id not in self.batches or not self.batches[model_id].rows:
                self.batches.pop(model_id, None)
                self.forgotten.discard(model_id)


class Row:
    """One answer being written: its tokens, what of its text has been handed out, how the next token is drawn."""

    def __init__(self, generation: Generation, prompt: list[int], limit: int):
        import torch

        self.generation, self.request = generation, generation.request
        self.prompt, self.limit = prompt, limit
        self.ids: list[int] = []
        self.sent = 0  # characters handed out
        self.logprobs: list[dict] = []
        self.random = torch.Generator()
        if self.request.seed is not None:
            self.random.manual_seed(self.request.seed % 2**63)
        else:
            self.random.seed()

    def draw(self, logits: Any) -> int:
        """Choose the next token from its logits (shape: vocabulary; float32, on the CPU)."""
        import torch

        if self.request.temperature == 0:
            return int(logits.argmax())
        probabilities = torch.softmax(logits / self.request.temperature, -1)
        if self.request.top_p < 1:
            ordered, order = probabilities.sort(descending=True)
            ordered[ordered.cumsum(-1) - ordered > self.request.top_p] = 0  # the first token always stays
            return int(order[torch.multinomial(ordered, 1, generator=self.random)])
        return int(torch.multinomial(probabilities, 1, generator=self.random))

    def note_logprobs(self, logits: Any, token: int, decode: Callable[[list[int]], str]) -> None:
        """Keep the token's log probability and those of its likeliest rivals, in the API's form."""
        scores = logits.log_softmax(-1)

        def entry(identifier: int) -> dict:
            text = decode([identifier])
            return {"token": text, "logprob": float(scores[identifier]), "bytes": list(text.encode())}

        rivals = scores.topk(self.request.top_logprobs).indices.tolist() if self.request.top_logprobs else []
        self.logprobs.append({**entry(token), "top_logprobs": [entry(rival) for rival in rivals]})

    def hand_out(self, text: str, finish_reason: str | None) -> bool:
        """Send what became certain of the answer's text; return whether the answer is finished.

        Held back: half a character (its other bytes are still to come) and anything that could become a stop sequence.
        """
        for stop in self.request.stop:
            at = text.find(stop, max(0, self.sent - len(stop)))
            if at >= 0:
                text, finish_reason = text[:at], "stop"
        certain = len(text)
        if finish_reason is None:
            certain -= len(text) - len(text.rstrip("�"))
            held = (n for stop in self.request.stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
            certain = min(certain, len(text) - max(held, default=0))
        if certain > self.sent or finish_reason:
            logprobs, self.logprobs = (self.logprobs if self.request.logprobs else None), []
            self.generation.pieces.put(Piece(text[self.sent : certain], logprobs, finish_reason))
            self.sent = max(self.sent, certain)
        return finish_reason is not None


class Batch:
    """The answers that one model writes together, and the keys and values it remembers for them.

    Shapes: attended (rows, columns), 1 where a column belongs to the row; a layer's keys and values (rows, heads,
    columns, width).
    Rows are aligned on the right: a shorter row has unattended columns on its left.
    """

    def __init__(self, model_id: str, model: Any, tokenizer: Any):
        from .encoding import end_of_turn_ids

        self.model_id, self.model, self.tokenizer = model_id, model, tokenizer
        self.ends = end_of_turn_ids(tokenizer, model)
        self.context = getattr(model.config, "max_position_embeddings", None) or DEFAULT_CONTEXT
        self.rows: list[Row] = []
        self.cache: Any = None
        self.attended: Any = None
        self.used = time.monotonic()

    def add(self, generations: list[Generation]) -> None:
        """Read the prompts of new requests in one pass, draw their first tokens and join them to the others."""
        import torch
        from transformers import DynamicCache

        rows = [row for row in (self.start(generation) for generation in generations) if row]
        if not rows:
            return
        width = max(len(row.prompt) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        attended = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row.prompt) :] = torch.tensor(row.prompt)
            attended[i, width - len(row.prompt) :] = 1
        cache = DynamicCache()
        positions = (attended.cumsum(1) - 1).clamp(min=0)
        logits = self.forward(ids, attended, positions, cache)
        self.join(rows, cache, attended)
        self.advance(rows, logits)

    def start(self, generation: Generation) -> Row | None:
        """Encode a request's prompt; one that cannot be answered gets its error."""
        from .encoding import EncodingError, encode_prompt

        try:
            prompt = encode_prompt(self.tokenizer, generation.request.messages)
        except EncodingError as error:
            generation.pieces.put(EngineError(f"{error}".capitalize() + ".", "invalid_value"))
            return None
        generation.prompt_tokens = len(prompt)
        if len(prompt) >= self.context:
            limit = f"This model's maximum context length is {self.context} tokens"
            sentence = f"{limit}. However, your messages resulted in {len(prompt)} tokens."
            generation.pieces.put(EngineError(sentence, "context_length_exceeded"))
            return None
        room = self.context - len(prompt)
        return Row(generation, prompt, min(generation.request.max_tokens or room, room))

    def step(self) -> None:
        """Carry every answer one token further."""
        import torch

        self.keep([i for i, row in enumerate(self.rows) if not row.generation.cancelled])
        if not self.rows:
            return
        ids = torch.tensor([[row.ids[-1]] for row in self.rows])
        positions = self.attended.sum(1, keepdim=True)
        self.attended = torch.cat([self.attended, torch.ones_like(ids)], 1)
        self.advance(self.rows, self.forward(ids, self.attended, positions, self.cache))

    def forward(self, ids: Any, attended: Any, positions: Any, cache: Any) -> Any:
        """Return the logits of each row's next token: (rows, vocabulary), float32, on the CPU."""
        import torch

        self.used = time.monotonic()
        device = self.model.device
        with torch.inference_mode():
            output = self.model(
                input_ids=ids.to(device),
                attention_mask=attended.to(device),
                position_ids=positions.to(device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return output.logits[:, -1].float().cpu()

    def advance(self, rows: list[Row], logits: Any) -> None:
        """Draw the next token of each row, hand out the text that it completes and let finished rows go."""
        finished = set()
        for row, scores in zip(rows, logits, strict=True):
            token = row.draw(scores)
            row.generation.completion_tokens += 1
            ended = token in self.ends
            if not ended:
                row.ids.append(token)
                if row.request.logprobs:
                    row.note_logprobs(scores, token, self.decode)
            reason = "stop" if ended else "length" if len(row.ids) >= row.limit else None
            if row.hand_out(self.decode(row.ids), reason):
                finished.add(row)
        self.keep([i for i, row in enumerate(self.rows) if row not in finished])

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def join(self, rows: list[Row], cache: Any, attended: Any) -> None:
        """Put newly read rows beside the ones being written, aligned on the right."""
        import torch
        from torch.nn.functional import pad

        if self.rows:
            width = max(attended.shape[1], self.attended.shape[1])
            old, new = width - self.attended.shape[1], width - attended.shape[1]
            attended = torch.cat([pad(self.attended, (old, 0)), pad(attended, (new, 0))])
            for mine, theirs in zip(self.cache.layers, cache.layers, strict=True):
                theirs.keys = torch.cat([pad(mine.keys, (0, 0, old, 0)), pad(theirs.keys, (0, 0, new, 0))])
                theirs.values = torch.cat([pad(mine.values, (0, 0, old, 0)), pad(theirs.values, (0, 0, new, 0))])
        self.rows, self.cache, self.attended = self.rows + rows, cache, attended

    def keep(self, places: list[int]) -> None:
        """Drop every row but those at `places`, and the columns that no remaining row needs."""
        if len(places) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in places]
        if not self.rows:
            self.cache = self.attended = None
            return
        attended = self.attended[places]
        first = int(attended.any(0).nonzero()[0])
        self.attended = attended[:, first:]
        for layer in self.cache.layers:
            layer.keys = layer.keys[places][:, :, first:]
            layer.values = layer.values[places][:, :, first:]
