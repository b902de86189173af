"""/v1/uploads: a large file in parts, up to 8 GB, which becomes a file when it is complete."""

import contextlib
import hashlib
import shutil
from typing import IO, Annotated, Literal

from fastapi import UploadFile
from openai.types import Upload
from openai.types.uploads import UploadPart
from pydantic import Field

from local_api.errors import APIError, not_found
from local_api.files import File, Purpose, check_jsonl, new_file
from local_api.shapes import Parameters, Router
from local_api.store import PART, UPLOAD, Document, Store, StoreOfRequest, new_id, now, public

MAX_UPLOAD_BYTES = 8 * 1024**3  # the API's limits
MAX_PART_BYTES = 64 * 1024**2
LIFETIME_SECONDS = 3600

router = Router(prefix="/v1/uploads", tags=["Uploads"])


class ExpiresAfter(Parameters):
    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2592000)]


class UploadRequest(Parameters):
    filename: Annotated[str, Field(min_length=1)]
    purpose: Purpose
    bytes: Annotated[int, Field(ge=1, le=MAX_UPLOAD_BYTES)]
    mime_type: str
    expires_after: ExpiresAfter | None = None


class CompleteRequest(Parameters):
    part_ids: Annotated[list[str], Field(fail_fast=True, min_length=1)]
    md5: str | None = None


class CompletedUpload(Upload):
    file: File | None = None


@router.post("", response_model=CompletedUpload)
def create_upload(store: StoreOfRequest, asked: UploadRequest) -> Document:
    for old in store.find(UPLOAD, "json_extract(document, '$.expires_at') <= ?", (now(),)):
        if old["status"] == "pending":
            with contextlib.suppress(APIError):  # it ends in this very moment
                end_upload(store, old["id"], "expired")
    lifetime = asked.expires_after.seconds if asked.expires_after else None
    return public(store.add({
        "id": new_id("upload_"),
        "object": UPLOAD,
        "bytes": asked.bytes,
        "created_at": now(),
        "expires_at": now() + LIFETIME_SECONDS,
        "filename": asked.filename,
        "purpose": asked.purpose,
        "status": "pending",
        "_expires_after": lifetime,
    }))  # fmt: skip


def pending_upload(store: Store, upload_id: str) -> Document:
    """Return an upload that still takes parts, or raise the API's error."""
    upload = must_be_pending(store, upload_id)
    if upload["expires_at"] <= now():
        end_upload(store, upload_id, "expired")
        must_be_pending(store, upload_id)  # it is not
    return upload


def must_be_pending(store: Store, upload_id: str) -> Document:
    upload = store.get(UPLOAD, upload_id)
    if upload is None:
        raise not_found("Upload object", upload_id)
    if upload["status"] != "pending":
        raise APIError(400, f"Upload {upload_id} is {upload['status']}.", code="invalid_status")
    return upload


def end_upload(store: Store, upload_id: str, status: str, file: Document | None = None) -> Document:
    """Give a pending upload its last status, record its file if it has one, and delete its parts.

    Of several requests that end the same upload one succeeds; the others get the API's error.
    """
    with store.transaction():
        must_be_pending(store, upload_id)
        parts = store.find(PART, "parent_id = ?", (upload_id,))
        for part in parts:
            store.delete(PART, part["id"])
        changes = {"file": public(store.add(file))} if file else {}
        upload = store.update(UPLOAD, upload_id, status=status, **changes)
    for part in parts:
        store.file_path(part["id"]).unlink(missing_ok=True)
    return upload


@router.post("/{upload_id}/parts", response_model=UploadPart)
def add_part(store: StoreOfRequest, upload_id: str, data: UploadFile) -> Document:
    pending_upload(store, upload_id)
    part: Document = {"id": new_id("part_"), "object": PART, "created_at": now(), "upload_id": upload_id}
    with store.writing(store.file_path(part["id"])) as copy:
        shutil.copyfileobj(data.file, copy, 2**20)
        if copy.tell() > MAX_PART_BYTES:
            raise APIError(413, f"A part has at most {MAX_PART_BYTES // 2**20} MB.", param="data")
    try:
        with store.transaction():
            must_be_pending(store, upload_id)
            return store.add(part, upload_id)
    except Exception:
        store.file_path(part["id"]).unlink(missing_ok=True)
        raise


@router.post("/{upload_id}/complete", response_model=CompletedUpload)
def complete_upload(store: StoreOfRequest, upload_id: str, asked: CompleteRequest) -> Document:
    """Join the parts in the order given; the file must have the size that was announced, and the MD5 if one is sent."""
    upload = pending_upload(store, upload_id)
    known = {part["id"] for part in store.find(PART, "parent_id = ?", (upload_id,))}
    for part_id in asked.part_ids:
        if part_id not in known:
            raise APIError(400, f"No part {part_id} was added to this upload.", param="part_ids")
    file = new_file(upload["filename"], upload["purpose"], upload["_expires_after"])
    path = store.file_path(file["id"])
    try:
        with store.writing(path) as whole:
            join_parts(store, upload, asked, whole)
            file["bytes"] = upload["bytes"]
        return public(end_upload(store, upload_id, "completed", file))
    except Exception as error:
        path.unlink(missing_ok=True)
        if isinstance(error, FileNotFoundError):  # another request has ended the upload, and its parts are gone
            pending_upload(store, upload_id)
        raise


def join_parts(store: Store, upload: Document, asked: CompleteRequest, whole: IO[bytes]) -> None:
    """Write the parts one after the other; APIError if they are not what was announced."""
    size, md5 = 0, hashlib.md5(usedforsecurity=False)
    for part_id in asked.part_ids:
        content = store.file_path(part_id).read_bytes()
        size += len(content)
        if size > upload["bytes"]:
            break
        md5.update(content)
        whole.write(content)
    if size != upload["bytes"]:
        raise APIError(400, f"The parts have {size} bytes, but {upload['bytes']} were announced.", param="part_ids")
    if asked.md5 and asked.md5.lower() != md5.hexdigest():
        raise APIError(400, f"The MD5 of the joined parts is {md5.hexdigest()}.", param="md5")
    if upload["purpose"] == "fine-tune":
        check_jsonl(whole)


@router.post("/{upload_id}/cancel", response_model=CompletedUpload)
def cancel_upload(store: StoreOfRequest, upload_id: str) -> Document:
    pending_upload(store, upload_id)
    return public(end_upload(store, upload_id, "cancelled"))
