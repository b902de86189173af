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

With --json stdout is one JSON document: the job (see check_status), the list of jobs, or what was changed.

Exit codes: 0 succeeded, or not ended yet · 1 failed or cancelled · 2 usage or configuration · 3 --timeout has passed ·
4 server or network · 130 interrupted.
"""

from __future__ import annotations  # so that an older Python gets as far as a sentence

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
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit

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
    "training_file": "See what is wrong with: python prepare_training_data.py --check training_data.jsonl\n",
    "validation_file": "Judge it with: python prepare_training_data.py --check VALIDATION_FILE\n",
    "hyperparameters": "Choose other --n-epochs, --batch-size or --learning-rate-multiplier.\n",
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
CURVES = {  # a figure's name in the API, and here
    "train_loss": "Training loss",
    "train_mean_token_accuracy": "Token accuracy",
    "valid_loss": "Validation loss",
}


# --- identical in the four scripts that talk to a server; tests/test_scripts.py holds the copies equal ---
class StepError(Exception):
    """One sentence for the reader, and the exit code that goes with it."""

    def __init__(self, sentence: str, exit_code: int = 2):
        super().__init__(sentence)
        self.exit_code = exit_code


def server_settings() -> tuple[str, str]:
    """Return the API key and the base URL of the server that the environment or .env names."""
    from dotenv import load_dotenv

    load_dotenv()
    # A line end pasted with a key would come back in an error text of the HTTP library, key and all.
    api_key, base_url = (os.environ.get(name, "").strip() for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"))
    if not api_key and not base_url:
        raise StepError(
            "No server is configured: copy .env.example to .env to use the local API, "
            "or set OPENAI_API_KEY to use OpenAI."
        )
    if not (api_key.isascii() and api_key.isprintable()):
        raise StepError("OPENAI_API_KEY holds a character that no key has, such as a typographic dash: paste it again.")
    if base_url and not re.fullmatch(
        r"https?://(\[[0-9a-f:]+\]|[\w-]{1,63}(\.[\w-]{1,63})*\.?)(:\d{1,5})?(/\S*)?", base_url
    ):
        # Its value is not repeated: it may be the key, set in the wrong variable, or hold a password.
        raise StepError("OPENAI_BASE_URL is no address such as http://127.0.0.1:8321/v1.")
    return api_key or "not-needed", base_url.rstrip("/") or "https://api.openai.com/v1"


def same_server(one: str | None, other: str | None) -> bool:
    one, other = ((url or "").rstrip("/").replace("//localhost", "//127.0.0.1") for url in (one, other))
    return one == other


def connect(timeout: float = 600):
    """Return the SDK's client for that server; after `timeout` seconds without an answer a request counts as lost."""
    import openai  # imported here: it takes half a second that --help should not cost

    def refuse_what_is_no_answer(response):  # the SDK would hand on a bare string, a list or None
        content_type = response.headers.get("content-type", "") if response.is_success else ""
        fault = "a web page" if "html" in content_type else None  # from a proxy or a wrong address
        if "json" in content_type and not response.url.path.endswith("/content"):
            response.read()
            try:
                fault = None if isinstance(response.json(), dict) else "no JSON object"
            except ValueError as error:
                fault = str(error)
        if fault:
            raise openai.APIError(fault, response.request, body=None)

    api_key, base_url = server_settings()
    if base_url.startswith("http:") and not is_local(base_url):
        print(f"warning: plain http to {base_url}: your key can be read on the way.", file=sys.stderr)
    timeout = float(os.environ.get("FINE_TUNE_TIMEOUT", timeout))
    try:
        http_client = openai.DefaultHttpxClient(event_hooks={"response": [refuse_what_is_no_answer]})
        return openai.OpenAI(api_key=api_key, base_url=base_url, timeout=timeout, http_client=http_client)
    except Exception as error:  # of many classes, with texts that may hold a proxy's password
        fault = f"a value that cannot be used ({type(error).__name__})"
        raise StepError(f"OPENAI_BASE_URL, SSL_CERT_FILE or one of the *_PROXY variables has {fault}.") from None


def is_local(base_url: str) -> bool:
    return urlsplit(base_url).hostname in ("localhost", "127.0.0.1", "::1")


