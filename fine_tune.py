"""Step 2: upload the training file and create one fine-tuning job, exactly one.

Needs   training_data.jsonl (step 1) and a server: the local API (copy .env.example to .env, run `python -m local_api`)
        or any other that speaks OpenAI's API (OPENAI_API_KEY, OPENAI_BASE_URL).
Leaves  fine_tune_job.json, which steps 3 to 5 read; the record of an earlier job moves to fine_tune_jobs/.
Omits   waiting for the training (step 3), methods other than supervised fine-tuning, and a lock: run it once at a time.

A job costs money, and the SDK repeats a request whose answer is lost with nothing that lets the server tell it from a
second order. So this script writes down what it is about to send, sends it once, and when no answer comes looks on the
server for what the request has made: exactly_once() and settle(). Wherever it is killed and whatever the server does,
run the same command again and it goes on from where it was. Same bytes, options and server: same job.

    python fine_tune.py
    python fine_tune.py my_data.jsonl --suffix my-bot --n-epochs 3
    python fine_tune.py --dry-run                     # check the file, estimate the cost, send nothing
    JOB=$(python fine_tune.py --quiet)                # stdout is the job id alone
    python fine_tune.py --extra '{"trainingType": "GlobalStandard"}'     # what Azure needs besides

Exit codes: 0 the job exists · 1 the data is not fit to train on · 2 usage or configuration · 4 server or network ·
130 interrupted.
"""

from __future__ import annotations  # so that an older Python gets as far as a sentence

import argparse
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
import time
import uuid
from contextlib import contextmanager, redirect_stdout
from datetime import date
from pathlib import Path
from urllib.parse import urlsplit

TRAINING_FILE = "training_data.jsonl"
RECORD = "fine_tune_job.json"
OLD_RECORDS = Path("fine_tune_jobs")
DEFAULT_MODEL = "gpt-4.1-mini-2025-04-14"  # the cheapest that OpenAI still fine-tunes, until 2027-01-06
MAX_COST = 5.00  # USD
ROLES = ("training_file", "validation_file")
RECORD_KEYS = {
    *("token", "base_url", "forced", "unanswered", "job_id", "model", "suffix", "seed", "hyperparameters", "extra"),
    *(role + key for role in ROLES for key in ("", "_sha256")),
    *("training_file_path", "training_file_name"),
}
TOKEN = "fine_tune_token"  # the key in a job's metadata by which the job is known again
REQUEST_TIMEOUT = 60.0  # seconds; a request that has not been carried out by then never will be
CLOCK_SKEW = 300  # seconds by which the server's clock may differ from ours
FILE_WAIT = 120  # seconds; some servers never call a file processed and create the job all the same
RATE_LIMIT_WAIT = 120  # seconds; a rate limit that asks for more ends the run, which can be repeated then
RETRIES = 4
MISSING = (404, 405, 501)  # what servers answer where there is no such thing, or no such endpoint
FILE_UNFIT = {"error", "failed", "invalid_format", "deleted"}
FILE_IN_WORK = {"uploaded", "uploading", "pending", "running", "processing", "queued", "validating"}
JOB_DEAD = {"failed", "cancelled", "canceled", "error", "user_error", "failed_validation"}


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


