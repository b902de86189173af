"""Step 3: look at the fine-tuning job, or follow it to its end, and read what it learned.

Needs   the job that fine_tune.py recorded in fine_tune_job.json, or a job id, and the server that has it.
Leaves  nothing on disk (but the picture that --plot asks for) and nothing changed on the server: Ctrl-C leaves the job
        running. Only --cancel and --clean-up change anything.
Omits   pausing, resuming and metrics of methods other than supervised fine-tuning.

    python check_fine_tune_status.py                          # one look
    python check_fine_tune_status.py --wait                   # events, loss and time left, until the job has ended
    python check_fine_tune_status.py ftjob-abc123 --plot loss.svg
    python check_fine_tune_status.py --list
    python check_fine_tune_status.py --clean-up ftjob-abc123 --yes

With --json stdout is one JSON document: the job (see check_status), the list of jobs, or what was deleted.

Exit codes: 0 succeeded, or not ended yet · 1 failed or cancelled · 2 usage or configuration · 3 --timeout has passed ·
4 server or network · 130 interrupted.
"""

import argparse
import base64
import csv
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import time
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit
from xml.sax.saxutils import escape

# What servers call a job's status, in any letter case (OpenAI, Azure, Nebius, Mistral, Together). A word that stands
# nowhere here is taken for "not ended yet": to stop waiting too early would lose more than to wait.
STATUSES = {
    "validating_files": "validating_files validating validated",
    "queued": "queued pending notrunning created submitted",
    "running": "running started in_progress compressing uploading pausing paused resuming "
    "canceling cancelling cancel_requested cancellation_requested",
    "succeeded": "succeeded success completed",
    "failed": "failed error user_error failed_validation",
    "cancelled": "cancelled canceled",
}
ENDED = ("succeeded", "failed", "cancelled")
ADVICE = {  # what to do about a failed job, by the param of its error
    "training_file": "See what is wrong with: python prepare_training_data.py --check training_data.jsonl",
    "validation_file": "Judge it with: python prepare_training_data.py --check VALIDATION_FILE",
    "hyperparameters": "Choose other --n-epochs, --batch-size or --learning-rate-multiplier.",
}
DEPLOY_FIRST = {  # servers whose fine-tuned model answers only after a step outside this API
    "azure.com": "create a deployment of it (portal, or az cognitiveservices account deployment create)",
    "nebius.com": "register a checkpoint with POST /v0/models and wait until it is active",
    "crusoecloud.com": "create a deployment of a checkpoint in the console",
}
REQUEST_TIMEOUT = 60.0  # seconds
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 5.0  # seconds between two looks; on the local API a job can end within a minute
SILENCE = 600.0  # seconds without news after which that is said
FAULT_PATIENCE = 600.0  # seconds for which a server that fails is asked again
OVERFIT = 1.02  # a validation loss this many times its minimum has risen


# --- identical in the four scripts that talk to a server; tests/test_scripts.py holds the copies equal ---
class StepError(Exception):
    """One sentence for the reader, and the exit code that goes with it."""

    def __init__(self, sentence: str, exit_code: int = 2):
        super().__init__(sentence)
        self.exit_code = exit_code


def server_settings():
    """Return (API key, base URL) of the server that the environment or .env names (StepError if of no use)."""
    from importlib.util import find_spec

    for package, module in (("openai", "openai"), ("python-dotenv", "dotenv")):
        if not find_spec(module):
            raise StepError(
                f"{package} is not installed here: activate the virtual environment (source .venv/bin/activate) "
                "or run python -m pip install -r requirements.txt"
            )
    from dotenv import load_dotenv

    load_dotenv()
    api_key, base_url = os.environ.get("OPENAI_API_KEY"), os.environ.get("OPENAI_BASE_URL")
    if not api_key and not base_url:
        raise StepError(
            "No server is configured: copy .env.example to .env to use the local API, "
            "or set OPENAI_API_KEY to use OpenAI."
        )
    # A stray line end in the key would come back in the error text of the HTTP library, key and all.
    # An empty OPENAI_BASE_URL would reach the SDK as an empty address, so the default is spelled out.
    api_key, base_url = (api_key or "").strip() or "not-needed", base_url or "https://api.openai.com/v1"
    if not (api_key.isascii() and api_key.isprintable()):
        raise StepError("OPENAI_API_KEY holds a character that no key has, such as a typographic dash: paste it again.")
    try:
        usable = urlsplit(base_url).scheme in ("http", "https") and urlsplit(base_url).hostname
    except ValueError:  # a bracket or a port that is none
        usable = False
    if not usable:
        raise StepError(
            f"OPENAI_BASE_URL is {base_url!r}, which is no address: begin it with http:// or https://, "
            "as in http://127.0.0.1:8321/v1"
        )
    return api_key, base_url