def out_of_credit(error) -> bool:
    """Tell a 429 that waiting does not cure (credit, spending limit) from one that asks to slow down."""
    return bool(re.search("insufficient_quota|credit|spend|usage_limit", f"{error.type} {error.code}"))


def clean(text) -> str:
    """Return the text in one line, with no key in it even where the server repeats it."""
    text, key = " ".join(str(text).split()), os.environ.get("OPENAI_API_KEY", "").strip()
    return text if len(key) < 16 else text.replace(key, "[key]")  # "local" is no secret


@contextmanager
def server_errors_explained(client):
    """Turn what the SDK raises inside the block into a StepError: the cause and the cure in one sentence."""
    import openai

    server = str(client.base_url).rstrip("/")

    try:
        yield
    except openai.APITimeoutError:
        raise StepError(f"{server} did not answer in time; run the same command again.", 4) from None
    except openai.APIConnectionError as error:
        cause = clean(error.__cause__ or error).rstrip(".")
        cure = "check the network and OPENAI_BASE_URL"
        if "CERTIFICATE" in cause.upper():
            cure = "its TLS certificate was not accepted; set SSL_CERT_FILE to your organisation's certificates"
        elif is_local(server):
            cure = "is the local API running? Start it in another terminal: python -m local_api"
        raise StepError(f"Cannot reach {server}: {cure} ({cause}).", 4) from None
    except openai.APIStatusError as error:
        code, said = error.status_code, error.body.get("message") if isinstance(error.body, dict) else None
        sentence = {
            401: "the key was not accepted; check OPENAI_API_KEY and that it belongs to this server",
            403: "this key may not do that",
            404: "no such model, job or file on this server; check the id and OPENAI_BASE_URL, which often ends in /v1",
            413: "the file is larger than this server accepts; split it or shorten it",
            429: "too many requests; wait a little and run the same command again",
        }.get(code, "the request was not accepted" if code < 500 else "the server failed; run the same command again")
        if code == 429 and out_of_credit(error):
            sentence = "no credit is left or a spending limit is reached, and waiting does not help; see your plan"
        exit_code = 4 if code == 429 or code >= 500 else 2
        raise StepError(
            f"{server} answered {code}: {sentence}. It said: {clean(said or error.message).rstrip('.')}.", exit_code
        ) from None
    except (openai.APIError, json.JSONDecodeError) as error:  # an error event in a stream, a body that is not JSON
        raise StepError(f"{server} sent an answer that cannot be read: {clean(error).rstrip('.')}.", 4) from None


def read_job_record(path: str = "fine_tune_job.json") -> dict:
    """Return what fine_tune.py recorded of its latest job, or {} if there is no record yet."""
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError):
        raise StepError(f"{path} is not readable JSON; move it away, or name the job or model yourself.") from None


# --- end of the identical part ---


# For other code


def check_status(job_id: str | None = None) -> dict:
    """Return what one look at the job (default: the recorded one) shows.

    Keys: job_id, status (one of STATUSES, or the server's own word), model, fine_tuned_model, created_at and
    finished_at (Unix seconds), hyperparameters, trained_tokens, cost and estimated_cost (USD), error ({code, message,
    param}), events ([{created_at, level, message}], oldest first), metrics ([{step, train_loss, ...}]), checkpoints
    ([{step, model, train_loss, ...}]), best_checkpoint (a model), overfitting (a sentence). What the server does not
    tell is None or empty. Raises StepError with the sentence for the reader.
    """
    client = connect(REQUEST_TIMEOUT)
    with server_errors_explained(client):
        job = client.fine_tuning.jobs.retrieve(job_id or recorded_job(client))
        return describe(client, job, new_events(client, job.id, []))


def list_jobs(limit: int = 20) -> list[dict]:
    """Return the newest jobs: [{job_id, status, model, created_at, fine_tuned_model}], newest first."""
    limit, client = max(limit, 1), connect(REQUEST_TIMEOUT)
    with server_errors_explained(client):
        # Iterating alone would follow the pages to the very first job: the API's `limit` is the size of a page.
        jobs = list(itertools.islice(client.fine_tuning.jobs.list(limit=min(limit, 100)), limit))
    rows = [
        {
            "job_id": job.id,
            "status": status_of(job),
            "model": job.model,
            "created_at": seconds_of(job.created_at),
            "fine_tuned_model": job.fine_tuned_model,
        }
        for job in jobs
    ]
    return sorted(rows, key=lambda row: row["created_at"] or 0, reverse=True)


