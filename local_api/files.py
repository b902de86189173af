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
from local_api.shapes import Page, Parameters, Router, page
from local_api.store import FILE, Document, Store, StoreOfRequest, new_id, now

MAX_FILE_BYTES = 512 * 1024 * 1024  # the API's limit; here it is that of the whole request
MAX_LINE_BYTES = 16 * 1024 * 1024

router = Router(prefix="/v1/files", tags=["Files"])


class FileRequest(Parameters):
    file: UploadFile
    purpose: Literal["assistants", "batch", "fine-tune", "vision", "user_data"]


@router.post("", response_model=FileObject)
def create_file(
    store: StoreOfRequest, asked: Annotated[FileRequest, Form(media_type="multipart/form-data")]
) -> Document:
    """Keep an uploaded file. One for fine-tuning that is not JSONL is refused here, with the line."""
    if asked.purpose == "fine-tune":
        check_jsonl(asked.file.file)
    return add_file(store, asked.file.file, asked.file.filename or "upload", asked.purpose)


def add_file(store: Store, content: IO[bytes], filename: str, purpose: str, file_id: str | None = None) -> Document:
    """Copy `content` into the store and return its document, as it is recorded."""
    file_id = file_id or new_id("file-")
    path = store.file_path(file_id)
    content.seek(0)
    with store.writing(path) as copy:
        shutil.copyfileobj(content, copy, 1024 * 1024)
        size = copy.tell()
    try:
        return store.add({
            "id": file_id,
            "object": FILE,
            "bytes": size,
            "created_at": now(),
            "filename": Path(filename.replace("\\", "/")).name,
            "purpose": purpose,
            "status": "processed",
        })  # fmt: skip
    except Exception:
        path.unlink(missing_ok=True)
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


class File(FileObject):
    purpose: str  # type: ignore[assignment]  # an older version took others, too


@router.get("", response_model=Page[File])
def list_files(
    store: StoreOfRequest,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10000)] = 10000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> Document:
    where, parameters = ("json_extract(document, '$.purpose') = ?", (purpose,)) if purpose else ("1", ())
    return page(*store.page(FILE, after=after, limit=limit, order=order, where=where, parameters=parameters))


def find_file(store: Store, file_id: str) -> Document:
    """Return the file's document, or raise the API's 404."""
    document = store.get(FILE, file_id)
    if document is None:
        raise APIError(404, f"No such File object: {file_id}", param="id")
    return document


@router.get("/{file_id}", response_model=File)
def retrieve_file(store: StoreOfRequest, file_id: str) -> Document:
    return find_file(store, file_id)


@router.get("/{file_id}/content", response_class=FileResponse)
def retrieve_file_content(store: StoreOfRequest, file_id: str) -> FileResponse:
    document = find_file(store, file_id)
    # An attachment of unknown type: whatever the file holds, no browser shows it as a page.
    return FileResponse(store.file_path(document["id"]), media_type="application/octet-stream",
                        filename=document["filename"])  # fmt: skip


@router.delete("/{file_id}", response_model=FileDeleted)
def delete_file(store: StoreOfRequest, file_id: str) -> Document:
    find_file(store, file_id)
    store.delete(FILE, file_id)
    store.file_path(file_id).unlink(missing_ok=True)  # a job that uses it has its own copy
    return {"id": file_id, "object": FILE, "deleted": True}