def same_server(one: str | None, other: str | None) -> bool:
    """Tell whether two base URLs name one server: localhost is 127.0.0.1, and a slash at the end is nothing."""

    def plain(base_url):
        address = urlsplit((base_url or "").rstrip("/"))
        local = address.hostname in ("localhost", "127.0.0.1", "::1")
        return address.scheme, "localhost" if local else address.hostname, address.port, address.path

    return plain(one) == plain(other)


def connect(timeout: float = 600):
    """Return the client for that server; `timeout`: seconds without an answer before a request counts as lost."""
    api_key, base_url = server_settings()
    import openai  # imported here: it takes half a second that --help should not cost

    def refuse_web_page(response):  # what a proxy or a wrong address answers; the SDK would hand it on as a bare string
        if response.is_success and "html" in response.headers.get("content-type", ""):
            raise openai.APIError("a web page", response.request, body=None)

    address = urlsplit(base_url)
    if address.scheme == "http" and address.hostname not in ("localhost", "127.0.0.1", "::1"):
        print(f"warning: plain http to {address.hostname}: your key can be read on the way.", file=sys.stderr)
    try:
        timeout = float(os.environ.get("FINE_TUNE_TIMEOUT") or timeout)
        if not 0 < timeout < 1e6:
            raise ValueError
    except ValueError:
        raise StepError("FINE_TUNE_TIMEOUT must be a number of seconds, such as 60.") from None
    http_client = openai.DefaultHttpxClient(event_hooks={"response": [refuse_web_page]})
    return openai.OpenAI(api_key=api_key, base_url=base_url, timeout=timeout, http_client=http_client)


def out_of_credit(error) -> bool:
    """Tell a 429 that waiting does not cure (credit, spending limit) from one that asks to slow down."""
    words = ("insufficient_quota", "credit", "spend", "usage_limit")
    return any(word in f"{error.type} {error.code}" for word in words)


@contextmanager
def server_errors_explained(client):
    """Turn what the SDK raises inside the block into a StepError: the cause and the cure in one sentence."""
    import openai

    server = str(client.base_url)

    def clean(text) -> str:  # one line, and no key in it even where the server repeats it
        text = " ".join(str(text).split()).rstrip(".")
        return text if len(client.api_key) < 16 else text.replace(client.api_key, "[key]")  # "local" is no secret

    try:
        yield
    except openai.APITimeoutError:
        raise StepError(f"{server} did not answer in time; run the same command again.", 4) from None
    except openai.APIConnectionError as error:
        cause = clean(error.__cause__ or error)
        if "CERTIFICATE" in cause.upper():
            cure = "its TLS certificate was not accepted; set SSL_CERT_FILE to your organisation's certificates."
        elif urlsplit(server).hostname in ("localhost", "127.0.0.1", "::1"):
            cure = f"is the local API running? Start it in another terminal: python -m local_api ({cause})"
        else:
            cure = f"check the network and OPENAI_BASE_URL ({cause})."
        raise StepError(f"Cannot reach {server}: {cure}", 4) from None
    except openai.APIStatusError as error:
        code, said = error.status_code, error.body.get("message") if isinstance(error.body, dict) else None
        otherwise = "the request was not accepted" if code < 500 else "the server failed; run the same command again"
        sentence = {
            401: "the key was not accepted; check OPENAI_API_KEY and that it belongs to this server",
            403: "this key may not do that",
            404: "no such model, job or file on this server; check the id and OPENAI_BASE_URL",
            413: "the file is larger than this server accepts; split it or shorten it",
            429: "too many requests; wait a little and run the same command again",
        }.get(code, otherwise)
        if code == 404 and not server.rstrip("/").endswith("/v1"):
            sentence += ", which ends in /v1 on most servers"
        if code == 429 and out_of_credit(error):
            sentence = "no credit is left or a spending limit is reached, and waiting does not help; see your plan"
        sentence = f"{server} answered {code}: {sentence}. It said: {clean(said or error.message)}."
        raise StepError(sentence, 4 if code == 429 or code >= 500 else 2) from None
    except (openai.APIError, json.JSONDecodeError) as error:  # an error event in a stream, a body that is not JSON
        raise StepError(f"{server} sent an answer that cannot be read: {clean(error)}.", 4) from None


