"""Step 2: upload the training file and create one fine-tuning job, exactly one.

Needs   training_data.jsonl (step 1) and a server: the local API (copy .env.example to .env, run `python -m local_api`),
        or any other that speaks OpenAI's API (OPENAI_API_KEY, OPENAI_BASE_URL).
Leaves  fine_tune_job.json, which steps 3 to 5 read; the record of an earlier job moves to fine_tune_jobs/.
Omits   waiting for the training (step 3 does that), every method but supervised fine-tuning, and a lock: run it once
        at a time in a folder.

A job costs money, and the SDK repeats a request whose answer is lost with nothing that lets the server tell it from a
second order. So this script writes down what it is about to send, sends it once, and when the answer does not come,
looks on the server for what the request has made. Wherever it is killed and whatever the server does: run the same
command again and it goes on from where it was. Same bytes, options and server: same job.

    python fine_tune.py
    python fine_tune.py my_data.jsonl --suffix my-bot --n-epochs 3
    python fine_tune.py --dry-run                     # judge the file, estimate the cost, send nothing
    JOB=$(python fine_tune.py --quiet)                # stdout is the job id alone
    python fine_tune.py --extra '{"trainingType": "GlobalStandard"}'     # what Azure needs besides

Exit codes: 0 the job exists · 1 the data is not fit to train on · 2 usage or configuration · 3 it cannot be told
whether the server has the upload or the job · 4 server or network · 130 interrupted.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import sys
import time
import uuid
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from urllib.parse import urlsplit

TRAINING_FILE = "training_data.jsonl"
RECORD = "fine_tune_job.json"
OLD_RECORDS = Path("fine_tune_jobs")
DEFAULT_MODEL = "gpt-4.1-mini-2025-04-14"  # the cheapest that OpenAI still fine-tunes, until 2027-01-06
MAX_COST = 5.00  # USD
TOKEN = "fine_tune_token"  # the key in a job's metadata by which the job is known again
REQUEST_TIMEOUT = 60.0  # seconds; a request that has not been carried out by then never will be
CLOCK_SKEW = 300  # seconds by which the server's clock may differ from ours
FILE_WAIT = 120.0  # seconds; some servers never call a file processed and create the job all the same
LONGEST_WAIT = 120.0  # seconds; a rate limit that asks for more ends the run, which can be repeated then
RETRIES = 4
FILE_UNFIT = {"error", "failed", "invalid_format", "deleted"}
FILE_IN_WORK = {"uploaded", "uploading", "pending", "running", "processing", "queued", "validating"}
JOB_DEAD = {"failed", "cancelled", "canceled", "error", "user_error", "failed_validation"}
ROLES = ("training_file", "validation_file")


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


class FineTuner:
    """Creates one fine-tuning job, and follows it; `say` gets the lines of the report."""

    def __init__(self, client=None, say=print) -> None:
        # The SDK repeats nothing: what may be sent twice is decided here.
        self.client = (client or connect(REQUEST_TIMEOUT)).with_options(max_retries=0)
        self.server = str(self.client.base_url).rstrip("/")
        self.say = say
        self.record: dict = {}  # what was asked, what was sent, what came of it; see write_record

    def create_job(
        self,
        training_file: str = TRAINING_FILE,
        validation_file: str | None = None,
        model: str | None = None,
        suffix: str | None = None,
        seed: int | None = None,
        hyperparameters: dict | None = None,
        extra: dict | None = None,
        max_cost: float = MAX_COST,
        force: bool = False,
        dry_run: bool = False,
    ) -> str:
        """Return the id of the job for this file, these options and this server: found, or created now.

        hyperparameters: only what is asked for, such as {"n_epochs": 3}. extra: merged into the request. max_cost: USD.
        force: a new upload and a new job in any case. dry_run: check and estimate only, and return "".
        Raises StepError with the sentence for the reader.
        """
        paths = {role: path for role, path in zip(ROLES, (training_file, validation_file), strict=True) if path}
        contents = {role: read_file(path) for role, path in paths.items()}
        wanted: dict = {  # two runs that agree in all of this want the same job
            "base_url": self.server,
            "model": model or os.environ.get("FINE_TUNE_MODEL") or DEFAULT_MODEL,
            "suffix": suffix,
            "seed": seed,
            "hyperparameters": hyperparameters or {},
            "extra": extra or {},
            **{f"{role}_sha256": contents.get(role) and hashlib.sha256(contents[role]).hexdigest() for role in ROLES},
        }
        with server_errors_explained(self.client):
            self.record = read_job_record(RECORD)
            if dry_run:
                check_before_spending(self.client, wanted["model"], paths, hyperparameters or {}, max_cost)
                return self.say_what_would_happen(wanted, training_file, force)
            self.find_lost_job()
            with self.earlier_job_kept():
                same = agree(self.record, wanted)
                if not same and not force:
                    same = self.take_up_earlier_record(wanted)
                job = self.living_job() if same and not force else None
                if job:
                    self.say("This job exists already: same bytes, options and server. (--force starts a new one.)")
                    return self.report(job)
                found = check_before_spending(self.client, wanted["model"], paths, hyperparameters or {}, max_cost)
                begun = same and not self.record["job_id"] and (self.record["forced"] or not force)
                if not begun:
                    found |= {"training_file_bytes": len(contents["training_file"]), "forced": force}
                    self.begin_record({**wanted, **{f"{role}_path": paths.get(role) for role in ROLES}, **found})
                self.say(f"[1/3] Uploading training file: {training_file}")
                for role in paths:
                    self.upload(role, contents[role])
                self.say("\n[2/3] Waiting for file to be processed...")
                for role in paths:
                    self.wait_for_file(role)
                self.say("✓ File processed successfully!\n\n[3/3] Creating fine-tuning job...")
                job = self.create()
                self.say("✓ Fine-tuning job created successfully!")
                return self.report(job)

    def say_what_would_happen(self, wanted: dict, training_file: str, force: bool) -> str:
        """Tell what a run that is no dry run would do; write nothing, and return ""."""
        if not agree(self.record, wanted):
            self.record = newest_fitting(earlier_records(), wanted)
        job = self.living_job() if self.record and not force else None
        would = f"upload {training_file} (unless the server has it) and create a job to fine-tune {wanted['model']}"
        self.say(f"Dry run: would {f'go on with job {job.id}, {job.status}' if job else would}. Nothing was sent.")
        return ""

    @contextmanager
    def earlier_job_kept(self):
        """Leave the earlier job the current one if the new one is refused inside the block."""
        earlier = self.record
        try:
            yield
        except Exception:
            # A request without an answer may still make a job: then the new record stays, for the next run to look.
            if earlier.get("job_id") and self.record is not earlier and not self.record["unanswered"]:
                set_aside(self.record)
                write_record(earlier)
            raise

    def monitor_progress(self, job_id: str | None = None) -> str:
        """Follow the job (default: the one just created) to its end and return the fine-tuned model."""
        try:
            from check_fine_tune_status import wait_for_training
        except ModuleNotFoundError:
            raise StepError("To follow a job, put check_fine_tune_status.py beside this script.") from None
        return wait_for_training(job_id or self.record["job_id"])

    # Exactly once: an upload and the creation of a job both go through here.

    def send_once(self, what: str, send, find):
        """Send a request that must not be carried out twice; return what it made, now or in an earlier run.

        what: the record's name for it, "job" or one of ROLES. find: looks on the server for what it made.
        """
        if what in self.record["unanswered"]:
            made = self.look_for(what, find)
            if made:
                return self.answered(what, made)
        self.record["unanswered"][what] = time.time()
        write_record(self.record)  # from here on a kill leaves a trace, and the next run looks before it sends
        try:
            made = patiently(send, safe_to_repeat=False)
            if not made.id:
                raise json.JSONDecodeError("an answer without an id", "", 0)
        except Exception as error:
            if surely_refused(error):
                del self.record["unanswered"][what]
                write_record(self.record)
                raise
            note(f"The answer to the request for the {words(what)} was lost; looking whether it was carried out.")
            made = self.look_for(what, find, at_most=3.0)
            if not made:
                raise  # it may still appear: the next run looks again, and for long enough, before it sends
        return self.answered(what, made)

    def look_for(self, what: str, find, at_most: float = REQUEST_TIMEOUT):
        """Return what an unanswered request made; None if it shows nothing while it may still be on its way."""
        import openai

        on_its_way = self.record["unanswered"][what] + float(self.client.timeout) - time.time()
        seconds = min(max(on_its_way, 0.0), float(self.client.timeout), at_most)
        if seconds > 3:
            note(
                f"An earlier run requested the {words(what)} and got no answer; looking for it, up to {seconds:.0f} s."
            )
        deadline = time.monotonic() + seconds
        while True:
            try:
                made = patiently(find)
            except openai.NotFoundError:
                raise StepError(
                    f"{self.server} does not list what it has, so it is not known whether the {words(what)} was "
                    "accepted; look at the server's own pages, and if it was not, start anew with --force.",
                    3,
                ) from None
            if made or time.monotonic() >= deadline:
                return made
            time.sleep(min(2.0, seconds / 4))

    def answered(self, what: str, made):
        """Write down what the request made."""
        self.record["job_id" if what == "job" else what] = made.id
        self.record["unanswered"].pop(what, None)
        write_record(self.record)
        return made

    def begin_record(self, fields: dict) -> None:
        """Start a new record; an upload of the same bytes to this server is taken over from an earlier one."""
        old, now = self.record, int(time.time())
        new: dict = {"job_id": None, **fields, **dict.fromkeys(ROLES), "unanswered": {}}
        self.record = {**new, "token": uuid.uuid4().hex, "created_at": now}
        for earlier, role in itertools.product([] if fields["forced"] else earlier_records(), ROLES):
            if agree(earlier, {name: fields[name] for name in ("base_url", f"{role}_sha256")}):
                self.record[role] = self.record[role] or earlier.get(role)
                if role in earlier.get("unanswered", {}):
                    self.record["unanswered"][role] = earlier["unanswered"][role]
        set_aside(old)
        write_record(self.record)

    def take_up_earlier_record(self, wanted: dict) -> bool:
        """Make the record of an earlier job the current one again if this run wants that job; tell whether."""
        fitting = newest_fitting(earlier_records(), wanted)
        if not fitting:
            return False
        set_aside(self.record)
        self.record = fitting
        write_record(self.record)
        self.find_lost_job()
        return True

    # The files

    def upload(self, role: str, content: bytes) -> None:
        """Bring the file to the server, unless it has it already."""
        path = Path(self.record[f"{role}_path"])
        # With the content's hash in its name, a file of that name and size is the right one, whatever the clocks say.
        name = f"{path.stem}-{self.record[f'{role}_sha256'][:12]}{path.suffix}"

        def send():
            return self.client.files.create(file=(name, content), purpose="fine-tune")

        def find():
            files = itertools.islice(self.client.files.list(purpose="fine-tune", limit=100), 1000)
            fit = (file for file in files if file.status not in FILE_UNFIT)
            return next((file for file in fit if (file.filename, file.bytes) == (name, len(content))), None)

        if self.record[role] and self.file_on_server(role):
            self.say("✓ The server has this file already: same bytes, so it is not sent again.")
        else:
            self.send_once(role, send, find)
            self.say("✓ File uploaded successfully!")
        self.say(f"  {'File ID' if role == 'training_file' else 'Validation file ID'}: {self.record[role]}")

    def file_on_server(self, role: str):
        """Return the recorded file as the server has it, None if it has it no more."""
        import openai

        try:
            return patiently(lambda: self.client.files.retrieve(self.record[role]))
        except openai.NotFoundError:
            return None

    def wait_for_file(self, role: str) -> None:
        """Wait until the server has looked through the file; StepError if it found it unfit."""
        deadline, pause = time.monotonic() + FILE_WAIT, 0.2
        while True:
            file = self.file_on_server(role)
            status = str(getattr(file, "status", None) or "processed").lower()  # not every server has a status
            if status in FILE_UNFIT:
                details = getattr(file, "status_details", None) or "it gives no details"
                raise StepError(
                    f"The server found {self.record[f'{role}_path']} unfit ({self.record[role]}): {details}.", 1
                )
            if status not in FILE_IN_WORK:
                return
            if time.monotonic() > deadline:
                return note(f"After {FILE_WAIT:.0f} s the server still calls the file {status!r}; going on.")
            time.sleep(pause)
            pause = min(pause * 1.5, 5.0)

    # The job

    def create(self):
        """Create the job that the record describes, and return it."""
        import openai

        record = self.record
        # OpenAI calls the top-level `hyperparameters` deprecated, but it is what every other server reads.
        names = ("suffix", "seed", "hyperparameters", "validation_file")
        asked = {name: record[name] for name in names if record[name] not in (None, {})}
        request = {**asked, "metadata": {TOKEN: record["token"]}}
        for name, value in record["extra"].items():
            request[name] = {**request[name], **value} if isinstance(request.get(name), dict) else value

        def send():
            file = record["training_file"]
            try:
                return self.client.fine_tuning.jobs.create(
                    model=record["model"], training_file=file, extra_body=request
                )
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if "metadata" not in request or "metadata" not in str(error.body):
                    raise
                del request["metadata"]  # a server without metadata; find_job then goes by file, model and time
                return send()

        try:
            return self.send_once("job", send, self.find_job)
        except openai.PermissionDeniedError as error:
            if error.code != "training_not_available":
                raise
            self.delete_orphans()
            raise StepError(
                f"{self.server} creates no fine-tuning jobs for your organisation any more: OpenAI has been closing "
                "self-serve fine-tuning since 2026-05-07. Models you have fine-tuned answer until their base model "
                "stops. To go on, copy .env.example to .env (the local API), or point OPENAI_BASE_URL at another "
                "server that fine-tunes."
            ) from None
        except openai.NotFoundError as error:
            if "model" not in f"{error.code} {error.message}":
                raise
            sentence = f"{self.server} has no model {record['model']!r} to fine-tune; set --model or FINE_TUNE_MODEL."
            raise StepError(sentence) from None

    def find_job(self):
        """Return the job with the record's token or, where the server keeps no metadata, the one that must be it."""
        record, sent = self.record, self.record["unanswered"]["job"]
        jobs = list(itertools.islice(self.client.fine_tuning.jobs.list(limit=100), 1000))
        for job in jobs:
            if (job.metadata or {}).get(TOKEN) == record["token"]:
                return job
        others = {earlier.get("job_id") for earlier in earlier_records()}
        for job in jobs:
            untold = TOKEN not in (job.metadata or {}) and job.id not in others
            # An alias such as gpt-4.1-mini comes back as its dated snapshot, hence startswith.
            fits = job.training_file == record["training_file"] and (job.model or "").startswith(record["model"])
            if untold and fits and (job.created_at or sent) > sent - CLOCK_SKEW:
                return job
        return None

    def find_lost_job(self) -> None:
        """Learn the id of a job that an earlier run requested without reading the answer."""
        if same_server(self.record.get("base_url"), self.server) and "job" in self.record.get("unanswered", {}):
            job = self.look_for("job", self.find_job)
            if job:
                note(f"The run before this one did create its job: {job.id}")
                self.answered("job", job)
            else:
                del self.record["unanswered"]["job"]
                write_record(self.record)

    def living_job(self):
        """Return the recorded job as the server has it, None if it failed, was cancelled or is not there."""
        import openai

        job_id = self.record["job_id"]
        if not job_id:
            return None
        try:
            job = patiently(lambda: self.client.fine_tuning.jobs.retrieve(job_id))
        except openai.NotFoundError:
            return note(f"The server has no job {job_id} any more: creating a new one.")
        if str(job.status).lower() in JOB_DEAD:
            return note(f"Job {job_id} ended as {job.status}: creating a new one.")
        if deleted(self.client, job.fine_tuned_model):  # a new job is not begun on this sign: it may cost money
            note(f"Its model {job.fine_tuned_model} was deleted: python fine_tune.py --force trains a new one.")
        return job

    def delete_orphans(self) -> None:
        """Delete this record's files from the server, but for those that an earlier job was created with."""
        import openai

        in_use = {record.get(role) for record in earlier_records() if record.get("job_id") for role in ROLES}
        for role in ROLES:
            file_id = self.record[role]
            if file_id and file_id not in in_use:
                with suppress(openai.NotFoundError):
                    patiently(lambda file_id=file_id: self.client.files.delete(file_id))
                note(f"The uploaded file {file_id} was deleted from the server again.")
                self.record[role] = None
                write_record(self.record)

    def report(self, job) -> str:
        self.say(f"\nJob ID: {job.id}\nModel: {job.model or self.record['model']}\nStatus: {job.status}")
        return job.id


