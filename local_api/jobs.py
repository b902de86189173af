"""/v1/fine_tuning/jobs: create, list, retrieve, cancel, pause, resume, events, checkpoints.

A handler here only writes the job down or changes its status; local_api/worker.py does the work.
"""

import os
import random
import re
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Query, Request
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint
from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from local_api.errors import APIError
from local_api.job_files import flush_directory
from local_api.models import find_model
from local_api.shapes import MAX_PAIRS, Metadata, Page, Parameters, Router, page
from local_api.store import CHECKPOINT, EVENT, FILE, JOB, MODEL, Document, Store, StoreOfRequest, new_id, now, public

MAX_WAITING_JOBS = 100
UNFINISHED = ("validating_files", "queued", "running", "paused")

router = Router(prefix="/v1/fine_tuning/jobs", tags=["Fine-tuning"])


# What a client may send


def in_words(expected: str) -> WrapValidator:
    """Say in one sentence what a type expects of whose alternatives each would have a complaint of its own."""

    def check(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(value)
        except ValidationError:
            raise ValueError(f"expected {expected}") from None

    return WrapValidator(check)


Auto = Literal["auto"]
Epochs = Auto | Annotated[int, Field(ge=1, le=50)]
BatchSize = Auto | Annotated[int, Field(ge=1, le=256)]
Multiplier = Auto | Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Hyperparameters(Parameters):
    n_epochs: Annotated[Epochs, in_words('"auto" or an integer from 1 to 50')] = "auto"
    batch_size: Annotated[BatchSize, in_words('"auto" or an integer from 1 to 256')] = "auto"
    learning_rate_multiplier: Annotated[Multiplier, in_words('"auto" or a number above 0')] = "auto"


class Supervised(Parameters):
    hyperparameters: Hyperparameters = Hyperparameters()


class Method(Parameters):
    type: Literal["supervised"]
    supervised: Supervised = Supervised()


class JobRequest(Parameters):
    model: str
    training_file: str
    validation_file: str | None = None
    hyperparameters: Hyperparameters | None = None  # the API's older place for method.supervised.hyperparameters
    method: Method | None = None
    suffix: Annotated[str | None, Field(min_length=1, max_length=64)] = None
    seed: Annotated[int | None, Field(ge=0, le=2147483647)] = None
    metadata: Metadata = None
    integrations: list[Any] | None = None
    trainingType: str | None = None  # Azure's choice of a price: all that is trained here is free


# What the API answers


class Job(FineTuningJob):
    # The API's document shows `paused` in its example of a paused job and leaves it out of the enum.
    status: Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled", "paused"]  # type: ignore[assignment]


PageSize = Annotated[int, Query(ge=1, le=1000)]


def find_job(store: Store, job_id: str) -> Document:
    document = store.get(JOB, job_id)
    if document is None:
        raise APIError(404, f"Could not find fine tune: {job_id}", param="fine_tune_id", code="fine_tune_not_found")
    return document


def add_event(store: Store, job_id: str, message: str, *, level: str = "info", type: str = "message",
              data: Document | None = None, created_at: int | None = None, id: str | None = None) -> bool:  # fmt: skip
    """Add an event to a job; one whose id is there already is not added again. Return whether it was added."""
    document = {"object": EVENT, "id": id or new_id("ftevent-"), "created_at": created_at or now(), "level": level,
                "message": message, "type": type, "data": data or {}}  # fmt: skip
    return store.add_once(document, job_id)


def usable_file(store: Store, file_id: str, param: str) -> Document:
    document = store.get(FILE, file_id)
    if document is None:
        raise APIError(400, f"invalid {param}: {file_id}", param=param)
    if document["purpose"] != "fine-tune":
        raise APIError(400, f"File '{file_id}' has the purpose '{document['purpose']}', expected 'fine-tune'.",
                       param=param, code="invalid_file_purpose")  # fmt: skip
    return document


def link_or_copy(source: Any, target: Any) -> None:
    """Give the job its own name for these bytes (they are never changed), so that a deleted file stays with it."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def fill(directory: Path, store: Store, files: dict[str, Document], parent: Document) -> None:
    """Make a job's directory, with names of its own for its files and the adapter it starts from, safe on disk."""
    directory.mkdir()
    try:
        for name, file in files.items():
            link_or_copy(store.file_path(file["id"]), directory / f"{name}.jsonl")
        if "_adapter" in parent:
            shutil.copytree(store.data_dir / parent["_adapter"], directory / "parent", copy_function=link_or_copy)
            flush_directory(directory / "parent")
    except (FileNotFoundError, shutil.Error):
        there = [store.get(FILE, file["id"]) for file in files.values()] + [store.get(MODEL, parent["id"])]
        if all(there):  # something else is in the way
            raise
        raise APIError(404, "A file or the model of this job was deleted while the job was made.") from None
    flush_directory(directory)
    flush_directory(directory.parent)


@router.post("", response_model=Job)
def create_job(request: Request, store: StoreOfRequest, job: JobRequest) -> Document:
    if job.integrations:
        raise APIError(400, "Integrations are not supported by this server.", param="integrations",
                       code="unsupported_parameter")  # fmt: skip
    if len(store.find(JOB, "json_extract(document, '$.status') IN (?, ?, ?, ?)", UNFINISHED)) >= MAX_WAITING_JOBS:
        raise APIError(429, f"{MAX_WAITING_JOBS} jobs are waiting already; wait until one has finished.",
                       code="rate_limit_exceeded")  # fmt: skip
    parent = find_model(request.app.state.models, job.model)
    files = {"training": usable_file(store, job.training_file, "training_file")}
    if job.validation_file:
        files["validation"] = usable_file(store, job.validation_file, "validation_file")
    supervised = job.method.supervised if job.method else Supervised()
    are_in_method = "hyperparameters" in supervised.model_fields_set
    if are_in_method and job.hyperparameters and job.hyperparameters != supervised.hyperparameters:
        raise APIError(400, "'hyperparameters' and 'method.supervised.hyperparameters' differ; send only the latter.",
                       param="hyperparameters")  # fmt: skip
    hyperparameters = (job.hyperparameters or supervised.hyperparameters).model_dump()

    job_id = new_id("ftjob-")
    document = {
        "id": job_id,
        "object": JOB,
        "created_at": now(),
        "finished_at": None,
        "model": job.model,
        "fine_tuned_model": None,
        "organization_id": "org-local",
        "status": "validating_files",
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "result_files": [],
        "trained_tokens": None,
        "error": None,
        "seed": random.randrange(2**31) if job.seed is None else job.seed,
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "estimated_finish": None,
        "integrations": [],
        "metadata": job.metadata,
        "user_provided_suffix": job.suffix,
        "_base": parent.get("_base", job.model),
        "_suffix": re.sub(r"[^a-z0-9._]+", "-", (job.suffix or "").lower()).strip("-."),  # it becomes part of an id
    }
    directory = store.job_dir(job_id)
    try:
        fill(directory, store, files, parent)
        with store.transaction():
            store.add(document)
            add_event(store, job_id, f"Created fine-tuning job: {job_id}")
            add_event(store, job_id, f"Validating training file: {job.training_file}" +
                      (f" and validation file: {job.validation_file}" if job.validation_file else ""))  # fmt: skip
    except Exception:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    request.app.state.worker.wake()
    return public(document)


@router.get("", response_model=Page[Job])
def list_jobs(request: Request, store: StoreOfRequest, after: str | None = None, limit: PageSize = 20) -> Document:
    where, parameters = metadata_filter(request)
    return page(*store.page(JOB, after=after, limit=limit, where=where, parameters=parameters))


def metadata_filter(request: Request) -> tuple[str, tuple[str, ...]]:
    """Turn `metadata[k]=v` (several must all hold) or `metadata=null` of the query into a condition for Store.page."""
    sent = request.query_params.multi_items()
    pairs = [(name[len("metadata[") : -1], value) for name, value in sent if name.startswith("metadata[")]
    if len(pairs) > MAX_PAIRS:
        raise APIError(400, f"At most {MAX_PAIRS} pairs of 'metadata' are allowed.", param="metadata",
                       code="invalid_value")  # fmt: skip
    conditions = ["EXISTS (SELECT 1 FROM json_each(document, '$.metadata') WHERE key = ? AND value = ?)"] * len(pairs)
    if plain := [value for name, value in sent if name == "metadata"]:
        if set(plain) != {"null"}:
            raise APIError(400, "Invalid value for 'metadata': use metadata[key]=value, or metadata=null.",
                           param="metadata", code="invalid_value")  # fmt: skip
        conditions.append("json_type(document, '$.metadata') = 'null'")
    return " AND ".join(conditions) or "1", tuple(text for pair in pairs for text in pair)


@router.get("/{job_id}", response_model=Job)
def retrieve_job(store: StoreOfRequest, job_id: str) -> Document:
    return public(find_job(store, job_id))


# What a client may do with a job: from which statuses, to which, and how the event calls it.
ACTIONS = {
    "cancel": (UNFINISHED, "cancelled", "cancelled"),
    "pause": (("queued", "running"), "paused", "paused"),
    "resume": (("paused",), "queued", "resumed"),
}


@router.post("/{job_id}/cancel", response_model=Job)
@router.post("/{job_id}/pause", response_model=Job)
@router.post("/{job_id}/resume", response_model=Job)
def change_status(request: Request, store: StoreOfRequest, job_id: str) -> Document:
    """Give the job the action's status if it has one that allows it (else the API's 400); the worker follows it."""
    action = request.url.path.rpartition("/")[2]
    allowed, status, called = ACTIONS[action]
    with store.transaction():
        job = find_job(store, job_id)
        if job["status"] not in allowed:
            raise APIError(400, f"Cannot {action} job {job_id}: its status is '{job['status']}'.",
                           code="invalid_status")  # fmt: skip
        add_event(store, job_id, f"Fine-tuning job was {called} by the user")
        finished_at = now() if status == "cancelled" else None
        job = store.update(JOB, job_id, status=status, estimated_finish=None, finished_at=finished_at)
    request.app.state.worker.wake()
    return public(job)


@router.get("/{job_id}/events", response_model=Page[FineTuningJobEvent])
def list_events(store: StoreOfRequest, job_id: str, after: str | None = None, limit: PageSize = 20) -> Document:
    find_job(store, job_id)
    return page(*store.page(EVENT, after=after, limit=limit, where="parent_id = ?", parameters=(job_id,)))


@router.get("/{job_id}/checkpoints", response_model=Page[FineTuningJobCheckpoint])
def list_checkpoints(store: StoreOfRequest, job_id: str, after: str | None = None, limit: PageSize = 10) -> Document:
    find_job(store, job_id)
    return page(*store.page(CHECKPOINT, after=after, limit=limit, where="parent_id = ?", parameters=(job_id,)))