def deleted(client, model: str | None) -> bool:
    """Tell whether a fine-tuned model is gone: the server lists its models, and this one is not among them."""
    import openai

    if not (model or "").startswith("ft:"):  # servers with other names list a model only once it is deployed
        return False
    try:
        names = {listed.id for listed in client.models.list()}
    except (openai.APIError, json.JSONDecodeError):
        return False  # this answers no question of the reader's, so it may stay open
    return bool(names) and model not in names


def read_job_record(path: str = "fine_tune_job.json") -> dict:
    """Return what fine_tune.py recorded of its latest job, or {} if there is no record yet."""
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
        if not isinstance(record, dict):
            raise ValueError
        return record
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        raise StepError(f"{path} is not readable JSON; move it away, or name the job or model yourself.") from None


# --- end of the identical part ---


# For other code


def check_status(job_id: str | None = None) -> dict:
    """Return what one look at the job (default: the recorded one) shows.

    Keys: job_id, status (one of STATUSES, or the server's own word), server_status, model, fine_tuned_model,
    created_at and finished_at (Unix seconds), hyperparameters, trained_tokens, cost and estimated_cost (USD),
    error ({code, message, param}), events ([{created_at, level, message}], oldest first), metrics ([{step,
    train_loss, ...}]), checkpoints ([{step, model, train_loss, ...}]), best_checkpoint (a model), overfitting (a
    sentence). What the server does not tell is None or empty. Raises StepError with the sentence for the reader.
    """
    client = connect(REQUEST_TIMEOUT)
    with server_errors_explained(client):
        job = client.fine_tuning.jobs.retrieve(job_id or recorded_job(client))
        return describe(client, job, new_events(client, job.id, []))


def list_jobs(limit: int = 20) -> list[dict]:
    """Return the newest jobs: [{job_id, status, model, created_at, fine_tuned_model}], newest first."""
    limit = max(limit, 1)
    client = connect(REQUEST_TIMEOUT)
    with server_errors_explained(client):
        # Iterating would follow the pages to the very first job: the API's `limit` is the size of a page.
        jobs = list(itertools.islice(client.fine_tuning.jobs.list(limit=min(limit, 100)), limit))
    names = ("model", "created_at", "fine_tuned_model")
    rows = [
        {"job_id": job.id, "status": status_of(job), **{name: getattr(job, name) for name in names}} for job in jobs
    ]
    return sorted(rows, key=lambda row: -(row["created_at"] or 0))


def wait_for_training(job_id: str | None = None, timeout: float | None = None) -> str:
    """Follow the job (default: the recorded one) to its end, in silence, and return the fine-tuned model.

    Raises StepError if the job fails or is cancelled (exit code 1), or when `timeout` seconds have passed (3).
    """
    client = connect(REQUEST_TIMEOUT)
    with server_errors_explained(client):
        job, _ = follow(client, job_id or recorded_job(client), timeout)
    if status_of(job) != "succeeded":
        reason = (error_of(job) or {}).get("message") or "the server gives no reason"
        raise StepError(f"Job {job.id} {status_of(job)}: {reason}.", 1)
    if not job.fine_tuned_model:
        raise StepError(f"Job {job.id} succeeded, but the server names no fine-tuned model.", 3)
    return job.fine_tuned_model


def recorded_job(client) -> str:
    """Return the id of the job that fine_tune.py recorded, if it is on this server."""
    record = read_job_record()
    if not record.get("job_id"):
        begun = "fine_tune.py has not finished here" if record else "There is no job yet"
        raise StepError(f"{begun}: run python fine_tune.py, name a job id, or see all jobs with --list.")
    here = str(client.base_url).rstrip("/")
    there = record.get("base_url", here)
    if not same_server(here, there):
        raise StepError(
            f"The recorded job {record['job_id']} is on {there}, but OPENAI_BASE_URL is {here}: "
            "set it back, or name a job id."
        )
    return record["job_id"]


# Reading a job, on any server


def status_of(job) -> str:
    """Return the job's status in OpenAI's words, or the server's own word where it is not in the table."""
    word = str(job.status)
    return next((ours for ours, words in STATUSES.items() if word.lower().replace(" ", "_") in words.split()), word)


def error_of(job) -> dict | None:
    """Return {"code", "message", "param"}; None for the empty error {} that some servers give a healthy job."""
    error = {name: getattr(job.error, name, None) for name in ("code", "message", "param")}
    return error if any(error.values()) else None