def start_fine_tuning(
    training_file: str = TRAINING_FILE,
    model: str | None = None,
    suffix: str | None = None,
    validation_file: str | None = None,
    seed: int | None = None,
    extra: dict | None = None,
    max_cost: float = MAX_COST,
    dry_run: bool = False,
    force: bool = False,
    **hyperparameters: float | None,
) -> str:
    """Return the id of the job for these files, these options and this server: found, or created now.

    hyperparameters: n_epochs, batch_size, learning_rate_multiplier. extra: merged into the request. max_cost: in USD.
    dry_run: check and estimate only, and return "". force: a new upload and a new job in any case.
    Raises StepError with the sentence for the reader.
    """
    hyperparameters = {name: value for name, value in hyperparameters.items() if value is not None}  # no "auto" is sent
    if {"model", *ROLES} & (extra or {}).keys() or '"n_epochs"' in json.dumps(extra):
        names = ", ".join(("model", *ROLES))
        raise StepError(f"--extra may hold no {names} or n_epochs: they have options of their own, which are checked.")
    if not all(value and 0 < value < math.inf for value in hyperparameters.values()):
        raise StepError("--n-epochs, --batch-size and --learning-rate-multiplier must be numbers above 0.")
    client = connect(REQUEST_TIMEOUT).with_options(max_retries=0)  # what may be sent twice is decided here
    paths = {role: path for role, path in zip(ROLES, (training_file, validation_file), strict=True) if path}
    contents = {role: read_file(path) for role, path in paths.items()}
    wanted: dict = {  # two runs that agree in all of this want the same job
        "model": model or os.environ.get("FINE_TUNE_MODEL") or DEFAULT_MODEL,
        "suffix": suffix,
        "seed": seed,
        "hyperparameters": hyperparameters,
        "extra": extra or {},
        "validation_file_sha256": None,
        **{f"{role}_sha256": hashlib.sha256(content).hexdigest() for role, content in contents.items()},
    }
    with server_errors_explained(client):
        records = [] if dry_run else records_on(client)
        unfinished = {begun["token"] for begun in records if not (begun["job_id"] and begun.get("reported", True))}
        for begun in records:
            settle(client, begun, force)
        record = next((begun for begun in records if fits(begun, wanted, force, unfinished)), None)
        job = living_job(client, record["job_id"]) if record else None
        if record and job:
            say("This job exists already: same bytes, options and server. (--force starts a new one.)")
        else:
            found = check_before_spending(client, wanted, paths, max_cost)
            warn_of_shutdown(client, wanted["model"])
            if dry_run:
                say("Dry run: nothing was sent.")
                return ""
            if not record or record["job_id"]:
                record = new_record(client, {**wanted, **found, "forced": force}, paths, records)
            job = create_job(client, record, contents)
    say(f"\nJob ID: {job.id}\nModel: {job.model or wanted['model']}\nStatus: {job.status}")
    write_record({**record, "reported": True})  # until then a repeated --force means this job, not one more
    return job.id


def create_job(client, record: dict, contents: dict):
    """Bring the files to the server, create the job that the record describes, and return it."""
    write_record(record)
    say(f"[1/3] Uploading training file: {record['training_file_path']}")
    for role in contents:
        upload(client, record, role, contents[role])
    say("\n[2/3] Waiting for file to be processed...")
    for role in contents:
        wait_for_file(client, record, role)
    say("✓ File processed successfully!\n\n[3/3] Creating fine-tuning job...")
    job = request_job(client, record)
    say("✓ Fine-tuning job created successfully!")
    return job


class FineTuner:
    """Steps 2 and 3 in one object, for other code."""

    create_job = staticmethod(start_fine_tuning)

    @staticmethod
    def monitor_progress(job_id: str | None = None) -> str:
        """Follow the job (default: the one created last) to its end and return the fine-tuned model."""
        from check_fine_tune_status import wait_for_training

        return wait_for_training(job_id)


# Exactly once: an upload and the creation of a job both go through here.


def exactly_once(client, record: dict, what: str, send):
    """Send a request that must not be carried out twice, and return what it made; `what`: "job_id" or one of ROLES.

    The record is on disk before the request is sent. So wherever the process is killed, what was sent stands there
    under "unanswered", and the next run looks for it on the server (settle) before it sends anything.
    """

    def attempt():
        record["unanswered"][what] = time.time()
        write_record(record)
        return send()

    try:
        made = patiently(attempt, repeat_when_lost=False)
        if not made.id:
            raise json.JSONDecodeError("an answer without an id", "", 0)
    except Exception as error:
        status = getattr(error, "status_code", 500)
        if status < 500 and status != 408:  # refused, and so not carried out
            answered(record, what, None)
            raise
        note(f"The answer with the {what} was lost; looking whether the request was carried out.")
        made = find(client, record, what)
        if not made:
            raise  # it may still appear: the next run waits until it cannot any more
    return answered(record, what, made)


