"""A loopback server that plays the fine-tuning API and, on demand, its faults.

It keeps files, jobs, events, checkpoints and models in memory, answers chat completions (plain and streamed), and
writes down every request. It trains nothing: a job moves one status on each time it is retrieved, as `job_plan` says.

    with FakeAPI() as api:
        client = OpenAI(base_url=api.base_url, api_key=api.key)        # or: env = api.env()
        api.fault("POST /fine_tuning/jobs", "500 after")  # the next such request is accepted, then answered 500
        ...
        assert len(api.jobs) == 1
        assert api.calls("POST /files") == 1

Scripting it, before or during a run:
    api.fault(match, kind, times=1, **how)   `match`: "METHOD /path" below /v1, where * stands for anything
                                             ("GET /fine_tuning/jobs/*"), or the number of a request counted from 0.
        kind: "500 before" | "500 after"     the request is dropped | carried out, then answered 500
              "drop before" | "drop after"   the same, and the connection is closed with no answer
              "slow"                         carried out, answered after `seconds` (default 30)
              "429"                          how: retry_after=seconds or None, code="rate_limit_exceeded"
              "401" | "403" | "404" | "413" | ...  any status; how: code=, message=
              "malformed"                    carried out, answered 200 with JSON that does not parse
              "html"                         carried out, answered 200 with a web page, as a proxy would
              "truncated"                    carried out, and the body ends in its middle
              "drop stream"                  a streamed chat completion whose connection breaks in its middle
    api.answer = lambda model, messages: "text"     what chat completions say (default: an echo of the last message)
    api.finish_reason = "stop"                      how every answer ends; None: the server never says
    api.refusal = False                             answers come as refusals
    api.stream_delay = 0.0                          seconds between the pieces of a streamed answer
    api.job_plan = ["queued", "running", "succeeded"]   one status a retrieve; the last one stays
    api.file_plan = ["processed"]                   the same for files; None leaves `status` out
    api.features = {"events", "checkpoints", "results", "fine_tuned_model", ...}   what it has
    api.echo_key = True                             error messages repeat the key, as a careless server's would
    api.after = lambda request: ...                 called when a request has been carried out, before it is answered
    api.add_model("gpt-x"), api.add_job(model=..., status=...), api.add_event(job_id, ...)
    api.finish(job_id)                              the job succeeds now
What happened:
    api.requests                                    list of Request(method, path, query, headers, body, answered)
    api.calls("POST /files")                        how many requests match
    api.files, api.jobs, api.models, api.contents, api.events, api.checkpoints    the state: dicts by id
"""

import base64
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.parser import BytesParser
from email.policy import HTTP
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

KEY = "sk-test-3f9a1c77d0e24b58"  # looks like a key, so that a test can search every output for it


@dataclass
class Request:
    method: str
    path: str  # below /v1, without the query
    query: dict[str, str]
    headers: dict[str, str]  # names in lower case
    body: Any  # parsed JSON, or for a form {"purpose": ..., "file": bytes, "filename": ...}, or None
    answered: str = ""  # "200", or the fault that was played

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"


@dataclass
class Fault:
    match: str | int
    kind: str
    times: int
    how: dict[str, Any] = field(default_factory=dict)