def new_events(client, job_id: str, old: list) -> list:
    """Return the events that are not among the old ones, oldest first; pages are fetched only as far as needed."""
    import openai

    seen, fresh = {event.id for event in old}, []
    try:
        page = client.fine_tuning.jobs.list_events(job_id, limit=100)
        while True:
            unseen = [event for event in page.data or [] if event.id not in seen]
            seen.update(event.id for event in unseen)
            fresh += unseen
            if not unseen or len(unseen) < len(page.data) or not page.has_next_page():
                break
            page = page.get_next_page()
    except openai.NotFoundError:
        return []  # this server has no events
    # The API lists the newest first. Not every server does, and times in seconds leave the order of quick steps open.
    fresh.reverse()
    fresh.sort(key=lambda event: event.created_at or 0)
    steps = iter(sorted(filter(metrics_of, fresh), key=lambda event: metrics_of(event)["step"]))
    return [next(steps) if metrics_of(event) else event for event in fresh]


def metrics_of(event) -> dict:
    """Return an event's figures, {step, total_steps, train_loss, ...}, or {} if it has none."""
    data = event.data if isinstance(event.data, dict) else {}
    figures = {name: value for name, value in data.items() if isinstance(value, (int, float))}  # some send null
    if "step" in figures and "train_loss" in figures:
        return figures
    told = re.match(r"Step (\d+)/(\d+): training loss=([\d.]+)", event.message or "")  # where the data is left out
    return {"step": int(told[1]), "total_steps": int(told[2]), "train_loss": float(told[3])} if told else {}


def result_rows(client, job) -> list[dict]:
    """Return the rows of the job's result file, [] if there is none; OpenAI sends the CSV in Base64, others plain."""
    import openai

    if not job.result_files:
        return []
    try:
        content = client.files.content(job.result_files[0]).content
        text = (content if content.startswith(b"step,") else base64.b64decode(content)).decode()
        rows = csv.DictReader(io.StringIO(text.replace("train_accuracy", "train_mean_token_accuracy", 1)))
        return [
            {name: float(value) for name, value in row.items() if value} | {"step": int(row["step"])} for row in rows
        ]
    except (openai.NotFoundError, ValueError, KeyError, TypeError):
        return []  # deleted, or a file of another kind


def checkpoints_of(client, job) -> list[dict]:
    """Return the job's checkpoints, by step: [{step, model, train_loss, ...}]; [] where the server has none."""
    import openai

    try:
        page = client.fine_tuning.jobs.checkpoints.list(job.id, limit=50)
    except openai.NotFoundError:
        return []
    checkpoints = [
        {**known(checkpoint.metrics), "step": checkpoint.step_number, "model": checkpoint.fine_tuned_model_checkpoint}
        for checkpoint in page.data or []
    ]
    return sorted(checkpoints, key=lambda checkpoint: checkpoint["step"] or 0)


def known(fields) -> dict:
    """Return as a dict what is set of one of the SDK's objects."""
    return {name: value for name, value in (fields.to_dict() if fields else {}).items() if value is not None}


def validation_loss(figures: dict) -> float:
    """Return the loss over the whole validation file where there is one, else over the tried batch; NaN if neither."""
    return figures.get("full_valid_loss") or figures.get("valid_loss") or math.nan


def describe(client, job, events: list) -> dict:
    """Return all that is known of the job, in the form that check_status documents."""
    record = read_job_record()
    metrics = [metrics_of(event) for event in events if metrics_of(event)]
    checkpoints: list[dict] = []
    if status_of(job) == "succeeded":
        metrics = max(metrics, result_rows(client, job), key=len)
        checkpoints = checkpoints_of(client, job)
    validated = [figures for figures in checkpoints or metrics if math.isfinite(validation_loss(figures))]
    best = min(validated, key=validation_loss, default={})
    overfitting = None
    if validated and validation_loss(validated[-1]) > OVERFIT * validation_loss(best):
        overfitting = (
            f"Over-fitting: the validation loss was lowest at step {best['step']} ({validation_loss(best):.3f}) "
            f"and has risen to {validation_loss(validated[-1]):.3f} since."
        )
    return {
        "job_id": job.id,
        "status": status_of(job),
        "server_status": job.status,
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model,
        "created_at": job.created_at,
        "finished_at": job.finished_at,
        "hyperparameters": known(
            job.hyperparameters or getattr(job.method and job.method.supervised, "hyperparameters", None)
        ),
        "trained_tokens": job.trained_tokens,
        "cost": training_cost(job),
        "estimated_cost": record.get("estimated_cost") if record.get("job_id") == job.id else None,
        "error": error_of(job),
        "events": [
            {"created_at": event.created_at, "level": event.level, "message": event.message}
            for event in events
            if not metrics_of(event)
        ],
        "metrics": metrics,
        "checkpoints": checkpoints,
        "best_checkpoint": best.get("model"),
        "overfitting": overfitting,
    }


