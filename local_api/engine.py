"""Answering: one thread lets all requests that wait for the same model go through it together (continuous batching).

Most of the time of a small model goes into reading its weights from memory; a step that carries eight answers one token
further reads them once instead of eight times. Requests join between two steps and leave when they are done, so a long
answer holds nobody up.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from . import base_models
from .generation import EngineError, Generation, GenerationRequest

if TYPE_CHECKING:  # it imports PyTorch, which the engine's thread does when the first request is there
    from .batch import Batch

CLOSE_SECONDS = 2.0  # what the current step gets when the engine is closed
MAX_ROWS = 16  # answers that one model writes at the same time; more wait


class Engine:
    """Answers requests for any model that `locate(model_id) -> (base model directory, adapter directory or None)` has.

    `locate` raises KeyError for an unknown model. max_memory: bytes that loaded models may take together, their weights
    and what their running answers remember; None for half of the machine's (of a GPU's: 80 percent).
    is_training: whether to leave half of the processor to a job.
    """

    def __init__(
        self,
        locate: Callable[[str], tuple[Path, Path | None]],
        max_memory: int | None = None,
        is_training: Callable[[], bool] = lambda: False,
    ):
        self.locate = locate
        self.max_memory = max_memory
        self.is_training = is_training
        self.waiting: list[Generation] = []
        self.batches: dict[str, Batch] = {}
        self.forgotten: set[str] = set()
        self.admitted: dict[str, list[Generation]] = {}  # from waiting, on their way into a batch
        self.changed = threading.Condition()
        self.closed = False
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.thread.start()

    def submit(self, request: GenerationRequest) -> Generation:
        """Queue a request; KeyError if its model is unknown."""
        return self.submit_together([request])[0]

    def submit_together(self, requests: list[GenerationRequest]) -> list[Generation]:
        """Queue requests that join the running answers at the same moment, so that a seed finds the same company."""
        for request in requests:
            self.locate(request.model)
        generations = [Generation(request) for request in requests]
        with self.changed:
            if self.closed:
                raise EngineError("The server is shutting down.", "server_shutting_down")
            self.waiting += generations
            self.changed.notify()
        return generations

    def writing(self) -> list[Generation]:
        return [generation for batch in list(self.batches.values()) for generation in batch.answers()]

    def forget(self, model_id: str) -> None:
        """Drop a deleted model from memory once its running answers are done."""
        with self.changed:
            self.forgotten.add(model_id)
            self.changed.notify()

    def close(self) -> None:
        """End all unfinished answers with an EngineError, and the thread after its current step."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.end_answers()
        self.thread.join(CLOSE_SECONDS)  # a model that is being loaded does not hold up the server's end

    def end_answers(self) -> None:
        admitted = [generation for generations in self.admitted.values() for generation in generations]
        self.abandon(
            [*self.waiting, *admitted, *self.writing()], "The server is shutting down.", "server_shutting_down"
        )

    # --- the engine's thread ---

    def run(self) -> None:
        try:
            self.work()
        finally:
            with self.changed:
                self.closed = True
            self.end_answers()

    def work(self) -> None:
        """Add a token to every running answer, again and again, until the engine is closed."""
        from .batch import Batch  # and with it PyTorch, which takes seconds, before a lock is held
        from .inference import use_cores

        while True:
            with self.changed:
                while not (self.waiting or self.closed or self.forgotten or self.writing()):
                    self.changed.wait()
                if self.closed:
                    return
                try:
                    self.admitted = self.admit()
                except Exception:  # the models' register cannot be read, for instance
                    traceback.print_exc(file=sys.stderr)
                    self.abandon(self.waiting, "The model cannot be looked up.")
                    self.waiting, self.admitted = [], {}
            use_cores(half=self.is_training())
            for model_id, generations in self.admitted.items():
                self.attempt(model_id, partial(Batch.add, generations=generations), generations)
            self.admitted = {}
            for model_id in list(self.batches):
                if self.closed:
                    return
                self.attempt(model_id, Batch.step, [])

    def admit(self) -> dict[str, list[Generation]]:
        """Take from the queue, first come first served, what finds room beside the answers being written.

        What needs a model that finds no room in memory waits, and all behind it too, until running answers are done.
        """
        self.drop_forgotten()
        admitted: dict[str, list[Generation]] = {}
        left = []
        for place, generation in enumerate(self.waiting):
            model_id = generation.request.model
            writing = len(self.batches[model_id].answers()) if model_id in self.batches else 0
            if generation.cancelled:
                continue
            if model_id not in self.batches and model_id not in admitted and not self.make_room(model_id, admitted):
                left += self.waiting[place:]
                break
            if writing + len(admitted.get(model_id, [])) < MAX_ROWS:
                admitted.setdefault(model_id, []).append(generation)
            else:
                left.append(generation)
        self.waiting = left
        return admitted

    def attempt(self, model_id: str, action: Callable[[Batch], None], generations: list[Generation]) -> None:
        """Do one thing with a model's batch; a fault ends its answers, never the thread."""
        try:
            action(self.batch(model_id))
        except base_models.ModelUnavailable as error:
            self.abandon(generations, str(error), "model_not_available")
        except Exception:
            traceback.print_exc(file=sys.stderr)
            batch = self.batches.pop(model_id, None)
            lost = generations + (batch.answers() if batch else [])
            self.abandon(lost, "The model failed while answering.")

    def abandon(self, generations: list[Generation], message: str, code: str = "server_error") -> None:
        for generation in generations:
            generation.pieces.put(EngineError(message, code))

    def batch(self, model_id: str) -> Batch:
        """Return a model's batch, loading the model first if it is not in memory."""
        if model_id not in self.batches:
            from . import inference
            from .batch import Batch

            needed, limit = self.weight_bytes(model_id), self.limit()
            if needed > limit:
                sentence = f"{model_id} needs {in_words(needed)} of memory, and models have {in_words(limit)}"
                raise base_models.ModelUnavailable(f"{sentence} (--max-memory).")
            self.batches[model_id] = Batch(model_id, *inference.load(*self.find(model_id)), needed)
        return self.batches[model_id]

    def make_room(self, model_id: str, admitted: Collection[str]) -> bool:
        """Drop idle models, the one unused for longest first, until this one fits; False if it has to wait."""
        try:
            needed = self.weight_bytes(model_id)
            coming = sum(self.weight_bytes(one) for one in admitted if one not in self.batches)
        except base_models.ModelUnavailable:
            return True  # nothing will be loaded: `batch` says why
        if needed > self.limit():
            return True  # the same
        idle = [b for b in self.batches.values() if not b.answers() and b.model_id not in admitted]
        idle.sort(key=lambda batch: batch.used, reverse=True)
        while coming + needed + sum(batch.memory() for batch in self.batches.values()) > self.limit():
            if not idle:
                return False
            del self.batches[idle.pop().model_id]
        return True

    def limit(self) -> int:
        if self.max_memory is None:
            self.max_memory = base_models.default_memory()
        return self.max_memory

    def weight_bytes(self, model_id: str) -> int:
        return base_models.weight_bytes(self.find(model_id)[0])

    def find(self, model_id: str) -> tuple[Path, Path | None]:
        try:
            return self.locate(model_id)
        except KeyError:
            raise base_models.ModelUnavailable(f"The model {model_id} was deleted.") from None

    def drop_forgotten(self) -> None:
        for model_id in list(self.forgotten):
            if model_id not in self.batches or not self.batches[model_id].answers():
                self.batches.pop(model_id, None)
                self.forgotten.discard(model_id)


def in_words(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
