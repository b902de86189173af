"""State on disk: the API's objects in SQLite, the files' bytes beside them.

DATA_DIR/state.sqlite3   every file, job, event, checkpoint and model, as the JSON document that the API serves
DATA_DIR/files/ID        the bytes of an uploaded or a result file
DATA_DIR/jobs/ID/        the directory of a job (local_api/worker.py says what it holds)
DATA_DIR/tmp/            what is being written; emptied at each start
DATA_DIR/strays/         files and jobs that the database does not know; they come back when it does

A document's keys that begin with "_" are the server's own and never leave it. Each write is one transaction that is
on disk (WAL, synchronous=FULL) before the client hears of it; bytes are complete under their name or not there at all.
"""

import hashlib
import json
import logging
import os
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any

from fastapi import Depends, Request

from local_api.errors import APIError
from local_api.job_files import flush_directory

# The API's `object` names the kind.
FILE, MODEL = "file", "model"
JOB, EVENT, CHECKPOINT = "fine_tuning.job", "fine_tuning.job.event", "fine_tuning.job.checkpoint"
VERSION = 1  # of what follows and of the documents in it; 0 knew the trainer's events by their place in its file
SCHEMA = (
    """CREATE TABLE objects (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,  -- the order of creation, which all lists follow
    id TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    parent_id TEXT,                         -- of an event, checkpoint or model its job
    document TEXT NOT NULL
)""",
    "CREATE INDEX objects_of_kind ON objects (kind, parent_id, seq)",
)
CURE = "put a copy of it back, or move it away: a new one is made, and nothing beside it is deleted"
LOCK_SECONDS = 30.0  # how long a write waits for another's to end

log = logging.getLogger("local_api")

Document = dict[str, Any]


def now() -> int:
    return int(time.time())