def answered(record: dict, what: str, made):
    record[what] = made and made.id
    del record["unanswered"][what]
    write_record(record)
    return made


def settle(client, record: dict, force: bool) -> None:
    """Learn what has become of the requests that an earlier run sent without reading the answer."""
    for what, sent in list(record["unanswered"].items()):
        note(f"An earlier run requested a {what} and did not read the answer; looking for it on the server.")
        try:
            made = find(client, record, what)
            seconds = min(sent - time.time(), 0) + float(client.timeout)
            if not made and seconds > 0:
                note(f"It is not there; it may still come for {seconds:.0f} s, waiting.")
                time.sleep(seconds)
                made = find(client, record, what)
        except StepError:  # it cannot be looked up, which --force knows
            if not force:
                raise
            made = None
        if answered(record, what, made):
            note(f"The request was carried out: {made.id}")


def find(client, record: dict, what: str):
    """Return what an unanswered request has made on the server, None if nothing of the kind is there."""
    import openai

    try:
        if what == "job_id":
            return patiently(lambda: find_job(client, record))
        files = patiently(lambda: list_files(client))
        old = {other[what] for other in records_on(client)} if record["forced"] else set()  # --force wants a new one
        return next((file for file in files if file.filename == record[f"{what}_name"] and file.id not in old), None)
    except openai.APIStatusError as error:
        if error.status_code not in MISSING:
            raise
        raise StepError(
            f"{record['base_url']} lists no {'jobs' if what == 'job_id' else 'files'}, and an answer was lost: "
            "look there yourself whether the request was carried out; to start anew: --force."
        ) from None


def list_files(client) -> list:
    return list(itertools.islice(client.files.list(purpose="fine-tune", limit=100), 1000))


def list_jobs(client) -> list:
    return list(itertools.islice(client.fine_tuning.jobs.list(limit=100), 1000))


def patiently(request, repeat_when_lost: bool = True):
    """Return what the request returns; wait, visibly, when the server asks to, and repeat what is safe to repeat.

    A request refused with 429 was not carried out and may be sent again; one whose answer was lost only if it reads.
    """
    import openai

    for attempt in range(RETRIES + 1):
        pause = 0.5 * 2**attempt
        try:
            return request()
        except openai.RateLimitError as error:
            told = error.response.headers.get("retry-after", "")
            pause = float(told) if re.fullmatch(r"[0-9]+(\.[0-9]+)?", told) else pause
            if out_of_credit(error) or attempt == RETRIES or pause > RATE_LIMIT_WAIT:
                raise
            note(f"The server asks to slow down; waiting {pause:.0f} s.")
        except (openai.APIConnectionError, openai.InternalServerError) as error:
            if not repeat_when_lost or attempt == RETRIES or getattr(error, "status_code", 500) in MISSING:
                raise
        time.sleep(pause)


def unless_gone(request):
    """Return what the request returns, None if the server answers that there is no such thing."""
    import openai

    try:
        return patiently(request)
    except openai.APIStatusError as error:
        if error.status_code not in MISSING:
            raise
        return None


# The files


def upload(client, record: dict, role: str, content: bytes) -> None:
    """Bring the file to the server, unless it has it already."""
    if record[role] and on_server(client, record[role]):
        say("✓ The server has this file already: same bytes, so it is not sent again.")
    else:
        file = (record[f"{role}_name"], content)
        exactly_once(client, record, role, lambda: client.files.create(file=file, purpose="fine-tune"))
        say("✓ File uploaded successfully!")
    say(f"  {'File ID' if role == 'training_file' else 'Validation file ID'}: {record[role]}")


def on_server(client, file_id: str) -> bool:
    """Tell whether the server has the file: some list what they do not let retrieve."""
    files = unless_gone(lambda: [client.files.retrieve(file_id)]) or unless_gone(lambda: list_files(client)) or []
    return any(file.id == file_id for file in files)