def training_cost(job) -> float | None:
    """Return what the trained tokens cost in USD, None if they or their price are not known."""
    try:
        from prepare_training_data import training_price
    except ModuleNotFoundError:
        return None  # the prices stand in step 1
    price = training_price(job.model or "")
    return None if price is None or job.trained_tokens is None else job.trained_tokens * price / 1e6


# Following a job


def follow(
    client, job_id: str, timeout: float | None = None, say=lambda line: None, progress=lambda line: None
) -> tuple:
    """Return (job, events) when the job has ended; `say` gets what happens, `progress` how the training goes."""
    import openai

    client = client.with_options(max_retries=0)  # a fault is ridden out here, where it can be said
    job, faults, pause = None, 0, FIRST_PAUSE
    events: list = []
    started = answered = news = time.monotonic()
    while True:
        wait = 0.0
        try:
            latest = client.fine_tuning.jobs.retrieve(job_id)
            fresh = new_events(client, job_id, events)
        except (openai.APIError, json.JSONDecodeError) as error:
            if job is None or not may_pass(error) or time.monotonic() - answered > FAULT_PATIENCE:
                raise
            wait = seconds_asked(error)
            faults += 1
            if faults == 1 or wait:
                say(
                    f"No answer from the server ({type(error).__name__}); asking again"
                    + f" in {wait:.0f} s" * bool(wait)
                )
        else:
            if faults:
                say("The server answers again.")
            faults, answered = 0, time.monotonic()
            changed = job is None or job.status != latest.status
            job = latest
            for event in fresh:
                events.append(event)
                if metrics_of(event):
                    progress(progress_line(metrics_of(event), time_left(job, events)))
                else:
                    say(f"{moment(event.created_at)[11:]:8}  {event.message}")
            if changed:
                progress(status_of(job))
                if status_of(job) not in STATUSES:
                    say(f"{job.status!r} is no status known here; waiting on.")
            if status_of(job) in ENDED:
                return job, events
            if fresh or changed:
                news, pause = answered, FIRST_PAUSE
        now = time.monotonic()
        if now - news > SILENCE:
            say(f"No news from the job for {duration(SILENCE)}; the server last called it {status_of(job)}.")
            news = now
        left = math.inf if timeout is None else started + timeout - now
        if left <= 0:
            raise StepError(
                f"Job {job_id} has not ended after {duration(timeout or 0)}; it goes on at the server. "
                f"Follow it again with: python check_fine_tune_status.py {job_id} --wait",
                3,
            )
        pause = min(pause * 1.3, LONGEST_PAUSE)
        time.sleep(min(max(wait, pause * random.uniform(0.8, 1.2)), left))  # jitter keeps many watchers apart


def may_pass(error) -> bool:
    """Tell a fault that may pass (network, 5xx, rate limit) from an answer that will stay the same."""
    code = getattr(error, "status_code", 500)
    return code >= 500 or code == 408 or (code == 429 and not out_of_credit(error))


def seconds_asked(error) -> float:
    """Return the seconds that the server asks to wait (Retry-After), else 0."""
    told = getattr(getattr(error, "response", None), "headers", {}).get("retry-after", "")
    return float(told) if told.isdigit() else 0.0


def time_left(job, events: list) -> float | None:
    """Return the seconds until the job ends, from the pace so far or else as the server estimates; None if unknown."""
    steps = [(metrics_of(event)["step"], event.created_at or 0) for event in events if metrics_of(event)]
    (first, start), (last, now) = steps[0], steps[-1]
    total = metrics_of(events[-1]).get("total_steps")
    if status_of(job) in ENDED or last == total:
        return None
    if total and last > first and now > start:
        return (total - last) * (now - start) / (last - first)
    return max(job.estimated_finish - time.time(), 0) if job.estimated_finish else None


def progress_line(figures: dict, left: float | None) -> str:
    """Return "step 12/60  loss 1.234  token accuracy 0.71  about 2 min left"."""
    line = f"step {figures['step']}/{figures.get('total_steps') or '?'}  loss {figures['train_loss']:.3f}"
    if figures.get("train_mean_token_accuracy") is not None:
        line += f"  token accuracy {figures['train_mean_token_accuracy']:.2f}"
    if math.isfinite(validation_loss(figures)):
        line += f"  validation loss {validation_loss(figures):.3f}"
    return line + (f"  about {duration(left)} left" if left else "")