def wait_for_training(job_id: str | None = None, timeout: float | None = None) -> str:
    """Follow the job (default: the recorded one) to its end, in silence, and return the fine-tuned model.

    Raises StepError if the job fails or is cancelled (exit code 1), or when `timeout` seconds have passed (3).
    """
    client = connect(REQUEST_TIMEOUT)
    with server_errors_explained(client):
        job, _ = follow(client, job_id or recorded_job(client), timeout)
    if status_of(job) != "succeeded":
        reason = (error_of(job) or {}).get("message") or "the server gives no reason"
        raise StepError(f"Job {job.id} {status_of(job)}: {reason.rstrip('.')}.", 1)
    if not job.fine_tuned_model:
        raise StepError(f"Job {job.id} succeeded, but the server names no fine-tuned model.", 3)
    return job.fine_tuned_model


def recorded_job(client) -> str:
    """Return the id of the job that fine_tune.py recorded, if it is on this server."""
    record, here = read_job_record(), str(client.base_url)
    if not record.get("job_id"):
        begun = "fine_tune.py has not finished here" if record else "There is no job yet"
        raise StepError(f"{begun}: run python fine_tune.py, name a job id, or see all jobs with --list.")
    there = record.get("base_url", here)
    if not same_server(there, here):
        sentence = f"The recorded job {record['job_id']} is on {there}, but OPENAI_BASE_URL is {here}"
        raise StepError(f"{sentence}: set it back, or name a job id.")
    return record["job_id"]


# Reading a job, on any server


def status_of(job) -> str:
    """Return the job's status in OpenAI's words, or the server's own word where it is not in the table."""
    word = str(job.status)
    return next((ours for ours, words in STATUSES.items() if word.lower().replace(" ", "_") in words.split()), word)


def seconds_of(value) -> int | None:
    """Return a time in Unix seconds, which some servers send in milliseconds or as ISO 8601 text; None if unknown."""
    with suppress(TypeError, ValueError, OverflowError):
        if isinstance(value, str) and not value.isdigit():
            value = datetime.fromisoformat(value.replace("Z", "+00:00")).timestamp()
        return int(value) if int(value) < 1e11 else int(value) // 1000
    return None


def error_of(job) -> dict | None:
    """Return {"code", "message", "param"}; None for the empty error {} that some servers give a healthy job."""
    error = {name: getattr(job.error, name, None) for name in ("code", "message", "param")}
    return {name: value and clean(value) for name, value in error.items()} if any(error.values()) else None


@contextmanager
def unless_missing(*codes: int):
    """Pass over the error of a server that has no such endpoint, or answers with one of the codes."""
    import openai

    try:
        yield
    except openai.APIStatusError as error:
        if error.status_code not in (400, 404, 405, 501, *codes):
            raise


def new_events(client, job_id: str, old: list) -> list:
    """Return the events that are not among the old ones, oldest first; pages are fetched only as far as needed."""
    seen = {key_of(event) for event in old}
    listed: dict = {}
    newest_first = True  # so does the API; not every server
    with unless_missing():
        page = client.fine_tuning.jobs.list_events(job_id, limit=100)
        while True:
            events = page.data or []
            for event in events:
                event.created_at, event.message = seconds_of(event.created_at), clean(event.message or "")
            if events:
                newest_first = (events[0].created_at or 0) >= (events[-1].created_at or 0)
            keys, before = {key_of(event) for event in events}, len(listed)
            listed.update((key_of(event), event) for event in events)
            known = len(listed) == before or (newest_first and keys & seen)
            if known or not page.has_next_page():
                break
            page = page.get_next_page()
    fresh = [event for key, event in listed.items() if key not in seen]
    return sorted(reversed(fresh) if newest_first else fresh, key=lambda event: event.created_at or 0)


def key_of(event):
    return event.id or (event.created_at, event.message)


def figures_of(event) -> dict:
    """Return an event's figures, {step, total_steps, train_loss, ...}, or {} if it is not about a step."""
    figures = numbers(event.data if isinstance(event.data, dict) else {})
    return figures if "step" in figures and "train_loss" in figures else {}


