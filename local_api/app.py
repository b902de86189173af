"""The application: settings, what guards every request, and what starts and stops with the server."""

import asyncio
import hmac
import logging
import re
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from local_api import answers, base_models, chat, errors, files, jobs, models, page, responses
from local_api.engine import Engine
from local_api.errors import APIError
from local_api.generation import EngineError, GenerationRequest
from local_api.store import Store, new_id
from local_api.worker import Worker

MAX_JSON_BYTES = 16 * 1024 * 1024
HEAD_SECONDS = 30.0  # what a connection gets to send the head of a request
HELLO = [{"role": "user", "content": "Hello"}]  # answered by nobody's asking: it loads the model
LOOPBACK = ("127.0.0.1", "localhost", "::1")
TRAINER_COMMAND = (sys.executable, "-m", "local_api.train")

log = logging.getLogger("local_api")


@dataclass(frozen=True)
class Settings:
    data_dir: Path = Path(".local_api")
    cache_dir: Path | None = None  # default: DATA_DIR/cache
    base_models: Sequence[str] = (base_models.DEFAULT_BASE_MODEL,)
    host: str = "127.0.0.1"
    api_key: str | None = field(default=None, repr=False)
    max_memory: int | None = None  # bytes that loaded models may take; default: half of the machine's memory
    allow_hosts: Sequence[str] = ()  # names beside LOOPBACK by which clients may call this server
    allow_origins: Sequence[str] = ()  # of web pages and desktop apps that may use it, for instance app://obsidian.md
    load_at_start: bool = False  # the first base model, so that the first answer need not wait for it


def create_app(settings: Settings, *, engine: Any = None, trainer_command: Sequence[str] = TRAINER_COMMAND) -> FastAPI:
    """Return the server's ASGI application; its work starts with the ASGI lifespan and ends with it.

    engine: what answers chat requests; the default is local_api.engine.Engine.
    trainer_command: run with a job's directory as its last argument.
    """
    app = FastAPI(title="local_api", version="1", lifespan=lifespan, docs_url=None, redoc_url=None,
                  responses=errors.RESPONSES)  # fmt: skip
    data_dir = settings.data_dir.resolve()
    store = Store(data_dir)
    app.state.settings, app.state.store, app.state.places = settings, store, answers.Places()
    app.state.models = models.Models(store, settings.base_models, settings.cache_dir or data_dir / "cache", log.info)
    app.state.worker = worker = Worker(store, app.state.models, trainer_command)
    app.state.engine = engine or Engine(app.state.models.locate, settings.max_memory, lambda: worker.training)
    for part in (files, jobs, models, chat, responses):
        app.include_router(part.router)
    page.add_routes(app)
    app.add_api_route("/healthz", lambda: {"status": "ok"}, include_in_schema=False)
    errors.install(app)
    app.add_middleware(Guard, settings=settings)  # type: ignore[arg-type]
    if settings.allow_origins:  # whose pages may read what the Guard lets through, and its refusals
        app.add_middleware(CORSMiddleware, allow_origins=settings.allow_origins, allow_headers=["*"],
                           allow_methods=["GET", "POST", "DELETE"], allow_private_network=True,
                           expose_headers=["x-request-id", "retry-after"])  # fmt: skip
    return app


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.worker.start()
    threading.Thread(target=prepare_base_models, args=(app,), name="prepare", daemon=True).start()
    yield
    await asyncio.to_thread(app.state.worker.stop)
    await asyncio.to_thread(app.state.engine.close)
    app.state.store.close()


def prepare_base_models(app: FastAPI) -> None:
    """Fetch and convert the base models in the background, so that the first job or question need not wait."""
    for model_id in app.state.models.base_ids:
        try:
            app.state.models.weights(model_id)
        except base_models.ModelUnavailable as error:
            log.error("%s: %s", model_id, error)  # a job or a question that needs it is told so too
            continue
        if app.state.settings.load_at_start and model_id == app.state.models.base_ids[0]:
            with suppress(EngineError):  # the server is stopping
                app.state.engine.submit(GenerationRequest(model_id, HELLO, max_tokens=1))