def new_id(prefix: str, length: int = 24) -> str:
    return prefix + secrets.token_hex(length // 2)


def event_id(job_id: str, what: str) -> str:
    """Return the id of an event of which a job can have only one."""
    return "ftevent-" + hashlib.sha256(f"{job_id} {what}".encode()).hexdigest()[:24]


def public(document: Document) -> Document:
    """Return what of a document the API shows."""
    return {key: value for key, value in document.items() if not key.startswith("_")}


class StoreError(Exception):
    """The database cannot be used; the message is a sentence that says why and what to do."""


class Store:
    """The objects of the API and the bytes of its files, in one directory.

    Any thread may call any method. Calls inside `with store.transaction():` are one transaction.
    """

    def __init__(self, data_dir: Path):
        """Open the store, an empty one if there is none; StoreError if the database is not one of this server's."""
        self.data_dir = data_dir
        self.temporary = data_dir / "tmp"
        shutil.rmtree(self.temporary, ignore_errors=True)
        for directory in (self.temporary, data_dir / "files", data_dir / "jobs"):
            directory.mkdir(parents=True, exist_ok=True)
        self._thread = threading.local()  # .db: the connection of the transaction that this thread is in
        self._idle: list[sqlite3.Connection] = []
        path = data_dir / "state.sqlite3"
        try:
            self._prepare(path)
        except sqlite3.OperationalError as error:  # a full disk, a lock
            raise StoreError(f"{path} cannot be used ({error}).") from None
        except sqlite3.DatabaseError as error:
            raise StoreError(f"{path} is damaged ({error}); {CURE}.") from None
        self._move_strays()

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """Yield the connection of this thread's transaction, or a free one: readers never wait for a writer's fsync."""
        if in_transaction := getattr(self._thread, "db", None):
            yield in_transaction
            return
        try:
            db = self._idle.pop()
        except IndexError:
            db = sqlite3.connect(self.data_dir / "state.sqlite3", timeout=LOCK_SECONDS, isolation_level=None,
                                 check_same_thread=False)  # fmt: skip
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
        try:
            yield db
        finally:
            self._idle.append(db)

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def _prepare(self, path: Path) -> None:
        """Make the tables, or bring those of an older version up to date: in one transaction, after a copy."""
        found = self._query("PRAGMA quick_check(1)")[0][0]
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        tables = {row[0] for row in self._query("SELECT name FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'")}
        if not tables <= {"objects", "objects_of_kind"}:
            raise StoreError(f"{path} is not a database of this server; {CURE}.")
        version = self._query("PRAGMA user_version")[0][0]
        if version > VERSION:
            raise StoreError(f"{path} was written by a newer version of this server; start that one.")
        if version == VERSION:
            return
        if tables:
            copy = path.with_name(f"{path.name}.version-{version}")
            copy.unlink(missing_ok=True)
            self._query("VACUUM INTO ?", (str(copy),))
            log.warning("%s is brought to version %s; a copy of it stays as %s", path, VERSION, copy.name)
        with self.transaction():
            for statement in () if tables else SCHEMA:
                self._query(statement)
            self._upgrade()
            self._query(f"PRAGMA user_version = {VERSION}")

    def _upgrade(self) -> None:
        """0 to 1: what a trainer has reported is known by the id of its event."""
        for seq, job_id, text in self._query("SELECT seq, parent_id, document FROM objects WHERE kind = ?", (EVENT,)):
            event = json.loads(text)
            if event["type"] == "metrics":
                event["id"] = event_id(job_id, f"step {event['data']['step']}")
                values = (event["id"], json.dumps(event), seq)
                self._query("UPDATE OR IGNORE objects SET id = ?, document = ? WHERE seq = ?", values)

    def _move_strays(self) -> None:
        """Move to strays/ what the database does not know, and back what it knows (again). Nothing is deleted.

        A kill between writing bytes and recording them leaves such strays; so does a database that was lost.
        """
        known = {row[0] for row in self._query("SELECT id FROM objects WHERE kind IN (?, ?)", (FILE, JOB))}
        moved = []
        for folder in ("files", "jobs"):
            here, strays = self.data_dir / folder, self.data_dir / "strays" / folder
            strays.mkdir(parents=True, exist_ok=True)
            moved += [move(path, strays) for path in here.iterdir() if path.name not in known]
            for path in strays.iterdir():
                if path.name in known and not (here / path.name).exists():
                    move(path, here)
        if moved:
            log.warning("Not in the database, so moved to %s: %s", self.data_dir / "strays", ", ".join(moved))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        if getattr(self._thread, "db", None):  # a method called inside another's transaction is part of it
            yield
            return
        with self._connection() as db:
            db.execute("BEGIN IMMEDIATE")
            self._thread.db = db
            try:
                yield
                db.execute("COMMIT")
            finally:
                self._thread.db = None
                if db.in_transaction:
                    db.execute("ROLLBACK")

    def _query(self, sql: str, parameters: tuple = ()) -> list[tuple]:
        with self._connection() as db:
            return db.execute(sql, parameters).fetchall()

    def add(self, document: Document, parent_id: str | None = None) -> Document:
        self._query("INSERT INTO objects (id, kind, parent_id, document) VALUES (?, ?, ?, ?)",
                    (document["id"], document["object"], parent_id, json.dumps(document)))  # fmt: skip
        return document

    def add_once(self, document: Document, parent_id: str | None = None) -> bool:
        """Add an object unless there is one with its id; return whether it was added."""
        with self._connection() as db:
            sql = "INSERT OR IGNORE INTO objects (id, kind, parent_id, document) VALUES (?, ?, ?, ?)"
            return db.execute(sql, (document["id"], document["object"], parent_id, json.dumps(document))).rowcount > 0

    def get(self, kind: str, object_id: str) -> Document | None:
        rows = self._query("SELECT document FROM objects WHERE kind = ? AND id = ?", (kind, object_id))
        return json.loads(rows[0][0]) if rows else None

    def update(self, kind: str, object_id: str, **changes: Any) -> Document:
        """Change fields of an object and return it; KeyError if it is gone."""
        with self.transaction():
            document = self.get(kind, object_id)
            if document is None:
                raise KeyError(object_id)
            document.update(changes)
            self._query("UPDATE objects SET document = ? WHERE id = ?", (json.dumps(document), object_id))
        return document

    def delete(self, kind: str, object_id: str) -> None:
        self._query("DELETE FROM objects WHERE kind = ? AND id = ?", (kind, object_id))

    def find(self, kind: str, where: str = "1", parameters: tuple = (), *, order: str = "asc",
             limit: int = -1) -> list[Document]:  # fmt: skip
        """Return the objects of a kind, oldest first (order "asc") or newest first ("desc").

        where: SQL over the columns of `objects`, with `?` for its parameters; never text that a client sent.
        """
        return [json.loads(row[0]) for row in self._query(
            f"SELECT document FROM objects WHERE kind = ? AND ({where}) ORDER BY seq {order} LIMIT ?",
            (kind, *parameters, limit),
        )]  # fmt: skip

    def page(self, kind: str, *, after: str | None, limit: int, order: str = "desc", where: str = "1",
             parameters: tuple = ()) -> tuple[list[Document], bool]:  # fmt: skip
        """Return the `limit` objects that follow the one with id `after`, and whether more follow (`has_more`)."""
        if after is not None:
            sql = f"SELECT seq FROM objects WHERE kind = ? AND id = ? AND ({where})"
            rows = self._query(sql, (kind, after, *parameters))
            if not rows:
                raise APIError(400, f"Invalid 'after': no object with the id '{after}' is in this list.", param="after")
            where, parameters = f"({where}) AND seq {'<' if order == 'desc' else '>'} ?", (*parameters, rows[0][0])
        found = [public(document) for document in self.find(kind, where, parameters, order=order, limit=limit + 1)]
        return found[:limit], len(found) > limit

    # Bytes on disk

    def file_path(self, file_id: str) -> Path:
        """Return where the bytes of a file lie. The id must come from a stored object, never from a client."""
        return self.data_dir / "files" / file_id

    def job_dir(self, job_id: str) -> Path:
        return self.data_dir / "jobs" / job_id

    @contextmanager
    def writing(self, path: Path) -> Iterator[IO[bytes]]:
        """Yield a file that appears under `path`, complete and flushed to disk, if the block ends without error."""
        unfinished = self.temporary / new_id("")
        try:
            with open(unfinished, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
            flush_directory(path.parent)
        finally:
            unfinished.unlink(missing_ok=True)


def move(path: Path, folder: Path) -> str:
    """Move a file or a directory into a folder, beside what may have its name there; return its name."""
    target = folder / path.name
    while target.exists():
        target = folder / f"{path.name}.{new_id('', 4)}"
    path.rename(target)
    return path.name


async def of_request(request: Request) -> Store:
    return request.app.state.store


StoreOfRequest = Annotated[Store, Depends(of_request)]