def numbers(fields: dict) -> dict:
    """Return what is a number in the fields, as a number: servers send null, and the NaN of a run that diverged."""
    found = {}
    for name, value in fields.items():
        with suppress(TypeError, ValueError):
            if math.isfinite(float(value)):
                found[name] = int(float(value)) if name.endswith(("step", "steps")) else float(value)
    return found


def result_rows(client, job) -> list[dict]:
    """Return the rows of the job's result file, [] if there is none; OpenAI sends the CSV in Base64, others plain."""
    # There may be none, or it is deleted, not ours to read, or a file of another kind.
    with unless_missing(403), suppress(ValueError, TypeError, IndexError, csv.Error):
        content = client.files.content(job.result_files[0]).content
        text = (content if content.startswith(b"step,") else base64.b64decode(content)).decode()
        rows = csv.DictReader(io.StringIO(text.replace("train_accuracy", "train_mean_token_accuracy", 1)))
        return [row for row in map(numbers, rows) if "step" in row]
    return []


def checkpoints_of(client, job) -> list[dict]:
    """Return the job's checkpoints, by step: [{step, model, train_loss, ...}]; [] where the server has none."""
    checkpoints = []
    with unless_missing():
        for checkpoint in client.fine_tuning.jobs.checkpoints.list(job.id, limit=50).data or []:
            names = {"step": checkpoint.step_number or 0, "model": checkpoint.fine_tuned_model_checkpoint}
            checkpoints.append({**numbers(dict(checkpoint.metrics or {})), **names})
    return sorted(checkpoints, key=lambda checkpoint: checkpoint["step"])


def validation_loss(figures: dict) -> float:
    """Return the loss over the whole validation file where there is one, else over the tried batch; 0 if neither."""
    return figures.get("full_valid_loss") or figures.get("valid_loss") or 0.0