class HTTPError(Exception):
    """An error answer of OpenAI's shape."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # the default of 5 resets connections when a client asks many at once

    def handle_error(self, request, client_address):
        pass  # a killed client is part of the play


class FakeAPI:
    """The server; a context manager. See the module's docstring for how to script it."""

    key = KEY

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.files: dict[str, dict] = {}
        self.contents: dict[str, bytes] = {}
        self.jobs: dict[str, dict] = {}
        self.events: dict[str, list[dict]] = {}  # by job id, oldest first
        self.checkpoints: dict[str, list[dict]] = {}
        self.models: dict[str, dict] = {}
        self.answer: Callable[[str, list], str] = lambda model, messages: f"You said: {messages[-1]['content']}"
        self.finish_reason: str | None = "stop"
        self.refusal = False
        self.stream_delay = 0.0
        self.job_plan: list[str] = ["queued", "running", "succeeded"]
        self.file_plan: list[str | None] = ["processed"]
        self.features = {"events", "checkpoints", "results", "fine_tuned_model", "base64 results"}
        self.echo_key = False
        self.after: Callable[[Request], None] = lambda request: None
        self.counter = 0
        self.lock = threading.RLock()
        self.closing = threading.Event()
        self.add_model("gpt-4.1-mini-2025-04-14")
        self.add_model("smollm2-135m-instruct")
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            do_GET = do_POST = do_DELETE = lambda self: api.handle(self)

            def log_message(self, *args):
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.base_url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self) -> "FakeAPI":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exc_info) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def env(self, **more: str) -> dict[str, str]:
        """The variables a script needs to speak to this server."""
        return {"OPENAI_BASE_URL": self.base_url, "OPENAI_API_KEY": self.key, **more}

    # scripting

    def fault(self, match: str | int, kind: str, times: int = 1, **how: Any) -> None:
        self.faults.append(Fault(match, kind, times, how))

    def calls(self, match: str) -> int:
        return sum(fnmatchcase(request.name, match) for request in self.requests)

    def new_id(self, prefix: str) -> str:
        with self.lock:
            self.counter += 1
            return f"{prefix}{self.counter:04d}"

    def add_model(self, model_id: str, owned_by: str = "system") -> dict:
        model = {"id": model_id, "object": "model", "created": 1, "owned_by": owned_by}
        self.models[model_id] = model
        return model

    def add_file(self, filename: str, content: bytes, purpose: str = "fine-tune", **fields: Any) -> dict:
        file = {
            "id": self.new_id("file-"),
            "object": "file",
            "bytes": len(content),
            "created_at": int(time.time()),
            "filename": filename,
            "purpose": purpose,
            "polled": 0,
            **fields,
        }
        self.files[file["id"]], self.contents[file["id"]] = file, content
        return file

    def add_job(self, model: str = "gpt-4.1-mini-2025-04-14", training_file: str = "file-x", **fields: Any) -> dict:
        asked = fields.pop("hyperparameters", None) or {}
        job = {
            "id": self.new_id("ftjob-"),
            "object": "fine_tuning.job",
            "created_at": int(time.time()),
            "finished_at": None,
            "model": model,
            "fine_tuned_model": None,
            "organization_id": "org-1",
            "status": self.job_plan[0],
            "training_file": training_file,
            "validation_file": None,
            "result_files": [],
            "trained_tokens": None,
            "seed": 7,
            "error": {},
            "estimated_finish": None,
            "polled": 0,
            "hyperparameters": {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto", **asked},
            **fields,
        }
        self.jobs[job["id"]] = job
        self.events[job["id"]], self.checkpoints[job["id"]] = [], []
        self.add_event(job["id"], "Created fine-tuning job")
        return job

    def add_event(self, job_id: str, message: str, level: str = "info", **data: Any) -> dict:
        """Append an event; with keyword data (step=, total_steps=, train_loss=...) it is a metrics event."""
        event = {
            "id": self.new_id("ftevent-"),
            "object": "fine_tuning.job.event",
            "created_at": int(time.time()),
            "level": level,
            "message": message,
            "type": "metrics" if data else "message",
            "data": data or None,
        }
        self.events[job_id].append(event)
        return event

    def add_step(self, job_id: str, step: int, total: int, valid_loss: float | None = None) -> None:
        loss = round(2.5 / step**0.5, 3)
        more = {} if valid_loss is None else {"valid_loss": valid_loss, "valid_mean_token_accuracy": 0.7}
        self.add_event(
            job_id,
            f"Step {step}/{total}: training loss={loss}",
            step=step,
            total_steps=total,
            train_loss=loss,
            train_mean_token_accuracy=round(min(0.99, 0.5 + step / total / 2), 3),
            **more,
        )

    def finish(self, job_id: str, valid_losses: tuple[float, ...] = ()) -> dict:
        """The job succeeds: model, three checkpoints, result file, trained tokens."""
        job = self.jobs[job_id]
        job.update(status="succeeded", finished_at=int(time.time()), trained_tokens=12_345)
        job["hyperparameters"] = {"n_epochs": 3, "batch_size": 1, "learning_rate_multiplier": 1.8}
        name = f"ft:{job['model']}:acme:{job.get('suffix') or ''}:{job_id[-4:]}"
        if "fine_tuned_model" in self.features:
            job["fine_tuned_model"] = name
            self.add_model(name, owned_by="acme")
        total = max([(event["data"] or {}).get("total_steps", 0) for event in self.events[job_id]] + [3])
        for epoch in (1, 2, 3):
            step = total * epoch // 3
            metrics = {"step": step, "train_loss": 2.5 / step**0.5, "train_mean_token_accuracy": 0.8}
            if valid_losses:
                metrics["full_valid_loss"] = valid_losses[epoch - 1]
            self.checkpoints[job_id].append(
                {
                    "id": self.new_id("ftckpt_"),
                    "object": "fine_tuning.job.checkpoint",
                    "created_at": int(time.time()),
                    "fine_tuning_job_id": job_id,
                    "step_number": step,
                    "metrics": metrics,
                    "fine_tuned_model_checkpoint": name if epoch == 3 else f"{name}{step}:ckpt-step-{step}",
                }
            )
        if "results" in self.features:
            rows = ["step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"]
            rows += [f"{step},{2.5 / step**0.5:.4f},0.8,," for step in range(1, total + 1)]
            content = ("\n".join(rows) + "\n").encode()
            if "base64 results" in self.features:
                content = base64.b64encode(content)
            job["result_files"] = [self.add_file("step_metrics.csv", content, "fine-tune-results")["id"]]
        self.add_event(job_id, f"New fine-tuned model created: {name}")
        self.add_event(job_id, "The job has successfully completed")
        return job

    # one request

    def handle(self, http: BaseHTTPRequestHandler) -> None:
        raw = http.rfile.read(int(http.headers.get("Content-Length") or 0))
        address = urlsplit(http.path)
        request = Request(
            http.command,
            unquote(address.path.removeprefix("/v1")),
            {name: values[0] for name, values in parse_qs(address.query, keep_blank_values=True).items()},
            {name.lower(): value for name, value in http.headers.items()},
            self.parse_body(http.headers.get("Content-Type", ""), raw),
        )
        with self.lock:
            number = len(self.requests)
            self.requests.append(request)
            fault = self.take_fault(request, number)
        kind, how = (fault.kind, fault.how) if fault else ("", {})
        request.answered = kind
        if kind == "drop before":
            return self.drop(http)
        try:
            if kind == "500 before":
                raise HTTPError(500, "The server had an error while processing your request.")
            if kind == "429":
                wait = how.get("retry_after")
                raise HTTPError(
                    429,
                    how.get("message", "Rate limit reached."),
                    how.get("code", "rate_limit_exceeded"),
                    {} if wait is None else {"Retry-After": str(wait)},
                )
            if kind.isdigit():
                raise HTTPError(int(kind), how.get("message", f"Scripted error {kind}."), how.get("code"))
            if request.headers.get("authorization") != f"Bearer {self.key}":
                raise HTTPError(401, "Incorrect API key provided.", "invalid_api_key")
            with self.lock:
                answer = self.route(request)
            self.after(request)
            if kind == "500 after":
                raise HTTPError(500, "The server had an error after it had accepted your request.")
        except HTTPError as error:
            request.answered = request.answered or str(error.status)
            message = error.message
            if self.echo_key:
                message += f" (key: {request.headers.get('authorization', '').removeprefix('Bearer ')})"
            body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": error.code}}
            return self.send(http, error.status, json.dumps(how.get("body", body)).encode(), headers=error.headers)
        request.answered = kind or "200"
        if kind == "drop after":
            return self.drop(http)
        if kind == "slow":
            self.closing.wait(how.get("seconds", 30))
        if callable(answer):
            return answer(http, kind)
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        if kind == "malformed":
            return self.send(http, 200, body[: len(body) // 2])
        if kind == "html":
            return self.send(http, 200, b"<html><body>Please log in</body></html>", "text/html")
        self.send(
            http,
            200,
            body,
            "application/json" if not isinstance(answer, bytes) else "application/octet-stream",
            truncate=kind == "truncated",
        )

    def take_fault(self, request: Request, number: int) -> Fault | None:
        for fault in self.faults:
            by_name = isinstance(fault.match, str) and fnmatchcase(request.name, fault.match)
            if fault.times and (by_name or fault.match == number):
                fault.times -= 1
                return fault
        return None

    @staticmethod
    def parse_body(content_type: str, raw: bytes) -> Any:
        if content_type.startswith("application/json"):
            return json.loads(raw or b"null")
        if content_type.startswith("multipart/form-data"):
            form = BytesParser(policy=HTTP).parsebytes(f"Content-Type: {content_type}\r\n\r\n".encode() + raw)
            fields: dict[str, Any] = {}
            for part in form.iter_parts():
                name, content = part.get_param("name", header="content-disposition"), part.get_payload(decode=True)
                if part.get_filename() is None:
                    fields[name] = content.decode()
                else:
                    fields[name], fields["filename"] = content, part.get_filename()
            return fields
        return None

    @staticmethod
    def send(
        http: BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        content_type: str = "application/json",
        headers: dict[str, str] | None = None,
        truncate: bool = False,
    ) -> None:
        http.send_response(status)
        http.send_header("Content-Type", content_type)
        http.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            http.send_header(name, value)
        http.end_headers()
        http.wfile.write(body[: len(body) // 2] if truncate else body)
        if truncate:
            FakeAPI.drop(http)

    @staticmethod
    def drop(http: BaseHTTPRequestHandler) -> None:
        http.wfile.flush()
        http.close_connection = True
        http.connection.shutdown(2)

    # the API

    def route(self, request: Request) -> Any:
        for pattern, action in (
            ("POST /files", self.create_file),
            ("GET /files", lambda request: self.page(request, self.files.values())),
            ("GET /files/([^/]+)/content", lambda request, file_id: self.found(self.contents, file_id)),
            ("GET /files/([^/]+)", self.retrieve_file),
            ("DELETE /files/([^/]+)", lambda request, file_id: self.delete(self.files, file_id, "file")),
            ("POST /fine_tuning/jobs", self.create_job),
            ("GET /fine_tuning/jobs", self.list_jobs),
            ("GET /fine_tuning/jobs/([^/]+)", self.retrieve_job),
            ("POST /fine_tuning/jobs/([^/]+)/cancel", self.cancel_job),
            ("GET /fine_tuning/jobs/([^/]+)/events", self.list_events),
            ("GET /fine_tuning/jobs/([^/]+)/checkpoints", self.list_checkpoints),
            ("GET /models", lambda request: {"object": "list", "data": list(self.models.values())}),
            ("GET /models/(.+)", lambda request, model_id: self.found(self.models, model_id, "model_not_found")),
            ("DELETE /models/(.+)", lambda request, model_id: self.delete(self.models, model_id, "model")),
            ("POST /chat/completions", self.chat),
        ):
            match = re.fullmatch(pattern, request.name)
            if match:
                return action(request, *match.groups())
        raise HTTPError(404, f"Unknown request URL: {request.name}", "unknown_url")

    def found(self, things: dict, thing_id: str, code: str = "not_found") -> Any:
        if thing_id not in things:
            raise HTTPError(404, f"No such object: {thing_id}", code)
        return things[thing_id]

    def delete(self, things: dict, thing_id: str, kind: str) -> dict:
        self.found(things, thing_id)
        del things[thing_id]
        return {"id": thing_id, "object": kind, "deleted": True}

    def page(self, request: Request, items, default: int = 20) -> dict:
        """Newest first, `after` and `limit` as the API has them."""
        items = [self.shown(item) for item in reversed(list(items))]
        if request.query.get("purpose"):
            items = [item for item in items if item["purpose"] == request.query["purpose"]]
        after = request.query.get("after")
        if after:
            items = items[[item["id"] for item in items].index(after) + 1 :]
        limit = int(request.query.get("limit", default))
        return {"object": "list", "data": items[:limit], "has_more": len(items) > limit}

    @staticmethod
    def shown(item: dict) -> dict:
        return {name: value for name, value in item.items() if name != "polled"}

    def create_file(self, request: Request) -> dict:
        file = self.add_file(request.body["filename"], request.body["file"], request.body["purpose"])
        status = self.file_plan[0]
        if status is not None:
            file["status"] = status
        return self.shown(file)

    def retrieve_file(self, request: Request, file_id: str) -> dict:
        file = self.found(self.files, file_id)
        status = self.file_plan[min(file["polled"], len(self.file_plan) - 1)]
        file["polled"] += 1
        if status is not None:
            file["status"] = status
        if status == "error":
            file["status_details"] = "line 3 is not valid JSON"
        return self.shown(file)

    def create_job(self, request: Request) -> dict:
        asked = dict(request.body)
        self.found(self.files, asked["training_file"])
        if asked["model"] not in self.models:
            raise HTTPError(404, f"The model `{asked['model']}` does not exist", "model_not_found")
        method = asked.pop("method", None) or {}
        asked["hyperparameters"] = method.get("supervised", {}).get("hyperparameters") or asked.get("hyperparameters")
        return self.shown(self.add_job(**asked))

    def list_jobs(self, request: Request) -> dict:
        return self.page(request, list(self.jobs.values()))

    def retrieve_job(self, request: Request, job_id: str) -> dict:
        """One retrieve, one status further along job_plan; a running job has taken two steps of six."""
        job = self.found(self.jobs, job_id)
        if job["status"] in self.job_plan[:-1]:
            job["polled"] += 1
            status = self.job_plan[min(job["polled"], len(self.job_plan) - 1)]
            if status != job["status"] and status == "running":
                self.add_step(job_id, 1, 6)
                self.add_step(job_id, 2, 6)
            job["status"] = status
            if status == "succeeded":
                for step in range(3, 7):
                    self.add_step(job_id, step, 6)
                self.finish(job_id)
            elif status == "failed":
                job["error"] = {
                    "code": "invalid_training_file",
                    "message": "line 3 is not valid JSON",
                    "param": "training_file",
                }
        return self.shown(job)

    def cancel_job(self, request: Request, job_id: str) -> dict:
        job = self.found(self.jobs, job_id)
        if job["status"] in ("succeeded", "failed", "cancelled"):
            raise HTTPError(400, f"Job has already {job['status']}.", "invalid_request")
        job.update(status="cancelled", finished_at=int(time.time()))
        return self.shown(job)

    def list_events(self, request: Request, job_id: str) -> dict:
        if "events" not in self.features:
            raise HTTPError(404, "This server has no events", "unknown_url")
        return self.page(request, self.found(self.events, job_id))

    def list_checkpoints(self, request: Request, job_id: str) -> dict:
        if "checkpoints" not in self.features:
            raise HTTPError(404, "This server has no checkpoints", "unknown_url")
        return self.page(request, self.found(self.checkpoints, job_id), default=10)

    def chat(self, request: Request) -> Any:
        model, messages = request.body["model"], request.body["messages"]
        if model not in self.models:
            raise HTTPError(404, f"The model `{model}` does not exist", "model_not_found")
        text = self.answer(model, messages)
        usage = {
            "prompt_tokens": sum(len(message["content"].split()) for message in messages),
            "completion_tokens": len(text.split()),
        }
        usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
        head = {"id": self.new_id("chatcmpl-"), "created": int(time.time()), "model": model}
        if not request.body.get("stream"):
            message = {"role": "assistant", "content": None if self.refusal else text}
            message["refusal"] = text if self.refusal else None
            choice = {"index": 0, "finish_reason": self.finish_reason, "message": message}
            return {**head, "object": "chat.completion", "usage": usage, "choices": [choice]}
        with_usage = (request.body.get("stream_options") or {}).get("include_usage")
        return lambda http, kind: self.stream(http, kind, head, text, usage if with_usage else None)

    def stream(self, http: BaseHTTPRequestHandler, kind: str, head: dict, text: str, usage: dict | None) -> None:
        """Server-sent events, a word a piece; the connection's end is the body's end."""
        http.send_response(200)
        http.send_header("Content-Type", "text/event-stream")
        http.send_header("Transfer-Encoding", "chunked")
        http.end_headers()

        def write(data: str) -> None:
            payload = f"data: {data}\n\n".encode()
            http.wfile.write(f"{len(payload):x}\r\n".encode() + payload + b"\r\n")
            http.wfile.flush()

        def piece(delta: dict, finish_reason: str | None = None) -> None:
            write(
                json.dumps(
                    {
                        **head,
                        "object": "chat.completion.chunk",
                        "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}],
                    }
                )
            )

        words = re.findall(r"\S+\s*|\s+", text)
        if kind in ("drop stream", "truncated", "malformed"):
            words = words[: max(1, len(words) // 2)]
        piece({"role": "assistant", "content": ""})
        for word in words:
            self.closing.wait(self.stream_delay)
            piece({"refusal" if self.refusal else "content": word})
        if kind == "malformed":
            write('{"choices": [')
        if kind in ("drop stream", "truncated"):
            return self.drop(http)
        piece({}, self.finish_reason)
        if usage:
            write(json.dumps({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage}))
        write("[DONE]")
        http.wfile.write(b"0\r\n\r\n")