def wait_for_file(client, record: dict, role: str) -> None:
    """Wait until the server has looked through the file; StepError if it found it unfit."""
    deadline = time.monotonic() + FILE_WAIT
    while True:
        file = unless_gone(lambda: client.files.retrieve(record[role]))
        status = str(getattr(file, "status", None) or "processed").lower()  # not every server has a status
        if status in FILE_UNFIT:
            details = clean(file.status_details or "it gives no details").rstrip(".")
            raise StepError(f"The server found {record[f'{role}_path']} unfit ({record[role]}): {details}.", 1)
        if status not in FILE_IN_WORK:
            return
        if time.monotonic() > deadline:
            return note(f"After {FILE_WAIT:.0f} s the server still calls the file {status!r}; going on.")
        time.sleep(1.0)


# The job


def request_job(client, record: dict):
    import openai

    # OpenAI calls the top-level `hyperparameters` deprecated, but it is what every other server reads.
    names = ("suffix", "seed", "hyperparameters", "validation_file")
    request = {name: record[name] for name in names if record[name] not in (None, {})}
    for name, value in record["extra"].items():
        request[name] = {**request[name], **value} if isinstance(request.get(name), dict) else value
    request["metadata"] = {**request.get("metadata", {}), TOKEN: record["token"]}

    def send():
        model, file = record["model"], record["training_file"]
        try:
            return client.fine_tuning.jobs.create(model=model, training_file=file, extra_body=request)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if request.get("metadata", {}).keys() != {TOKEN} or "metadata" not in str(error.body):
                raise
            del request["metadata"]  # a server without metadata; find_job then goes by file, model and time
            record["unanswered"]["job_id"] = time.time()
            write_record(record)
            return send()

    try:
        return exactly_once(client, record, "job_id", send)
    except openai.PermissionDeniedError as error:
        if error.code != "training_not_available":
            raise
        in_use = {other[role] for other in records_on(client) if other["job_id"] for role in ROLES}
        for orphan in {record[role] for role in ROLES} - in_use - {None}:
            unless_gone(lambda orphan=orphan: client.files.delete(orphan))
            note(f"The uploaded file {orphan} was deleted from the server again.")
        raise StepError(
            f"{record['base_url']} creates no fine-tuning jobs for your organisation any more: OpenAI has been closing "
            "self-serve fine-tuning since 2026-05-07. Models you have fine-tuned answer until their base model stops. "
            "To go on, copy .env.example to .env (the local API), or set OPENAI_BASE_URL to another server."
        ) from None


def find_job(client, record: dict):
    """Return the job with the record's token or, where the server keeps no metadata, the one that must be it."""
    jobs = list_jobs(client)
    tokens = {(job.metadata or {}).get(TOKEN): job for job in jobs}
    others = {other["job_id"] for other in records_on(client)}
    earliest = record["unanswered"]["job_id"] - CLOCK_SKEW

    def must_be_it(job) -> bool:
        # An alias such as gpt-4.1-mini comes back as its dated snapshot, hence startswith.
        same = job.training_file == record["training_file"] and (job.model or "").startswith(record["model"])
        told = TOKEN in (job.metadata or {}) or job.id in others
        too_old = isinstance(job.created_at, (int, float)) and 0 < job.created_at < earliest
        return same and not told and not too_old

    return tokens.get(record["token"]) or next(filter(must_be_it, jobs), None)


def living_job(client, job_id: str | None):
    """Return the job; None if there is none, or if it failed or was cancelled, so that a new one is due."""
    job = job_id and (
        unless_gone(lambda: client.fine_tuning.jobs.retrieve(job_id))
        or next((listed for listed in unless_gone(lambda: list_jobs(client)) or [] if listed.id == job_id), None)
    )
    if job and str(job.status).lower().replace(" ", "_") not in JOB_DEAD:
        return job
    if job_id:
        note(f"Job {job_id} {f'is {job.status}' if job else 'is not on the server any more'}: creating a new one.")


# Before spending