def printers(stream) -> tuple:
    """Return (say, progress): on a terminal, lines of progress overwrite one another; elsewhere each is a line."""
    width = shutil.get_terminal_size().columns - 1 if stream.isatty() else 0
    wipe = "\r" + " " * width + "\r" if width else ""

    def say(line: str) -> None:
        print(wipe + line, file=stream, flush=True)

    def progress(line: str) -> None:
        print(wipe + (line[:width] if width else line), end="" if width else "\n", file=stream, flush=True)

    return say, progress


# Showing a job


def show(seen: dict, client, with_events: bool, named: str | None = None) -> None:
    """Print what describe() returned, aligned, and the next command; `named`: the job id that the reader gave."""
    rows = [("Job ID", seen["job_id"]), ("Status", seen["status"]), ("Model", seen["model"])]
    rows.append(("Created", moment(seen["created_at"])))
    if seen["finished_at"] and seen["created_at"]:
        took = duration(seen["finished_at"] - seen["created_at"])
        rows.append(("Finished", f"{moment(seen['finished_at'])} (after {took})"))
    rows.append(("Hyperparameters", ", ".join(f"{name} {value}" for name, value in seen["hyperparameters"].items())))
    if seen["trained_tokens"]:
        rows.append(("Trained tokens", f"{seen['trained_tokens']:,}{cost_note(seen)}"))
    for label, name in (
        ("Training loss", "train_loss"),
        ("Token accuracy", "train_mean_token_accuracy"),
        ("Validation loss", "valid_loss"),
    ):
        curve = [figures[name] for figures in seen["metrics"] if figures.get(name) is not None]
        if curve:
            rows.append((label, f"{curve[0]:.3f}" + f" {sparkline(curve)} {curve[-1]:.3f}" * (len(curve) > 1)))
    rows.append(("Fine-tuned model", seen["fine_tuned_model"]))
    for label, value in rows:
        if value:
            print(f"{label + ':':<18}{value}")
    if with_events and seen["events"]:
        print("\nEvents:")
        for event in seen["events"]:
            print(f"  {moment(event['created_at'])[11:]:8}  {event['message']}")
    if seen["checkpoints"]:
        print("\nCheckpoints:")
    for checkpoint in seen["checkpoints"]:
        loss = f"train_loss {checkpoint.get('train_loss', math.nan):.3f}"
        if math.isfinite(validation_loss(checkpoint)):
            loss += f"  valid_loss {validation_loss(checkpoint):.3f}"
        best = "  <- lowest validation loss" if checkpoint["model"] == seen["best_checkpoint"] else ""
        print(f"  step {checkpoint['step']:<5}  {loss}  {checkpoint['model']}{best}")
    if seen["overfitting"]:
        print(f"\n{seen['overfitting']}")
    print(f"\n{next_step(seen, client, named)}")


def next_step(seen: dict, client, named: str | None = None) -> str:
    """Return what to do now, with its command, which repeats the job id that the reader named."""
    job = f" {named}" if named else ""
    if seen["status"] == "succeeded":
        if deleted(client, seen["fine_tuned_model"]):
            return "The fine-tuned model was deleted.\nNext: python fine_tune.py --force trains a new one"
        host = urlsplit(str(client.base_url)).hostname or ""
        deploy = next((step for name, step in DEPLOY_FIRST.items() if host.endswith(name)), None)
        if not deploy and not seen["fine_tuned_model"]:
            deploy = "see in the server's documentation how the trained model is deployed"
        if deploy:
            return f"First {deploy}.\nNext: python use_fine_tuned_model.py NAME_OF_THE_DEPLOYMENT"
        best = f" {seen['best_checkpoint']}" if seen["overfitting"] and seen["best_checkpoint"] else job
        return f"Next: python use_fine_tuned_model.py{best}"
    if seen["status"] not in ENDED:
        return f"Next: python check_fine_tune_status.py{job} --wait"
    lines = ["Next: python fine_tune.py starts a new job"]
    if seen["error"]:
        lines.insert(0, "Error: {message} (code {code}, param {param})".format(**seen["error"]))
        lines.insert(1, ADVICE.get(seen["error"]["param"], ""))
    return "\n".join(line for line in lines if line)


def cost_note(seen: dict) -> str:
    """Return " ($0.06; the estimate was $0.07)", as far as prices are known."""
    if seen["cost"] is None:
        return ""
    estimate = f"; the estimate was ${seen['estimated_cost']:.2f}" if seen["estimated_cost"] else ""
    return f" (${seen['cost']:.2f}{estimate})" if seen["cost"] else " (free)"


