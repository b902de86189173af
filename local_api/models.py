"""/v1/models: the base models this server was started with, and the models that were fine-tuned from them.

`Models` is the registry: it knows which weights and which adapter stand behind a model id.
"""

import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from fastapi import Request
from openai.types import Model, ModelDeleted

from local_api import base_models
from local_api.base_models import ModelUnavailable
from local_api.errors import APIError, model_not_found
from local_api.shapes import Page, Router, page
from local_api.store import CHECKPOINT, MODEL, Document, Store, now, public

router = Router(prefix="/v1/models", tags=["Models"])


class Models:
    """Which model ids exist and what stands behind each. A model's document has these fields of the server's own:

    _source: for a base model, the name or path to prepare its weights from; `root` is what it is called there, which
        the model's id need not be (an alias)
    _base, _adapter: for a fine-tuned model, its base model's id and its adapter's path below the data directory
    """

    def __init__(self, store: Store, sources: Sequence[str], cache_dir: Path, progress: Callable[[str], None]):
        self.store, self.cache_dir, self.progress = store, cache_dir, progress
        self._prepared: dict[str, Path] = {}
        self._preparing = threading.Lock()
        self.base_ids: list[str] = []
        for model_id, source in map(base_models.named, sources):
            if model_id in self.base_ids:
                raise ModelUnavailable(f"Two base models have the name {model_id}: give one of them another.")
            if Path(source).is_dir():  # a later start may stand in another folder
                source = str(Path(source).resolve())
            self.base_ids.append(model_id)
            root = base_models.model_id(source)
            if known := store.get(MODEL, model_id):
                was = base_models.model_id(known["_source"])
                if was != root and any(one.get("_base") == model_id for one in store.find(MODEL)):
                    sentence = f"{model_id} was {was} when models were trained on it"
                    raise ModelUnavailable(f"{sentence}: keep that, or give {root} another name.")
                store.update(MODEL, model_id, _source=source, root=root)
            else:
                store.add({"id": model_id, "object": MODEL, "created": now(), "owned_by": "local", "root": root,
                           "_source": source})  # fmt: skip

    def all(self) -> list[Document]:
        return [document for document in self.store.find(MODEL) if self._is_served(document)]

    def find(self, model_id: str) -> Document:
        """Return the model's document; KeyError if this server does not serve it."""
        document = self.store.get(MODEL, model_id)
        if document is None or not self._is_served(document):
            raise KeyError(model_id)
        return document

    def _is_served(self, document: Document) -> bool:
        # A fine-tuned model outlives a restart without its base among --base-model: the base's source is on record.
        return "_base" in document or document["id"] in self.base_ids

    def root_of(self, base_id: str) -> str:
        """Return the name that a base model has outside this server, where its id may be an alias."""
        document = self.store.get(MODEL, base_id)
        return base_models.model_id(document["_source"]) if document else base_id

    def weights(self, base_id: str) -> Path:
        """Return the directory of a base model's weights, fetching and converting them if they are not there yet.

        Blocks for as long as that takes; raises base_models.ModelUnavailable with a sentence if it cannot be done.
        """
        document = self.store.get(MODEL, base_id)
        if document is None:
            raise KeyError(base_id)
        source = document["_source"]
        with self._preparing:
            if source not in self._prepared or not self._prepared[source].exists():
                self._prepared[source] = base_models.prepare(source, self.cache_dir, self.progress)
            return self._prepared[source]

    def locate(self, model_id: str) -> tuple[Path, Path | None]:
        """Return the directories of the base weights and of the adapter (None for a base model) of a model id."""
        document = self.find(model_id)
        adapter = self.store.data_dir / document["_adapter"] if "_adapter" in document else None
        return self.weights(document.get("_base", model_id)), adapter


def find_model(models: Models, model_id: str) -> Document:
    try:
        return models.find(model_id)
    except KeyError:
        raise model_not_found(model_id) from None


@router.get("", response_model=Page[Model])
def list_models(request: Request) -> Document:
    return page([public(document) for document in request.app.state.models.all()])


# A hub id has a slash in it, so the id is the rest of the path.
@router.get("/{model:path}", response_model=Model)
def retrieve_model(request: Request, model: str) -> Document:
    return public(find_model(request.app.state.models, model))


@router.delete("/{model:path}", response_model=ModelDeleted)
def delete_model(request: Request, model: str) -> Document:
    """Delete a fine-tuned model with its checkpoints, or one checkpoint; base models stay."""
    store: Store = request.app.state.store
    document = find_model(request.app.state.models, model)
    if "_base" not in document:
        raise APIError(403, f"{model} is a base model and cannot be deleted.", param="model")
    with store.transaction():
        gone = [document, *(one for one in store.find(MODEL) if one["id"].startswith(f"{model}:ckpt-step-"))]
        names = {one["id"] for one in gone}
        checkpoints = [one for one in store.find(CHECKPOINT) if one["fine_tuned_model_checkpoint"] in names]
        for one in gone + checkpoints:
            store.delete(one["object"], one["id"])
    for one in gone:
        shutil.rmtree(store.data_dir / one["_adapter"], ignore_errors=True)
    return {"id": model, "object": MODEL, "deleted": True}