def describe(client, job, events: list) -> dict:
    """Return all that is known of the job, in the form that check_status documents."""
    record, status = {}, status_of(job)
    with suppress(StepError):  # one that cannot be read holds nothing about a job that was named
        record = read_job_record()
    metrics = sorted(filter(None, map(figures_of, events)), key=lambda figures: figures["step"])
    checkpoints: list[dict] = []
    if status == "succeeded":
        metrics = max(metrics, result_rows(client, job), key=len)
        checkpoints = checkpoints_of(client, job)
    whole = [figures for figures in metrics if "full_valid_loss" in figures]  # the others are of a batch each
    validated = [figures for figures in checkpoints if validation_loss(figures)]
    validated = validated or [figures for figures in whole or metrics if validation_loss(figures)]
    best = min(validated, key=validation_loss, default={})
    overfitting = None
    if validated and validation_loss(validated[-1]) > OVERFIT * validation_loss(best):
        overfitting = (
            f"Over-fitting: the validation loss was lowest at step {best['step']} ({validation_loss(best):.3f}) "
            f"and has risen to {validation_loss(validated[-1]):.3f} since."
        )
    asked = job.hyperparameters or getattr(job.method and job.method.supervised, "hyperparameters", None)
    told = [event for event in events if not figures_of(event)]
    names = ("model", "fine_tuned_model", "trained_tokens")
    return {
        "job_id": job.id,
        "status": status,
        **{name: getattr(job, name) for name in names},
        **{name: seconds_of(getattr(job, name)) for name in ("created_at", "finished_at")},
        "hyperparameters": {name: value for name, value in dict(asked or {}).items() if value is not None},
        "cost": training_cost(job),
        "estimated_cost": record.get("estimated_cost") if record.get("job_id") == job.id else None,
        "error": error_of(job),
        "events": [{name: getattr(event, name) for name in ("created_at", "level", "message")} for event in told],
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


def follow(client, job_id: str, timeout: float | None = None, say=lambda line, moving=False: None) -> tuple:
    """Return (job, events) when the job has ended; `say` gets each line, `moving` if the next one may replace it."""
    deadline = time.monotonic() + (math.inf if timeout is None else timeout)
    status, news, pause = None, time.monotonic(), FIRST_PAUSE
    events: list = []
    while True:
        left = deadline - time.monotonic()
        job, fresh = ask(client, job_id, events, say, patience=min(FAULT_PATIENCE, left) if status else 0)
        for event in fresh:
            events.append(event)
            if figures_of(event):
                say(progress_line(job, events), moving=True)
            else:
                say(f"{moment(event.created_at)[11:]:8}  {event.message}")
        if status != job.status:
            say(status_of(job), moving=True)
            if status_of(job) not in STATUSES:
                say(f"{job.status!r} is no status known here; waiting on.")
        if status_of(job) in ENDED:
            return job, events
        now = time.monotonic()
        if now >= deadline:
            raise StepError(
                f"Job {job_id} has not ended after {duration(timeout or 0)}; it goes on at the server. "
                f"Follow it again with: python check_fine_tune_status.py {job_id} --wait",
                3,
            )
        if fresh or status != job.status:
            status, news, pause = job.status, now, FIRST_PAUSE
        elif now - news > SILENCE:
            say(f"No news from the job for {duration(SILENCE)}; the server last called it {status}.")
            news = now
        pause = min(pause * 1.3, LONGEST_PAUSE)
        time.sleep(min(pause * random.uniform(0.8, 1.2), deadline - now))  # jitter keeps many watchers apart


def ask(client, job_id: str, events: list, say, patience: float) -> tuple:
    """Return (job, events that are new); a fault that may pass is said, and waited out for `patience` seconds."""
    import openai

    deadline, faults = time.monotonic() + patience, 0
    if patience:  # the first look has none, and is as patient as the SDK
        client = client.with_options(max_retries=0)
    while True:
        try:
            answer = client.fine_tuning.jobs.retrieve(job_id), new_events(client, job_id, events)
        except (openai.APIError, json.JSONDecodeError) as error:
            code = getattr(error, "status_code", 500)
            may_pass = code >= 500 or code == 408 or (code == 429 and not out_of_credit(error))
            left = deadline - time.monotonic()
            if not may_pass or left < 0:
                raise
            told = getattr(getattr(error, "response", None), "headers", {}).get("retry-after", "")
            pause = float(told) if told.isdigit() else LONGEST_PAUSE
            faults += 1
            if faults == 1 or pause > LONGEST_PAUSE:
                say(f"No answer from the server ({type(error).__name__}); asking again in {pause:.0f} s.")
            time.sleep(min(pause, left))
        else:
            if faults:
                say("The server answers again.")
            return answer


def progress_line(job, events: list) -> str:
    """Return "step 12/60  loss 1.234  token accuracy 0.71  about 2 min left" for the last of the events."""
    figures, total = figures_of(events[-1]), figures_of(events[-1]).get("total_steps")
    line = f"step {figures['step']}/{total or '?'}  loss {figures['train_loss']:.3f}"
    if "train_mean_token_accuracy" in figures:
        line += f"  token accuracy {figures['train_mean_token_accuracy']:.2f}"
    if validation_loss(figures):
        line += f"  validation loss {validation_loss(figures):.3f}"
    first = next(event for event in events if figures_of(event))
    steps, seconds = figures["step"] - figures_of(first)["step"], (events[-1].created_at or 0) - (first.created_at or 0)
    left = (seconds_of(job.estimated_finish) or 0) - time.time()
    if total and steps > 0 and seconds > 0:
        left = (total - figures["step"]) * seconds / steps  # the pace so far says it better than the server
    return line + (f"  about {duration(left)} left" if left > 0 and status_of(job) not in ENDED else "")


def printer(stream):
    """Return the `say` of follow(): on a terminal, a moving line is overwritten by the next one."""
    width = shutil.get_terminal_size().columns - 1 if stream.isatty() else 0

    def say(line: str, moving: bool = False) -> None:
        moving = moving and width > 0
        wipe = "\r" + " " * width + "\r" if width else ""
        print(wipe + (line[:width] if moving else line), end="" if moving else "\n", file=stream, flush=True)

    return say


# Showing a job


def show(seen: dict, client, named: str | None) -> None:
    """Print what describe() returned, aligned, and the next command; `named`: the job id that the reader gave."""
    rows = {"Job ID": seen["job_id"], "Status": seen["status"], "Model": seen["model"]}
    rows["Created"] = moment(seen["created_at"])
    if seen["finished_at"] and seen["created_at"]:
        took = duration(seen["finished_at"] - seen["created_at"])
        rows["Finished"] = f"{moment(seen['finished_at'])} (after {took})"
    rows["Hyperparameters"] = ", ".join(f"{name} {value}" for name, value in seen["hyperparameters"].items())
    if seen["trained_tokens"]:
        rows["Trained tokens"] = f"{seen['trained_tokens']:,}{cost_note(seen)}"
    for name, label in CURVES.items():
        curve = [figures[name] for figures in seen["metrics"] if name in figures]
        if curve:
            rows[label] = f"{curve[0]:.3f} {sparkline(curve)} {curve[-1]:.3f}"
    rows["Fine-tuned model"] = seen["fine_tuned_model"]
    for label, value in rows.items():
        if value:
            print(f"{label + ':':<18}{value}")
    if seen["checkpoints"]:
        print("\nCheckpoints:")
    for checkpoint in seen["checkpoints"]:
        losses = f"train_loss {checkpoint.get('train_loss', math.nan):.3f}"
        if validation_loss(checkpoint):
            losses += f"  valid_loss {validation_loss(checkpoint):.3f}"
        best = "  <- lowest validation loss" if checkpoint["model"] == (seen["best_checkpoint"] or "none") else ""
        print(f"  step {checkpoint['step']:<5}  {losses}  {checkpoint['model']}{best}")
    if seen["overfitting"]:
        print(f"\n{seen['overfitting']}")
    print(f"\n{next_step(seen, client, named)}")


def next_step(seen: dict, client, named: str | None = None) -> str:
    """Return what to do now, with its command, which repeats the job id that the reader named."""
    job = f" {named}" if named else ""
    if seen["status"] not in ENDED:
        return f"Next: python check_fine_tune_status.py{job} --wait"
    if seen["status"] != "succeeded":
        error = seen["error"] or {"param": None}
        cause = "Error: {message} (code {code}, param {param})\n".format(**error) if seen["error"] else ""
        return f"{cause}{ADVICE.get(error['param'], '')}Next: python fine_tune.py starts a new job"
    host = urlsplit(str(client.base_url)).hostname or ""
    deploy = next((step for name, step in DEPLOY_FIRST.items() if host.endswith(name)), None)
    if not deploy and not seen["fine_tuned_model"]:
        deploy = "see in the server's documentation how the trained model is deployed"
    if deploy:
        return f"First {deploy}.\nNext: python use_fine_tuned_model.py NAME_OF_THE_DEPLOYMENT"
    best = f" {seen['best_checkpoint']}" if seen["overfitting"] and seen["best_checkpoint"] else job
    return f"Next: python use_fine_tuned_model.py{best}"


def cost_note(seen: dict) -> str:
    """Return " ($0.06; the estimate was $0.07)", as far as prices are known."""
    if not seen["cost"]:
        return "" if seen["cost"] is None else " (free)"
    estimate = f"; the estimate was ${seen['estimated_cost']:.2f}" if seen["estimated_cost"] else ""
    return f" (${seen['cost']:.2f}{estimate})"


def sparkline(values: list[float], width: int = 40) -> str:
    """Return the curve in at most `width` characters, each the mean of its share of the values."""
    count = min(width, len(values))
    shares = [values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)]
    means = [sum(share) / len(share) for share in shares]
    low, spread = min(means), (max(means) - min(means)) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[round((mean - low) / spread * 7)] for mean in means)


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
    training = [(row["step"], row["train_loss"]) for row in seen["metrics"] if "train_loss" in row]
    validation = [(row["step"], validation_loss(row)) for row in seen["metrics"] if validation_loss(row)]
    if not training:
        raise StepError("There is no loss to draw yet.", 3)
    last_step = max(step for step, _ in training) or 1
    highest = max(max(loss for _, loss in training + validation), 0.0) or 1.0

    def x(step: float) -> float:
        return round(60 + 620 * step / last_step, 1)

    def y(loss: float) -> float:
        return round(340 - 300 * max(loss, 0.0) / highest, 1)

    def curve(points: list, label: str, color: str, label_y: int) -> str:
        path = " ".join(f"{x(step)},{y(loss)}" for step, loss in points)
        line = f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>'
        return line + f'<text x="672" y="{label_y}" text-anchor="end" fill="{color}">{label}</text>' if points else ""

    epochs = seen["hyperparameters"].get("n_epochs")
    epoch_ends = [x(last_step * end / epochs) for end in range(1, epochs + 1)] if isinstance(epochs, int) else []
    steps = [tick for tick in ticks(last_step) if tick % 1 == 0]
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 710 395" font-family="sans-serif" font-size="12">',
        '<rect width="710" height="395" fill="white"/>',
        f'<text x="370" y="20" text-anchor="middle">loss of {seen["job_id"]}</text>',
        '<text x="370" y="380" text-anchor="middle">step (dashed: the end of an epoch)</text>',
        *(f'<line x1="60" x2="680" y1="{y(tick)}" y2="{y(tick)}" stroke="#ddd"/>' for tick in ticks(highest)),
        *(f'<text x="52" y="{y(tick) + 4}" text-anchor="end">{tick:g}</text>' for tick in ticks(highest)),
        *(f'<text x="{x(tick)}" y="358" text-anchor="middle">{tick:g}</text>' for tick in steps),
        *(f'<line x1="{at}" x2="{at}" y1="40" y2="340" stroke="#aaa" stroke-dasharray="4"/>' for at in epoch_ends),
        curve(training, "training", "#1f77b4", 56),
        curve(validation, "validation", "#d62728", 72),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


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
    """Delete the job's files and model if `really`; return {"job_id", "deleted": [id], "would_delete": [id]}."""
    import openai

    job = client.fine_tuning.jobs.retrieve(job_id)
    uploads = [file for file in (job.training_file, job.validation_file) if file]
    # fine_tune.py uploads the same bytes once, so another job may still be reading these files.
    for other in itertools.islice(client.fine_tuning.jobs.list(limit=100), 1000):
        if status_of(other) not in ENDED and {other.training_file, other.validation_file} & {*uploads}:
            raise StepError(f"Job {other.id} is {status_of(other)} and needs these files: let it end, or cancel it.")
    deletions = [(client.files.delete, file) for file in [*uploads, *(job.result_files or [])]]
    deletions += [(client.models.delete, job.fine_tuned_model)] if job.fine_tuned_model else []
    for delete, name in deletions if really else []:
        with suppress(openai.NotFoundError):  # gone already, as was asked for
            delete(name)
    names = [name for _, name in deletions]
    return {"job_id": job.id, "deleted": names if really else [], "would_delete": [] if really else names}


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
            print_json(done) if args.json else print(f"Job {done['job_id']}: {done['status']}")
            return 0
        if args.clean_up:
            done = clean_up(client, args.clean_up, args.yes)
            print_json(done) if args.json else print_clean_up(done)
            return 0
        job_id = args.job_id or recorded_job(client)
        if args.wait:
            say = printer(sys.stderr if args.json else sys.stdout)
            try:
                job, events = follow(client, job_id, args.timeout, say)
            finally:
                say("", moving=True)  # the next line begins a line
        else:
            job = client.fine_tuning.jobs.retrieve(job_id)
            events = new_events(client, job_id, [])
        seen = describe(client, job, events)
        print_json(seen) if args.json else show(seen, client, args.job_id)
    if args.plot:
        try:
            Path(args.plot).write_text(plot_svg(seen), encoding="utf-8")
        except OSError as error:
            raise StepError(f"Cannot write {args.plot}: {error.strerror}.") from None
        print(f"Loss curve: {args.plot}", file=sys.stderr)
    return 1 if seen["status"] in ("failed", "cancelled") else 0


def print_json(document) -> None:
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
    print(*done["deleted"] or done["would_delete"], sep="\n")
    if done["deleted"]:
        return print("\nDeleted from the server.")
    print(f"\nWould be deleted. Next: python check_fine_tune_status.py --clean-up {done['job_id']} --yes")


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character shows "?"
            stream.reconfigure(errors="replace")
    try:
        exit_code = run(args)
        sys.stdout.flush()  # what is still to be written fails here or nowhere
        return exit_code
    except StepError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        cure = "activate the virtual environment (Python 3.10 or newer), or python -m pip install -r requirements.txt"
        print(f"{error.name} is missing here: {cure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped looking; the job goes on at the server. To go on: the same command again.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