def start_fine_tuning(
    training_file: str = TRAINING_FILE, model: str | None = None, suffix: str | None = None, **options
) -> str:
    """Create the job, or find it if it exists, and return its id, in silence. Options: see FineTuner.create_job."""
    return FineTuner(say=lambda line: None).create_job(training_file, model=model, suffix=suffix, **options)


# Before spending


def check_before_spending(client, model: str, paths: dict, hyperparameters: dict, max_cost: float) -> dict:
    """Judge the files, estimate the cost and look at the model's last day; return what the record keeps of it.

    Returns {"system_prompt": what all rows share, "estimated_tokens": over all epochs, "estimated_cost": USD}, None
    where not known. Raises StepError if the data is unfit (exit code 1) or the estimate is above max_cost (2).
    """
    found: dict = {"system_prompt": None, "estimated_tokens": None, "estimated_cost": None}
    try:
        import prepare_training_data as step_1
    except ModuleNotFoundError:
        note("Data:  not checked, no cost estimated: prepare_training_data.py is not beside this script.")
        found["system_prompt"] = shared_system_prompt(read_file(paths["training_file"]))
    else:
        try:
            report = step_1.check_training_file(paths["training_file"], model, paths.get("validation_file"))
        except step_1.StepError as error:
            raise StepError(str(error), error.exit_code) from None
        if report.errors:
            for problem in report.problems:
                note(str(problem))
            raise StepError(f"Errors in the data: {report.errors}. Nothing was sent; correct them and run again.", 1)
        epochs = hyperparameters.get("n_epochs", report.epochs)
        cost = report.cost(epochs)
        found = {
            "system_prompt": report.system_prompt,
            "estimated_tokens": report.tokens * epochs,
            "estimated_cost": cost,
        }
        counts = f"{report.examples} examples, {report.tokens:,} tokens ({report.counted})"
        check = f" (see: python prepare_training_data.py --check {paths['training_file']})" if report.warnings else ""
        note(f"Data:  {counts}, warnings: {report.warnings}{check}")
        price = "no price known for this model" if cost is None else f"about ${cost:.2f}"
        price = "free (local API)" if report.price == 0 else price
        note(f"Cost:  {price}, for {epochs} epoch{'s' * (epochs != 1)}")
        if cost and cost > max_cost:
            raise StepError(
                f"The estimate of ${cost:.2f} is above --max-cost {max_cost:.2f}; nothing was sent. "
                "Train fewer epochs or examples, or raise --max-cost."
            )
    warn_of_shutdown(client, model.split(":")[1] if model.startswith("ft:") else model)
    return found