def check_before_spending(client, wanted: dict, paths: dict, max_cost: float) -> dict:
    """Return the system prompt that all rows share and the estimated cost in USD, None where there is none.

    Raises StepError if the data is unfit (exit code 1) or the estimate is above max_cost (2).
    """
    try:
        import prepare_training_data as step_1
    except ModuleNotFoundError:
        note("Data:  not checked, no cost estimated, no system prompt recorded: prepare_training_data.py is not here.")
        return {"system_prompt": None, "estimated_cost": None}
    try:
        data = step_1.check_training_file(paths["training_file"], wanted["model"], paths.get("validation_file"))
    except step_1.StepError as error:
        raise StepError(str(error), error.exit_code) from None
    if data.errors:
        for problem in data.problems:
            note(str(problem))
        raise StepError(f"Errors in the data: {data.errors}. Nothing was sent; correct them and run again.", 1)
    epochs = wanted["hyperparameters"].get("n_epochs", data.epochs)
    cost = data.cost(epochs)
    check = f" (see: python prepare_training_data.py --check {paths['training_file']})" if data.warnings else ""
    counts = f"{data.examples} examples, {data.tokens:,} tokens ({data.counted})"
    price = "no price known for this model" if cost is None else f"about ${cost:.2f}"
    price = "free (local API)" if data.price == 0 else price
    note(f"Data:  {counts}, warnings: {data.warnings}{check}")
    note(f"Cost:  {price}, for {epochs} epoch{'s' * (epochs != 1)}")
    if cost is not None and not cost <= max_cost:
        raise StepError(
            f"The estimate of ${cost:.2f} is above --max-cost {max_cost:.2f}; nothing was sent. "
            "Train fewer epochs or examples, or raise --max-cost."
        )
    return {"system_prompt": data.system_prompt, "estimated_cost": cost}


def warn_of_shutdown(client, model: str) -> None:
    """Say when the base model stops, where the server tells (`shutdown_date` of GET /models/{model})."""
    import openai

    base_model = model.split(":")[1] if model.startswith("ft:") else model
    try:
        last_day = date.fromisoformat(patiently(lambda: client.models.retrieve(base_model)).shutdown_date)
    except (openai.APIStatusError, TypeError, ValueError):
        return  # no date, or no such request: not every server lists what it can fine-tune
    days = (last_day - date.today()).days
    note(f"Model: this base model stops on {last_day}, in {days} days: so will your fine-tuned model.")


