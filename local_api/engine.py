"""Answering: one thread lets all requests that wait for the same model go through it together (continuous batching).

Most of the time of a small model goes into reading its weights from memory; a step that carries eight answers one token
further reads them once instead of eight times. Requests join between two steps and leave when they are done, so a long
answer holds nobody up.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable
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
        self.changed = threading.Condition()
        self.closed = False
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.thread.start()

    def submit(self, request: GenerationRequest) -> Generation:
        """Queue a request; KeyError if its model is unknown."""
        generation = Generation(request)
        self.submit_together([generation])
        return generation

    def submit_together(self, generations: list[Generation]) -> None:
        """Queue answers that join the running ones at the same moment, so that a seed finds the same company."""
        for generation in generations:
            self.locate(generation.request.model)
        with self.changed:
            if self.closed:
                raise EngineError("The server is shutting down.", "server_shutting_down")
            self.waiting += generations
            self.changed.notify()

    def writing(self) -> list[Generation]:
        return [generation for batch in list(self.batches.values()) for generation in batch.answers()]

    def close(self) -> None:
        """End all unfinished answers with an EngineError, and the thread after its current step."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.end_answers()
        self.thread.join(CLOSE_SECONDS)  # a model that is being loaded does not hold up the server's end

    def end_answers(self) -> None:
        for generation in [*self.waiting, *self.writing()]:
            generation.put(EngineError("The server is shutting down.", "server_shutting_down"))

    # --- the engine's thread ---

    def run(self) -> None:
        """Add a token to every running answer, again and again, until the engine is closed."""
        try:
            if self.has_work():  # PyTorch takes seconds to import, so the first request does it
                from .inference import use_cores
            while self.has_work():
                use_cores(half=self.is_training())
                self.admit()
                for model_id in list(self.batches):
                    if not self.closed:
                        self.step(self.batches[model_id])  # no name for it: a model that is dropped is to be gone
        finally:
            with self.changed:
                self.closed = True
            self.end_answers()

    def has_work(self) -> bool:
        """Wait until there is something to do; False when the engine is closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.closed or self.writing())
            return not self.closed

    def admit(self) -> None:
        """Take from the queue, first come first served, what finds room beside the answers being written.

        What needs a model that finds no room in memory waits, and all behind it too, until running answers are done.
        """
        refused: dict[str, EngineError] = {}  # models
        for generation in list(self.waiting):
            model_id = generation.request.model
            if generation.cancelled:
                pass
            elif error := refused.get(model_id) or self.load(model_id):
                refused[model_id] = error
                generation.put(error)
            elif model_id not in self.batches:
                break
            elif len(self.batches[model_id].answers()) < MAX_ROWS:
                self.batches[model_id].add(generation)
            else:
                continue
            with self.changed:
                self.waiting.remove(generation)

    def load(self, model_id: str) -> EngineError | None:
        """Load a model if it is not in memory, and has room there; return what there is against it."""
        try:
            if model_id not in self.batches:
                self.load_batch(model_id)
        except base_models.ModelUnavailable as error:
            return EngineError(str(error), "model_not_available")
        except Exception:  # the models' register cannot be read, for instance
            traceback.print_exc(file=sys.stderr)
            return EngineError("The model cannot be loaded.")
        return None

    def load_batch(self, model_id: str) -> None:
        """Drop idle models, the one unused for longest first, until this one fits, and load it; else it has to wait."""
        from . import inference
        from .batch import Batch

        try:
            base, adapter = self.locate(model_id)
        except KeyError:
            raise base_models.ModelUnavailable(f"The model {model_id} was deleted.") from None
        needed, limit = base_models.weight_bytes(base), self.max_memory or base_models.default_memory()
        if needed > limit:
            sentence = f"{model_id} needs {needed / 1e6:,.0f} MB of memory, and models have {limit / 1e6:,.0f} MB"
            raise base_models.ModelUnavailable(f"{sentence} (--max-memory).")
        idle = sorted((b for b in self.batches.values() if not b.answers()), key=lambda b: b.used, reverse=True)
        while needed + sum(batch.memory() for batch in self.batches.values()) > limit:
            if not idle:
                return
            del self.batches[idle.pop().model_id]
        self.batches[model_id] = Batch(model_id, *inference.load(base, adapter), needed)

    def step(self, batch: Batch) -> None:
        """Carry a model's answers a token further; a fault ends them, never the thread."""
        try:
            batch.step()
        except Exception:
            traceback.print_exc(file=sys.stderr)
            del self.batches[batch.model_id]
            for generation in batch.answers():
                generation.put(EngineError("The model failed while answering."))