def warn_of_shutdown(client, model: str) -> None:
    """Say when the base model stops, where the server tells (`shutdown_date` of GET /models/{model})."""
    import openai

    try:
        shutdown = patiently(lambda: client.models.retrieve(model)).shutdown_date
        days = (date.fromisoformat(shutdown) - date.today()).days
    except (openai.NotFoundError, openai.PermissionDeniedError, openai.BadRequestError, TypeError, ValueError):
        return  # no date, or no such request: not every server lists what it can fine-tune
    if days >= 0:
        note(f"Model: this base model stops on {shutdown}, in {days} days: so will your fine-tuned model.")
    else:
        note(f"Model: this base model stopped on {shutdown}.")


def read_file(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        cure = "; step 1 makes it: python prepare_training_data.py" if path == TRAINING_FILE else ""
        raise StepError(f"Cannot read {path}: {error.strerror}{cure}.") from None


def shared_system_prompt(content: bytes) -> str | None:
    """Return the system message that every row starts with, None if they differ or have none."""
    try:
        first = [json.loads(line)["messages"][0] for line in content.splitlines() if line.strip()]
        prompts = {message["content"] if message["role"] == "system" else None for message in first}
    except (ValueError, KeyError, IndexError, TypeError):
        return None  # the file was not checked here; the server says what is wrong with it
    return prompts.pop() if len(prompts) == 1 else None


# The record


def write_record(record: dict) -> None:
    """Replace fine_tune_job.json in one step: whoever reads it sees the old record or the new one, whole."""
    try:
        with open(RECORD + ".tmp", "w", encoding="utf-8") as file:
            json.dump(record, file, indent=2, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(RECORD + ".tmp", RECORD)
    except OSError as error:
        raise StepError(f"Cannot write {RECORD} ({error.strerror}); nothing is sent without it.") from None


def set_aside(record: dict) -> None:
    """Keep the record of a job that exists or may exist, or of an upload, when another takes its place."""
    if record.get("job_id") or record.get("training_file") or "job" in record.get("unanswered", {}):
        OLD_RECORDS.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # it is there already: the disk was full when another should take its place
            os.replace(RECORD, OLD_RECORDS / f"{record['job_id'] or 'unknown-' + record['token']}.json")


def agree(record: dict, wanted: dict) -> bool:
    return all(
        same_server(record.get(name), value) if name == "base_url" else record.get(name) == value
        for name, value in wanted.items()
    )


def newest_fitting(records: list[dict], wanted: dict) -> dict:
    """Return the newest of the records that agree with what is wanted, one with a job before one without, or {}."""
    fitting = [record for record in records if agree(record, wanted)]
    return max(fitting, key=lambda record: (record["created_at"], bool(record["job_id"])), default={})


def earlier_records() -> list[dict]:
    """Return the records of all jobs created from this folder."""
    records = (read_job_record(str(path)) for path in [RECORD, *sorted(OLD_RECORDS.glob("*.json"))])
    return [record for record in records if record]


# Requests


def patiently(call, safe_to_repeat: bool = True):
    """Return what the call returns; wait, visibly, when the server asks to, and repeat what is safe to repeat.

    A request refused with 429 was not carried out and may be sent again; one whose answer was lost only if it reads.
    """
    import openai

    for attempt in itertools.count(1):
        pause = min(2.0**attempt / 4, 8.0)
        try:
            return call()
        except openai.RateLimitError as error:
            if out_of_credit(error) or attempt > RETRIES:
                raise
            told = error.response.headers.get("retry-after", "")
            pause = float(told) if told.isdigit() else pause
            if pause > LONGEST_WAIT:
                sentence = f"The server asks to wait {pause:.0f} s (rate limit); run the same command again then."
                raise StepError(sentence, 4) from None
            note(f"The server asks to slow down; waiting {pause:.0f} s.")
        except (openai.APIConnectionError, openai.InternalServerError):
            if not safe_to_repeat or attempt > RETRIES:
                raise
        time.sleep(pause)


def surely_refused(error: Exception) -> bool:
    """True if the request that ended in this error cannot have been carried out."""
    import openai

    if isinstance(error, openai.APIStatusError):
        return error.status_code < 500 and error.status_code != 408
    return isinstance(error, StepError) or type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout")


def words(name: str) -> str:
    return name.replace("_", " ")


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# The command line


def positive_integer(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def positive_number(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def amount(text: str) -> float:
    value = float(text)
    if not value >= 0:  # NaN is not
        raise ValueError
    return value


def json_object(text: str) -> dict:
    value = json.loads(text, parse_constant=int)  # int refuses NaN and Infinity, which JSON does not have
    if not isinstance(value, dict):
        raise ValueError
    return value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Upload the training file and create one fine-tuning job.",
        epilog="Run the same command again at any time: it never makes a second job.",
    )
    add = parser.add_argument
    add("training_file", nargs="?", default=TRAINING_FILE, help="chat JSONL (default: %(default)s)")
    add("--validation-file", metavar="FILE", help="chat JSONL that is not trained on; gives the validation loss")
    add("--model", help=f"base model (default: FINE_TUNE_MODEL, else {DEFAULT_MODEL})")
    add("--suffix", help="becomes part of the fine-tuned model's name")
    add("--n-epochs", type=positive_integer, metavar="N", help="passes over the data (default: the server chooses)")
    add("--batch-size", type=positive_integer, metavar="N", help="examples per step (default: the server chooses)")
    add("--learning-rate-multiplier", type=positive_number, metavar="X", help="default: the server chooses")
    add("--seed", type=int, help="makes a run repeatable")
    add("--extra", type=json_object, metavar="JSON", help="an object merged into the request, for what a server needs")
    add("--max-cost", type=amount, default=MAX_COST, metavar="USD", help="stop above this (default: %(default).2f)")
    add("--dry-run", action="store_true", help="check the data, the cost and the model; send nothing")
    add("--force", action="store_true", help="a new upload and a new job in any case")
    add("--quiet", action="store_true", help="print the job id alone")
    return parser


def run(args: argparse.Namespace) -> int:
    options = vars(args).copy()
    quiet = options.pop("quiet")
    hyperparameters = {name: options.pop(name) for name in ("n_epochs", "batch_size", "learning_rate_multiplier")}
    asked = {name: value for name, value in hyperparameters.items() if value is not None}  # "auto" is not sent
    tuner = FineTuner(say=lambda line: None if quiet else print(line, flush=True))
    job_id = tuner.create_job(**options, hyperparameters=asked)
    if quiet and job_id:
        print(job_id)
    elif job_id:
        print("\nNext: python check_fine_tune_status.py --wait")
    return 0


def main(argv: list[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without ✓ is no reason to lose a job id
    args = build_parser().parse_args(argv)
    try:
        return run(args)
    except StepError as error:
        note(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        note("\nInterrupted. Run the same command again: it goes on from where it was.")
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