def sparkline(values: list[float], width: int = 40) -> str:
    """Return the curve in at most `width` characters, each the mean of its share; "?" stands for no number."""
    try:
        blocks = "▁▂▃▄▅▆▇█"
        blocks.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        blocks = "_.-~=+*#"
    count = min(width, len(values))
    shares = [values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)]
    means = [sum(share) / len(share) for share in shares]
    finite = [mean for mean in means if math.isfinite(mean)] or [0.0]
    low, spread = min(finite), (max(finite) - min(finite)) or 1.0
    return "".join(blocks[round((mean - low) / spread * 7)] if math.isfinite(mean) else "?" for mean in means)


def moment(seconds: float | None) -> str:
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}" if seconds else "?"


def duration(seconds: float) -> str:
    """Return "45 s", "3 min", "2.5 h" or "4.1 days"."""
    for size, unit, digits in ((86400, "days", 1), (3600, "h", 1), (60, "min", 0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


def plot_svg(seen: dict) -> str:
    """Return a picture of the loss against the step: training, validation, and a dashed line at each epoch's end."""
    curves = {"training": [], "validation": []}  # type: dict[str, list[tuple[int, float]]]
    for figures in seen["metrics"]:
        for label, loss in (
            ("training", figures.get("train_loss", math.nan)),
            ("validation", validation_loss(figures)),
        ):
            if math.isfinite(loss):
                curves[label].append((figures["step"], loss))
    if not curves["training"]:
        raise StepError("There is no loss to draw yet.", 3)
    last_step = max(step for curve in curves.values() for step, _ in curve)
    highest = max(loss for curve in curves.values() for _, loss in curve)
    left, top, width, height = 60, 40, 620, 300  # of the drawing area, in pixels

    def x(step: float) -> float:
        return round(left + width * step / last_step, 1)

    def y(loss: float) -> float:
        return round(top + height * (1 - loss / (1.05 * highest)), 1)

    def text(at_x: float, at_y: float, words: str, style: str = 'text-anchor="middle"') -> str:
        return f'<text x="{at_x}" y="{at_y}" {style}>{escape(words)}</text>'

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 710 395" font-family="sans-serif" font-size="12">',
        '<rect width="710" height="395" fill="white"/>',
        text(left + width / 2, 20, f"{seen['job_id']}, {seen['model']}"),
        text(left + width / 2, 385, "step (dashed: end of an epoch)"),
        text(16, 25, "loss", ""),
    ]
    for tick in ticks(highest):
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y(tick)}" y2="{y(tick)}" stroke="#ddd"/>')
        parts.append(text(left - 8, y(tick) + 4, f"{tick:g}", 'text-anchor="end"'))
    parts += [text(x(tick), top + height + 18, f"{tick:g}") for tick in ticks(last_step) if tick == int(tick)]
    epochs = seen["hyperparameters"].get("n_epochs")
    for epoch in range(1, epochs + 1) if isinstance(epochs, int) else ():
        at = x(last_step * epoch / epochs)
        parts.append(f'<line x1="{at}" x2="{at}" y1="{top}" y2="{top + height}" stroke="#aaa" stroke-dasharray="4 4"/>')
    for row, (label, color) in enumerate((("training", "#1f77b4"), ("validation", "#d62728"))):
        if curves[label]:
            path = " ".join(f"{x(step)},{y(loss)}" for step, loss in curves[label])
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
            parts.append(text(left + width - 8, top + 16 + 16 * row, label, f'text-anchor="end" fill="{color}"'))
    return "\n".join([*parts, "</svg>", ""])