class Guard:
    """What every request passes: host and origin, key, size; then the log line. Plain ASGI, so that streams stream.

    A web page that the reader visits can reach 127.0.0.1 too, directly or under a name of its own that resolves there
    (DNS rebinding). The first kind of request carries a foreign Origin or Sec-Fetch-Site, the second a foreign Host.
    """

    def __init__(self, app: ASGIApp, settings: Settings):
        self.app = app
        self.key = settings.api_key
        local = settings.host in LOOPBACK  # otherwise any name is right, with the key
        self.hosts = {"127.0.0.1", "localhost", "[::1]", *settings.allow_hosts} if local else None
        self.origins = settings.allow_origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, request_id, status = time.monotonic(), new_id("req_"), 0
        state = scope.setdefault("state", {})
        headers = Headers(scope=scope)
        limit = files.MAX_FILE_BYTES if scope["path"].startswith("/v1/files") else MAX_JSON_BYTES
        received = 0

        async def receive_within_limit() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise too_large(limit)
            return message

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            self.check(scope, headers, limit)
            await self.app(scope, receive_within_limit, send_with_id)
        except Exception as error:
            if not isinstance(error, APIError):
                log.exception("%s failed", request_id)
            if status:
                raise  # the response has begun: all that can be done is to break it off
            response = errors.error_response(error if isinstance(error, APIError) else errors.explain(error))
            await response(scope, receive, send_with_id)
        finally:
            usage = state.get("usage")
            tokens = f" {usage['prompt_tokens']}+{usage['completion_tokens']} tokens" if usage else ""
            path = scope.get("raw_path", b"").decode("latin-1").split("?")[0]  # still percent-encoded: one line
            log.info("%s %s %s %s %.0f ms%s", request_id, scope["method"], path, status or "-",
                     (time.monotonic() - started) * 1000, tokens)  # fmt: skip

    def check(self, scope: Scope, headers: Headers, limit: int) -> None:
        """Raise the APIError with which this request is refused, if it is."""
        host = headers.get("host", "")
        if self.hosts is not None and re.sub(r":\d*$", "", host.lower()) not in self.hosts:
            raise APIError(403, f"This server does not answer to the host name '{host}' (--allow-host).",
                           code="forbidden_host")  # fmt: skip
        origin = headers.get("origin")
        if origin not in self.origins:
            foreign = origin not in (None, f"http://{host}", f"https://{host}")
            # A link to the page, as in README on another site, may be followed; it shows nothing to the site it is on.
            followed = scope["path"] == "/" and headers.get("sec-fetch-dest") == "document"
            elsewhere = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
            if foreign or (elsewhere and not followed):
                sentence = "This server does not answer web pages of other origins (--allow-origin)."
                raise APIError(403, sentence, code="forbidden_origin")
        if self.key is not None and scope["path"] not in ("/healthz", *page.FILES):
            sent = headers.get("authorization", "")
            if not sent:
                raise APIError(401, "You didn't provide an API key. Send it as 'Authorization: Bearer KEY'.")
            # Headers arrive decoded as Latin-1.
            scheme, _, key = sent.partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode("latin-1"), self.key.encode()):
                raise APIError(401, "Incorrect API key provided.", code="invalid_api_key")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > limit:
            raise too_large(limit)


class Connection(H11Protocol):
    """A connection, which is closed when it has sent no whole head of a request for HEAD_SECONDS."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(HEAD_SECONDS, self.close_without_request, self.cycle)

    def on_response_complete(self) -> None:
        before = self.cycle
        super().on_response_complete()
        self.loop.call_later(HEAD_SECONDS, self.close_without_request, before)

    def close_without_request(self, last: Any) -> None:
        if self.cycle is last:
            self.transport.close()


class RepeatedLines(logging.Filter):
    """Lets the same warning or error through once a minute, and says then how often it came meanwhile."""

    def __init__(self, seconds: float = 60):
        super().__init__()
        self.seconds, self.seen = seconds, dict[str, tuple[float, int]]()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        text, moment = record.getMessage(), time.monotonic()
        since, count = self.seen.get(text, (float("-inf"), 0))
        if moment - since < self.seconds:
            self.seen[text] = (since, count + 1)
            return False
        if len(self.seen) > 1000:
            self.seen.clear()
        self.seen[text] = (moment, 0)
        if count:
            record.msg, record.args = f"{text} (and {count} times before)", None
        return True


def too_large(limit: int) -> APIError:
    return APIError(413, f"The request is larger than the limit of {limit // 2**20} MB.", code="request_too_large")
