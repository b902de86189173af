"""/v1/files: upload, list, retrieve, content, delete."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Literal

from fastapi import Form, Query, UploadFile
from fastapi.responses import FileResponse
from openai.types import FileDeleted, FileObject

from local_api.errors import APIError
from local_api.shapes import Page, Router, page
from local_api.store import FILE, Document, Store, StoreOfRequest, new_id, now, public

MAX_FILE_BYTES = 512 * 1024 * 1024  # the API's limit; here it is that of the whole request
MAX_LINE_BYTES = 16 * 1024 * 1024
Purpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]

router = Router(prefix="/v1/files", tags=["Files"])


class File(FileObject):
    # The API takes the purpose `evals` and leaves it out of the list of those that it answers with.
    purpose: Literal[Purpose, "assistants_output", "batch_output", "fine-tune-results"]  # type: ignore[assignment]


@router.post("", response_model=File)
def create_file(
    store: StoreOfRequest,
    file: UploadFile,
    purpose: Annotated[Purpose, Form()],
    anchor: Annotated[Literal["created_at"] | None, Form(alias="expires_after[anchor]")] = None,
    seconds: Annotated[int | None, Form(alias="expires_after[seconds]", ge=3600, le=2592000)] = None,
) -> Document:
    """Keep an uploaded file. One for fine-tuning that is not JSONL is refused here, with the line."""
    if (anchor is None) != (seconds is None):
        missing = f"expires_after[{'anchor' if anchor is None else 'seconds'}]"
        raise APIError(400, f"Missing required parameter: '{missing}'.", param=missing,
                       code="missing_required_parameter")  # fmt: skip
    if purpose == "fine-tune":
        check_jsonl(file.file)
    if seconds is None and purpose == "batch":
        seconds = 30 * 24 * 3600  # the API's default for batch files; all others stay until they are deleted
    return public(add_file(store, file.file, new_file(file.filename or "upload", purpose, seconds)))


def new_file(filename: str, purpose: str, expires_after: int | None = None, id: str | None = None) -> Document:
    """Return the document of a file that is still to be written."""
    document: Document = {
        "id": id or new_id("file-"),
        "object": FILE,
        "bytes": 0,
        "created_at": now(),
        "filename": Path(filename.replace("\\", "/")).name,
        "purpose": purpose,
        "status": "processed",
    }
    if expires_after:
        document["expires_at"] = document["created_at"] + expires_after
    return document


def add_file(store: Store, content: IO[bytes], document: Document) -> Document:
    """Copy `content` into the store and return its document, as it is recorded."""
    content.seek(0)
    with store.writing(store.file_path(document["id"])) as copy:
        shutil.copyfileobj(content, copy, 1024 * 1024)
        document["bytes"] = copy.tell()
    try:
        return store.add(document)
    except Exception:
        store.file_path(document["id"]).unlink(missing_ok=True)
        raise


def check_jsonl(content: IO[bytes]) -> None:
    """Refuse what is not one JSON object a line; what the objects must hold is judged when a job uses the file."""
    content.seek(0)
    lines = 0
    for number, line in enumerate(iter(partial(content.readline, MAX_LINE_BYTES + 1), b""), 1):
        if len(line) > MAX_LINE_BYTES:
            message = f"Line {number} of the file is longer than {MAX_LINE_BYTES // 2**20} MB."
            raise APIError(400, message, param="file")
        text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not text.strip():
            continue
        lines += 1
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, dict):
            start = text[:40].decode("utf-8", "replace").strip()
            raise APIError(400, "Expected file to have JSONL format, where every line is a JSON dictionary. "
                                f'Line {number} is not a dictionary (HINT: line starts with: "{start}...").',
                           param="file")  # fmt: skip
    if not lines:
        raise APIError(400, "The file is empty: expected JSONL, one JSON dictionary a line.", param="file")


@router.get("", response_model=Page[File])
def list_files(
    store: StoreOfRequest,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10000)] = 10000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> Document:
    remove_expired(store)
    where, parameters = ("json_extract(document, '$.purpose') = ?", (purpose,)) if purpose else ("1", ())
    return page(*store.page(FILE, after=after, limit=limit, order=order, where=where, parameters=parameters))


def find_file(store: Store, file_id: str) -> Document:
    """Return the file's document, or raise the API's 404."""
    document = store.get(FILE, file_id)
    if document and document.get("expires_at", now() + 1) <= now():
        remove_file(store, file_id)
        document = None
    if document is None:
        raise APIError(404, f"No such File object: {file_id}", param="id")
    return document


def remove_file(store: Store, file_id: str) -> None:
    store.delete(FILE, file_id)
    store.file_path(file_id).unlink(missing_ok=True)


def remove_expired(store: Store) -> None:
    for document in store.find(FILE, "json_extract(document, '$.expires_at') <= ?", (now(),)):
        remove_file(store, document["id"])


@router.get("/{file_id}", response_model=File)
def retrieve_file(store: StoreOfRequest, file_id: str) -> Document:
    return public(find_file(store, file_id))


@router.get("/{file_id}/content", response_class=FileResponse)
def retrieve_file_content(store: StoreOfRequest, file_id: str) -> FileResponse:
    document = find_file(store, file_id)
    # An attachment of unknown type: whatever the file holds, no browser shows it as a page.
    return FileResponse(store.file_path(document["id"]), media_type="application/octet-stream",
                        filename=document["filename"])  # fmt: skip


@router.delete("/{file_id}", response_model=FileDeleted)
def delete_file(store: StoreOfRequest, file_id: str) -> Document:
    remove_file(store, find_file(store, file_id)["id"])  # a job that uses it has its own copy
    return {"id": file_id, "object": FILE, "deleted": True}