def ticks(largest: float) -> list[float]:
    """Return some five round numbers from 0 to `largest`: multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(largest / 5 or 1))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= largest / 5)
    return [round(number * step, 10) for number in range(int(largest / step) + 1)]


# Changing something on the server


def cancel(client, job_id: str) -> dict:
    """Cancel the job and return {"job_id", "status"}; StepError if it has already ended in another way."""
    import openai

    try:
        job = client.fine_tuning.jobs.cancel(job_id)
    except (openai.BadRequestError, openai.ConflictError):  # it has ended; perhaps by a request whose answer was lost
        job = client.fine_tuning.jobs.retrieve(job_id)
        if status_of(job) != "cancelled":
            raise StepError(f"Job {job_id} cannot be cancelled any more: it is {status_of(job)}.", 1) from None
    return {"job_id": job.id, "status": status_of(job)}


def clean_up(client, job_id: str, really: bool) -> dict:
    """Delete the job's files and model if `really`; return what became of them.

    Keys: job_id, and lists of ids: deleted, already_gone, would_delete (if not `really`), kept (another job reads it).
    """
    import openai

    job = client.fine_tuning.jobs.retrieve(job_id)
    if status_of(job) not in ENDED:
        raise StepError(f"Job {job_id} is {status_of(job)}: wait for its end, or stop it with --cancel {job_id}.")
    # fine_tune.py uploads the same bytes once, so another job may still be reading these files.
    jobs = itertools.islice(client.fine_tuning.jobs.list(limit=100), 1000)
    running = [other for other in jobs if other.id != job.id and status_of(other) not in ENDED]
    in_use = {file for other in running for file in (other.training_file, other.validation_file)}
    files = [file for file in (job.training_file, job.validation_file, *(job.result_files or [])) if file]
    deletions = [(client.files.delete, file) for file in files if file not in in_use]
    deletions += [(client.models.delete, job.fine_tuned_model)] if job.fine_tuned_model else []
    done: list[str] = []
    gone: list[str] = []
    for delete, name in deletions if really else []:
        try:
            delete(name)
            done.append(name)
        except openai.NotFoundError:
            gone.append(name)
    return {
        "job_id": job.id,
        "deleted": done,
        "already_gone": gone,
        "would_delete": [] if really else [name for _, name in deletions],
        "kept": [file for file in files if file in in_use],
    }


# The command line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Look at a fine-tuning job, or follow it to its end.")
    add = parser.add_argument
    add("job_id", nargs="?", help="default: the job in fine_tune_job.json")
    add("--wait", action="store_true", help="follow the job to its end")
    add("--timeout", type=float, metavar="SECONDS", help="with --wait: stop following after so long (exit code 3)")
    add("--plot", metavar="FILE.svg", help="draw the loss curve")
    add("--list", action="store_true", help="show all jobs, newest first")
    add("--limit", type=int, default=20, metavar="N", help="with --list: how many (default: %(default)s)")
    add("--cancel", metavar="JOB_ID", help="cancel a job")
    add("--clean-up", metavar="JOB_ID", help="show which files and model of a job would be deleted from the server")
    add("--yes", action="store_true", help="with --clean-up: delete them")
    add("--json", action="store_true", help="print one JSON document and nothing else")
    return parser


def run(args: argparse.Namespace) -> int:
    if args.list:
        jobs = list_jobs(args.limit)
        print_json(jobs) if args.json else print_table(jobs)
        return 0
    client = connect(REQUEST_TIMEOUT)
    with server_errors_explained(client):
        if args.cancel:
            done = cancel(client, args.cancel)
            print_json(done) if args.json else print("Job {job_id}: {status}".format(**done))
            return 0
        if args.clean_up:
            done = clean_up(client, args.clean_up, args.yes)
            print_json(done) if args.json else print_clean_up(done)
            return 0
        job_id = args.job_id or recorded_job(client)
        if args.wait:
            say, progress = printers(sys.stderr if args.json else sys.stdout)
            try:
                job, events = follow(client, job_id, args.timeout, say, progress)
            finally:
                progress("")  # the next line begins a line
        else:
            job = client.fine_tuning.jobs.retrieve(job_id)
            events = new_events(client, job_id, [])
        seen = describe(client, job, events)
    if args.json:
        print_json(seen)
    else:
        show(seen, client, with_events=not args.wait, named=args.job_id)
    if args.plot:
        try:
            Path(args.plot).write_text(plot_svg(seen), encoding="utf-8")
        except OSError as error:
            raise StepError(f"Cannot write {args.plot}: {error.strerror}.") from None
        print(f"Loss curve: {args.plot}", file=sys.stderr)
    return 1 if seen["status"] in ("failed", "cancelled") else 0


def print_json(document) -> None:
    document = json.loads(json.dumps(document), parse_constant=lambda word: None)  # JSON has no NaN: null
    print(json.dumps(document, indent=2, ensure_ascii=False))


def print_table(jobs: list[dict]) -> None:
    table = [["JOB ID", "STATUS", "MODEL", "AGE", "FINE-TUNED MODEL"]]
    for job in jobs:
        age = duration(time.time() - job["created_at"]) if job["created_at"] else "-"
        table.append([job["job_id"], job["status"], job["model"] or "-", age, job["fine_tuned_model"] or "-"])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_clean_up(done: dict) -> None:
    for label in ("deleted", "already_gone", "would_delete", "kept"):
        for name in done[label]:
            print(f"{label.replace('_', ' ')}: {name}" + " (another job is using it)" * (label == "kept"))
    if done["would_delete"]:
        print(f"\nNothing was deleted yet. Next: python check_fine_tune_status.py --clean-up {done['job_id']} --yes")


def main(argv: list[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    args = build_parser().parse_args(argv)
    try:
        return run(args)
    except StepError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(
            "\nStopped looking; the job goes on at the server. Follow it again with the same command.", file=sys.stderr
        )
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