def read_file(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        cure = "; step 1 makes it: python prepare_training_data.py" if path == TRAINING_FILE else ""
        raise StepError(f"Cannot read {path}: {error.strerror}{cure}.") from None


# The record: what was asked, what was sent, what came of it


def new_record(client, fields: dict, paths: dict, records: list[dict]) -> dict:
    """Return the record of a job to be created; an upload of the same bytes is taken over from an earlier record."""
    token = time.strftime("%Y-%m-%d-%H%M%S-") + uuid.uuid4().hex[:12]
    record = {"job_id": None, **dict.fromkeys(ROLES), "base_url": str(client.base_url).rstrip("/"), **fields}
    for role, path in paths.items():
        digest = record[f"{role}_sha256"]
        same = (old[role] for old in records if old[f"{role}_sha256"] == digest and old[role])
        record[role] = None if record["forced"] else next(same, None)
        record[f"{role}_path"] = path
        # With its hash in its name, a file of that name is the right one, whatever the clocks say.
        name = f"{Path(path).stem}-{digest[:12]}{Path(path).suffix}"
        record[f"{role}_name"] = re.sub(r"[^A-Za-z0-9._-]", "_", name)  # what no server writes in another way
    return {**record, "token": token, "unanswered": {}, "reported": False}


def fits(record: dict, wanted: dict, force: bool, unfinished: set[str]) -> bool:
    """Tell whether the record is of the job that is wanted: with --force, of one that this run found unfinished."""
    same = all(record[name] == value for name, value in wanted.items())
    begun = record["token"] in unfinished and force == record["forced"]
    return same and (begun or bool(record["job_id"] and not force))


def records_on(client) -> list[dict]:
    """Return the records of all jobs begun here on this server: the current one, then the newest."""
    current = read_job_record(RECORD)
    old = [read_job_record(str(path)) for path in sorted(OLD_RECORDS.glob("*.json"), reverse=True)]
    records = [current, *(record for record in old if record.get("token") != current.get("token"))]
    whole = [record for record in records if record.keys() >= RECORD_KEYS]  # others are not from this script
    return [record for record in whole if same_server(record["base_url"], str(client.base_url))]


def write_record(record: dict) -> None:
    """Replace fine_tune_job.json in one step; another job's record that stands there moves to fine_tune_jobs/."""
    try:
        with open(RECORD + ".tmp", "w", encoding="utf-8") as file:
            json.dump(record, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        there = read_job_record(RECORD)
        if there and there.get("token") != record["token"]:
            OLD_RECORDS.mkdir(exist_ok=True)
            os.replace(RECORD, OLD_RECORDS / f"{there.get('token') or there.get('job_id') or uuid.uuid4().hex}.json")
        os.replace(RECORD + ".tmp", RECORD)
    except OSError as error:
        raise StepError(f"Cannot write {RECORD} ({error}): mend that, and run the same command again.") from None


def say(line: str) -> None:
    write_line(line, sys.stdout)


def note(line: str) -> None:
    write_line(line, sys.stderr)


def write_line(line: str, stream) -> None:
    try:
        print(line, file=stream, flush=True)
    except OSError:  # the reader has gone, as in `| head -1`, or the disk is full: no reason to stop half-way
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# The command line


def json_object(text: str) -> dict:
    value = json.loads(text)
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # no NaN, no 1e999, no half of a character
    if not isinstance(value, dict) or not isinstance(value.get("metadata", {}), dict):
        raise ValueError
    return value


def unicode_text(text: str) -> str:
    text.encode()  # refuses half of a character, which no request and no record can hold
    return text


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Upload the training file and create one fine-tuning job.",
        epilog="Run the same command again at any time: it never makes a second job.",
    )
    add = parser.add_argument
    add("training_file", nargs="?", type=unicode_text, default=TRAINING_FILE, help="chat JSONL (default: %(default)s)")
    add(
        "--validation-file",
        type=unicode_text,
        metavar="FILE",
        help="chat JSONL that is not trained on; gives the validation loss",
    )
    add("--model", type=unicode_text, help=f"base model (default: FINE_TUNE_MODEL, else {DEFAULT_MODEL})")
    add("--suffix", type=unicode_text, help="becomes part of the fine-tuned model's name")
    add("--n-epochs", type=int, metavar="N", help="passes over the data (default: the server chooses)")
    add("--batch-size", type=int, metavar="N", help="examples per step (default: the server chooses)")
    add("--learning-rate-multiplier", type=float, metavar="X", help="default: the server chooses")
    add("--seed", type=int, help="makes a run repeatable")
    add("--extra", type=json_object, metavar="JSON", help="an object merged into the request, for what a server needs")
    add("--max-cost", type=float, default=MAX_COST, metavar="USD", help="stop above this (default: %(default).2f)")
    add("--dry-run", action="store_true", help="check the data, the cost and the model; send nothing")
    add("--force", action="store_true", help="a new upload and a new job in any case")
    add("--quiet", action="store_true", help="print the job id alone")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = vars(build_parser().parse_args(argv))
    quiet = options.pop("quiet")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without ✓ is no reason to lose a job id
            stream.reconfigure(errors="replace", line_buffering=True)
    try:
        with redirect_stdout(None if quiet else sys.stdout):
            job_id = start_fine_tuning(**options)
    except StepError as error:
        note(str(error))
        return error.exit_code
    except ModuleNotFoundError as error:
        cure = "activate the virtual environment (Python 3.10 or newer), or python -m pip install -r requirements.txt"
        print(f"{error.name} is missing here: {cure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        note("\nInterrupted. Run the same command again: it goes on from where it was.")
        return 130
    if job_id:
        say(job_id if quiet else "\nNext: python check_fine_tune_status.py --wait")
    return 0


if __name__ == "__main__":
    sys.exit(main())
