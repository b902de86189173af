"""The answers that one model writes together: prompts join, every step adds a token to each, finished ones leave.

A prompt is read in pieces, one between two steps, so that a long one holds up neither the answers of others nor the
server's end.

It imports PyTorch, so the engine imports it when the first request is there.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import torch
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .encoding import EncodingError, encode_prompt, end_of_turn_ids
from .generation import EngineError, Generation, Piece
from .inference import new_cache, next_logits
from .sampling import Sampler

DEFAULT_CONTEXT = 4096  # for models whose configuration names no longest input
PIECE_TOKENS = 256  # of prompts that are read between two steps
TOGETHER_TOKENS = 2048  # of prompts that are read side by side
ENCODED_BYTES = 100_000  # of new prompts that are encoded between two steps, the last one whole
BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # how byte-level vocabularies write bytes


def prompt_bytes(generation: Generation) -> int:
    return sum(len(str(message["content"]).encode()) for message in generation.request.messages)


class Row:
    """One answer being written: its tokens, and what of its text has been handed out."""

    def __init__(self, generation: Generation, prompt: list[int], limit: int, matcher: Any = None):
        self.generation, self.request = generation, generation.request
        self.prompt, self.limit = prompt, limit
        self.ids: list[int] = []
        self.sent = 0  # characters handed out
        self.text = ""  # as it was decoded at the last step
        self.finished = False
        self.logprobs: list[tuple[int, dict]] = []  # not handed out yet, with the place where their token starts
        self.sampler = Sampler(self.request, matcher)

    def note_logprobs(self, logits: Any, token: int, spell: Callable[[int], tuple[str, bytes]]) -> None:
        """Keep the token's log probability and those of its likeliest rivals, in the API's form."""
        scores = logits.log_softmax(-1)

        def entry(identifier: int) -> dict:
            text, spelled = spell(identifier)
            return {"token": text, "logprob": float(scores[identifier]), "bytes": list(spelled)}

        rivals = scores.topk(self.request.top_logprobs).indices.tolist() if self.request.top_logprobs else []
        start = len(self.text.rstrip("�"))
        self.logprobs.append((start, {**entry(token), "top_logprobs": [entry(rival) for rival in rivals]}))

    def hand_out(self, text: str, finish_reason: str | None) -> None:
        """Send what became certain of the answer's text.

        Held back: half a character (its other bytes are still to come) and anything that could become a stop sequence.
        """
        self.text, whole = text, finish_reason is not None
        for stop in self.request.stop:
            at = text.find(stop, max(0, self.sent - len(stop)))
            if at >= 0:
                text, finish_reason, whole = text[:at], "stop", False
        certain = len(text)
        if finish_reason is None:
            certain -= len(text) - len(text.rstrip("�"))
            held = (n for stop in self.request.stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
            certain = min(certain, len(text) - max(held, default=0))
        if certain > self.sent or finish_reason:
            logprobs = [entry for start, entry in self.logprobs if whole or start < certain]
            self.logprobs = self.logprobs[len(logprobs) :]
            self.generation.put(Piece(text[self.sent : certain], logprobs, finish_reason))
            self.sent = max(self.sent, certain)
        self.finished = finish_reason is not None


class Reading:
    """Prompts that are read side by side; shapes as in Batch, and ids and positions (rows, columns) of all tokens."""

    def __init__(self, rows: list[Row]):
        prompts = [torch.tensor(row.prompt) for row in rows]
        self.rows, self.done, self.cache = rows, 0, new_cache()
        self.ids = pad_sequence(prompts, batch_first=True, padding_side="left")
        self.attended = pad_sequence([torch.ones_like(ids) for ids in prompts], batch_first=True, padding_side="left")
        self.positions = (self.attended.cumsum(1) - 1).clamp(min=0)


class Batch:
    """The answers that one model writes together, and the keys and values it remembers for them.

    Shapes: attended (rows, columns), 1 where a column belongs to the row; a layer's keys and values (rows, heads,
    columns, width).
    Rows are aligned on the right: a shorter row has unattended columns on its left.
    """

    def __init__(self, model_id: str, model: Any, tokenizer: Any, weight_bytes: int):
        self.model_id, self.model, self.tokenizer = model_id, model, tokenizer
        self.weight_bytes = weight_bytes + getattr(model, "copied_bytes", 0)
        self.ends = end_of_turn_ids(tokenizer, model)
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or DEFAULT_CONTEXT
        self.size = model.config.get_text_config().vocab_size
        self.vocabulary: Any = None  # as llguidance knows it, once an answer in a form was asked for
        self.longest_token = max(len(token.encode()) for token in tokenizer.get_vocab())  # bytes
        self.new: list[Generation] = []
        self.readings: list[Reading] = []  # the one to read on is the first
        self.rows: list[Row] = []
        self.cache: Any = None
        self.attended: Any = None
        self.used = time.monotonic()

    def answers(self) -> list[Generation]:
        """Return what is unfinished here."""
        rows = [*self.rows, *(row for reading in self.readings for row in reading.rows)]
        return self.new + [row.generation for row in rows]

    def memory(self) -> int:
        """Return the bytes of the model's weights, and of the keys and values that its running answers remember."""
        caches = [reading.cache for reading in self.readings] + ([self.cache] if self.rows else [])
        layers = [layer for cache in caches for layer in cache.layers]
        return self.weight_bytes + sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    def add(self, generation: Generation) -> None:
        self.new.append(generation)

    def take_up(self) -> None:
        """Encode the prompts of new requests; those of like length are read side by side."""
        rows, size, taken = [], 0, 0
        while taken < len(self.new) and size < ENCODED_BYTES:
            generation = self.new[taken]
            taken += 1
            size += prompt_bytes(generation)
            try:
                rows.append(self.start(generation))
            except EngineError as error:
                generation.put(error)
        groups: list[list[Row]] = []
        for row in sorted(rows, key=lambda row: len(row.prompt)):
            length, group = len(row.prompt), groups[-1] if groups else []
            if not group or length > 2 * len(group[0].prompt) or length * (len(group) + 1) > TOGETHER_TOKENS:
                groups.append([])
            groups[-1].append(row)
        self.readings += map(Reading, groups)
        del self.new[:taken]

    def read(self) -> None:
        """Read a piece of the prompts whose turn it is; when they are read, they join the answers being written."""
        reading = self.readings.pop(0)
        if all(row.generation.cancelled for row in reading.rows):
            return
        start, width = reading.done, reading.ids.shape[1]
        reading.done = end = min(width, start + max(1, PIECE_TOKENS // len(reading.rows)))
        ids, positions = reading.ids[:, start:end], reading.positions[:, start:end]
        self.readings.append(reading)
        logits = self.forward(ids, reading.attended[:, :end], positions, reading.cache)
        if end == width:
            self.join(reading.rows, reading.cache, reading.attended)
            self.readings.remove(reading)
            self.advance(reading.rows, logits)

    def start(self, generation: Generation) -> Row:
        """Encode a request's prompt; EngineError if it cannot be answered."""
        request = generation.request
        size = prompt_bytes(generation)
        if size > self.context * self.longest_token:  # to encode it would take minutes
            raise self.too_long(f"have {size:,} bytes, which no {self.context} tokens hold")
        try:
            prompt = encode_prompt(self.tokenizer, request.messages)
        except EncodingError as error:
            raise EngineError(f"{error}".capitalize() + ".", "invalid_value") from None
        matcher = self.matcher(request.form) if request.form else None
        if any(token >= self.size for token in request.logit_bias):
            sentence = f"Invalid key in 'logit_bias': this model's tokens have the numbers 0 to {self.size - 1}."
            raise EngineError(sentence, "invalid_value", "logit_bias")
        generation.prompt_tokens = len(prompt)
        if len(prompt) >= self.context:
            raise self.too_long(f"resulted in {len(prompt)} tokens")
        room = self.context - len(prompt)
        return Row(generation, prompt, min(request.max_tokens or room, room), matcher)

    def too_long(self, what: str) -> EngineError:
        limit = f"This model's maximum context length is {self.context} tokens"
        return EngineError(f"{limit}. However, your messages {what}.", "context_length_exceeded")

    def matcher(self, form: str) -> Any:
        """Return what knows which tokens a form allows next, or raise an EngineError."""
        try:
            if self.vocabulary is None:  # it takes a second
                self.vocabulary = from_tokenizer(self.tokenizer, self.size, sorted(self.ends))
        except ValueError as error:
            sentence = f"This model's tokenizer cannot be used for JSON answers ({error})."
            raise EngineError(sentence, "invalid_value", "model") from None
        return LLMatcher(self.vocabulary, form)

    def step(self) -> None:
        """Read on in a prompt, and carry every answer one token further."""
        self.take_up()
        if self.readings:
            self.read()
        if self.rows:
            ids = torch.tensor([[row.ids[-1]] for row in self.rows])
            positions = self.attended.sum(1, keepdim=True)
            self.attended = torch.cat([self.attended, torch.ones_like(ids)], 1)
            self.advance(self.rows, self.forward(ids, self.attended, positions, self.cache))

    def forward(self, ids: Any, attended: Any, positions: Any, cache: Any) -> Any:
        """Return the logits of each row's next token: (rows, vocabulary), float32, on the CPU."""
        self.used = time.monotonic()
        with torch.inference_mode():
            return next_logits(self.model, ids, attended, positions, cache).float().cpu()

    def advance(self, rows: list[Row], logits: Any) -> None:
        """Draw the next token of each row, hand out the text that it completes and let finished rows go."""
        for row, scores in zip(rows, logits, strict=True):
            try:
                token = row.sampler.draw(scores)
            except EngineError as error:
                row.generation.put(error)
                row.finished = True
                continue
            row.generation.completion_tokens += 1
            ended = token in self.ends
            if not ended:
                row.ids.append(token)
                if row.request.logprobs:
                    row.note_logprobs(scores, token, self.spell)
            whole = ended or row.sampler.form_is_complete()
            reason = "stop" if whole else "length" if len(row.ids) >= row.limit else None
            row.hand_out(self.decode(row.ids), reason)
        self.drop_finished()

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def spell(self, token: int) -> tuple[str, bytes]:
        """Return a token's text and its bytes, which for a part of a character say more."""
        text = self.decode([token])
        if "\ufffd" not in text:
            return text, text.encode()
        name = self.tokenizer.convert_ids_to_tokens(token)
        if byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", name):  # SentencePiece
            return text, bytes.fromhex(byte[1])
        return text, bytes(BYTES[character] for character in name if character in BYTES)

    def join(self, rows: list[Row], cache: Any, attended: Any) -> None:
        """Put newly read rows beside the ones being written, aligned on the right."""
        if self.rows:
            width = max(attended.shape[1], self.attended.shape[1])
            old, new = width - self.attended.shape[1], width - attended.shape[1]
            attended = torch.cat([pad(self.attended, (old, 0)), pad(attended, (new, 0))])
            for mine, theirs in zip(self.cache.layers, cache.layers, strict=True):
                theirs.keys = torch.cat([pad(mine.keys, (0, 0, old, 0)), pad(theirs.keys, (0, 0, new, 0))])
                theirs.values = torch.cat([pad(mine.values, (0, 0, old, 0)), pad(theirs.values, (0, 0, new, 0))])
        self.rows, self.cache, self.attended = self.rows + rows, cache, attended

    def drop_finished(self) -> None:
        """Drop every row that is finished or not wanted any more, and the columns that no remaining row needs."""
        places = [i for i, row in enumerate(self.rows) if not (row.finished or row.generation.cancelled)]
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
            layer.keys, layer.values = layer.keys[places, :, first:], layer.values[places, :, first:]
