"""Step 2: upload the training file and create one fine-tuning job.

Needs   training_data.jsonl (step 1) and a server: the local API, or any other that speaks
        OpenAI's API (OPENAI_API_KEY and OPENAI_BASE_URL, in .env).
Leaves  fine_tune_job.json, which steps 3 to 5 read; the job before it moves to fine_tune_jobs/.
Omits   waiting for the training (step 3); methods other than supervised fine-tuning.

    python fine_tune.py     # again, even after a kill: it finds its job and orders no second one
    python fine_tune.py my_data.jsonl --suffix my-bot --n-epochs 3
    python fine_tune.py --extra '{"hyperparameters": {"batch_size": 4}}'    # anything else
"""

try:
    import argparse
    import hashlib
    import json
    import os
    import sys
    import time
    from pathlib import Path

    import openai
    from dotenv import load_dotenv
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is missing: activate .venv, or pip install -r requirements.txt")
except KeyboardInterrupt:  # the imports take half a second
    raise SystemExit(130) from None

TRAINING_FILE = "training_data.jsonl"
DEFAULT_MODEL = "gpt-4.1-mini-2025-04-14"  # OpenAI takes jobs until 2027-01-06, none of newcomers
MAX_COST = 5.00  # USD
# USD per 1M training tokens: https://developers.openai.com/api/docs/pricing (2026-07); local: 0
PRICES = {DEFAULT_MODEL: 5.00, "gpt-4.1-2025-04-14": 25.00, "gpt-4o-2024-08-06": 25.00}
PRICES |= {"gpt-4o-mini-2024-07-18": 3.00, "smollm2-135m-instruct": 0.00}
FILE_WAIT = 60  # seconds; some servers never call a file processed, and train on it all the same
REQUEST_TIMEOUT, ORDER_WAIT = 60, 120  # seconds: for a request; for the job of a lost answer
DEAD = {"failed", "error", "user_error", "failed_validation"}  # statuses without a model
DEAD |= {"cancelled", "canceled", "terminated"}
RECORD, ORDER = Path("fine_tune_job.json"), Path("fine_tune_order.json")  # ORDER: not answered yet


# --- The same in the four scripts that talk to a server (a test keeps it the same) ---
def connect(**options) -> openai.OpenAI:
    """Return a client of the server that .env or the environment names."""
    load_dotenv()
    key, url = os.environ.get("OPENAI_API_KEY"), os.environ.get("OPENAI_BASE_URL")
    if not key and not url:
        sys.exit("No server is named: copy .env.example to .env, or set OPENAI_API_KEY (OpenAI).")
    return openai.OpenAI(api_key=key or "-", base_url=url or "https://api.openai.com/v1", **options)


def explain(error: Exception) -> str:
    """Return one sentence: what the server answered and the cure, without the key."""
    host, key = os.environ.get("OPENAI_BASE_URL") or "OpenAI", os.environ.get("OPENAI_API_KEY", "")
    if isinstance(error, openai.APIConnectionError):
        return f"No answer from {host}. Is it running? (Local API: python -m local_api)"
    said, code = str(error), getattr(error, "status_code", "nonsense, or a file here is broken")
    if isinstance(body := getattr(error, "body", None), dict):
        said = str(body.get("message") or said)
    said = said.replace(key, "[key]") if len(key) > 8 else said  # "local" is no secret
    cures: dict = {401: "check OPENAI_API_KEY", 404: "check name and URL", 429: "see your limits"}
    return f"{host} answered {code}: {said} ({cures.get(code, 'mend that, or try again')})"


def read_job(name: str | None = None) -> dict:
    """Return the record of the job with this id or model, or of the latest job; {}: none."""
    latest, earlier = Path().glob("fine_tune_job.json"), Path().glob("fine_tune_jobs/*.json")
    for path in [*latest, *(sorted(earlier) if name else [])]:
        job = json.loads(path.read_text("utf-8"))
        if name in (None, job["job_id"], job["fine_tuned_model"], *job.get("checkpoints", [])):
            return job
    return {}


# --- End of what is the same. ---


def start_fine_tuning(training_file=TRAINING_FILE, max_cost=MAX_COST, force=False, model=None,
        validation_file=None, suffix=None, n_epochs=None, seed=None, extra=None):  # fmt: skip
    """Return the id of the job for this file and these options: created now, or found.
    Raises openai.APIError, OSError; SystemExit with a sentence for the reader."""
    client, extra = connect(), dict(extra or {})
    hyperparameters = dict(extra.pop("hyperparameters", None) or {})  # left out: the server chooses
    if n_epochs is not None:
        hyperparameters["n_epochs"] = n_epochs
    validation = Path(validation_file).read_bytes() if validation_file else b""
    order: dict = {
        "server": str(client.base_url).rstrip("/"),
        "model": model or os.environ.get("FINE_TUNE_MODEL") or DEFAULT_MODEL,
        "sha256": hashlib.sha256(Path(training_file).read_bytes()).hexdigest(),
        "validation_sha256": hashlib.sha256(validation).hexdigest(),
        "suffix": suffix,
        "seed": seed,
        "hyperparameters": hyperparameters,  # OpenAI's newer place is `method`; all read this one
        "extra": extra,
    }
    order["fingerprint"] = hashlib.sha256(json.dumps(order).encode()).hexdigest()
    order |= {"training_file_path": str(training_file), "force": force}
    # In turn: a job whose answer was lost, the recorded job, a new one.
    job = unanswered_job(client, order)
    if not job and not force:
        job = recorded_job(client, order)
    if not job:
        order |= {"started_at": time.time(), **read_report(order, max_cost)}
        print(f"[1/3] Uploading training file: {training_file}")
        # Each order uploads anew: the id of its file is the mark by which its job is known again.
        file = client.files.create(file=Path(training_file), purpose="fine-tune")
        print(f"✓ File uploaded successfully!\n  File ID: {file.id}")
        order["training_file"] = file.id
        if validation_file:
            upload = client.files.create(file=Path(validation_file), purpose="fine-tune")
            order |= {"validation_file": upload.id, "validation_file_path": str(validation_file)}
        print("\n[2/3] Waiting for file to be processed...")
        wait_until_processed(client, file.id)
        print("\n[3/3] Creating fine-tuning job...")
        job = create_job(client, order)
        print("✓ Fine-tuning job created successfully!")
    print(f"\nJob ID: {job.id}\nModel: {job.model}\nStatus: {job.status}")
    return job.id


def read_report(order: dict, max_cost: float) -> dict:
    """Return system prompt and cost (USD), by step 1's report; stop if that is above max_cost."""
    training_file = order["training_file_path"]
    path = Path(training_file).with_suffix(".report.json")
    report = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if report.get("sha256") != order["sha256"]:  # not of these bytes
        step_1 = f'python prepare_training_data.py {training_file} -o {training_file} --system ""'
        print(f"Data:  no report of step 1: cost, system prompt unknown. Ctrl-C, then: {step_1}")
        return {"system_prompt": None, "estimated_cost": None}
    counts = f"{report['examples']:,} examples, {report['tokens']:,} tokens ({report['counted']})"
    print(f"Data:  {counts}")
    epochs = order["hyperparameters"].get("n_epochs", "auto")
    if epochs == "auto":  # openai-cookbook's rule: 3; more for few examples, fewer for very many
        epochs = min(max(3, 100 // report["examples"]), max(1, 25_000 // report["examples"]))
    price, cost, words = PRICES.get(order["model"]), None, "not known"
    if price is not None:
        cost = report["tokens"] * epochs * price / 1e6  # every pass over the data is paid for
        words = f"about ${cost:.2f}, at OpenAI's prices" if cost else "free (local API)"
    print(f"Cost:  {words}, for {epochs} epochs of {order['model']}")
    if cost and cost > max_cost:
        sys.exit(f"That is above --max-cost {max_cost:.2f}, and nothing was sent.")
    return {"system_prompt": report["system_prompt"], "estimated_cost": cost}


def wait_until_processed(client: openai.OpenAI, file_id: str) -> None:
    try:
        file = client.files.wait_for_processing(file_id, max_wait_seconds=FILE_WAIT)
    except RuntimeError:  # the SDK's word for: not within that time
        return print(f"  After {FILE_WAIT} s the server has not called it processed; going on.")
    if file.status != "processed":
        sys.exit(f"The server found {file_id} unfit ({file.status}): {file.status_details}")
    print("✓ File processed successfully!")


def create_job(client: openai.OpenAI, order: dict):
    """Write the order down, send it once, record the job that it makes, and return that.
    One job, never two: a job costs money, and a request whose answer is lost may have been carried
    out all the same. A run that finds an order on disk looks for its job: unanswered_job()."""
    order["sent_at"] = time.time()
    try:
        with ORDER.open("x", encoding="utf-8") as file:  # x: fails where one is already
            json.dump(order, file, indent=2)
    except FileExistsError:
        sys.exit(f"Another run is at work here ({ORDER}). Run this again to see its job.")
    if read_job().get("created_at", 0) > order["started_at"]:  # made while this run uploaded
        ORDER.unlink()
        sys.exit("Another run has just made a job here. Run this again to see it.")
    names = ("model", "training_file", "validation_file", "suffix", "seed", "hyperparameters")
    request = {name: order[name] for name in names if order.get(name) not in (None, {}, "")}
    once = client.with_options(max_retries=0, timeout=REQUEST_TIMEOUT)  # else the SDK repeats it
    try:
        job = once.fine_tuning.jobs.create(**request, extra_body=order["extra"])
    except openai.APIStatusError as error:
        if error.status_code < 500 and error.status_code not in (408, 409, 429):
            ORDER.unlink()  # it was refused; after any other error a job may have been made
        raise
    write_record(job.id, order)
    return job


def unanswered_job(client: openai.OpenAI, wanted: dict):
    """Look on the server for the job of an order without an answer; None: none, or not `wanted`."""
    while ORDER.exists():
        order = json.loads(ORDER.read_text("utf-8") or "{}")
        wait = order.get("sent_at", 0) + ORDER_WAIT - time.time()
        is_wanted = all(order.get(name) == wanted[name] for name in ("fingerprint", "force"))
        for job in client.fine_tuning.jobs.list(limit=100).data:  # the newest first
            if job.training_file == order.get("training_file"):
                write_record(job.id, order)
                print(f"{ORDER} has had no answer, but its job is there: {job.id}.")
                return job if is_wanted else None
        if order.get("server", wanted["server"]) != wanted["server"]:
            print(f"{ORDER} has had no answer. Let it find its job, else a second may be paid for:")
            sys.exit(f"set OPENAI_BASE_URL to {order['server']}; if that is gone, delete {ORDER}.")
        if wait > 0:
            print(f"{ORDER} has had no answer. Its job may still come for {wait:.0f} s; waiting.")
            time.sleep(min(wait, 5))
        else:
            ORDER.unlink()
            print(f"{ORDER} did not arrive: the server has no job of it.")
            if is_wanted:  # send it again
                return create_job(client, order)


def recorded_job(client: openai.OpenAI, order: dict):
    """Return the recorded job, if it is the wanted one and neither dead nor deleted."""
    latest = read_job()
    if latest.get("fingerprint") != order["fingerprint"]:
        return None
    try:
        job = client.fine_tuning.jobs.retrieve(latest["job_id"])
        if job.fine_tuned_model:
            client.models.retrieve(job.fine_tuned_model)  # NotFoundError: deleted
        if str(job.status).lower().replace(" ", "_") not in DEAD:
            print("This job exists already: same bytes, options, server. (--force orders another.)")
            return job
        print(f"Job {job.id} is {job.status}; ordering another.")
    except openai.NotFoundError:
        print(f"Job {latest['job_id']} or its model was deleted; ordering another.")


def write_record(job_id: str, order: dict) -> None:
    """Write fine_tune_job.json; the record of an earlier job moves to fine_tune_jobs/."""
    earlier = read_job()
    if earlier and earlier["job_id"] != job_id:
        Path("fine_tune_jobs").mkdir(exist_ok=True)
        RECORD.replace(Path("fine_tune_jobs") / f"{earlier['job_id']}.json")
    job = {"job_id": job_id, "fine_tuned_model": None, **order, "created_at": time.time()}
    new = RECORD.with_suffix(".tmp")  # so that a run that is killed here leaves no half record
    new.write_text(json.dumps(job, indent=2), encoding="utf-8")
    new.replace(RECORD)
    ORDER.unlink(missing_ok=True)


class FineTuner:  # for other code
    create_job = staticmethod(start_fine_tuning)

    def monitor_progress(self, job_id: str) -> str | None:
        """Wait for the end of a job and return its fine-tuned model, None if it made none."""
        job = connect().fine_tuning.jobs.retrieve(job_id)
        while not (job.finished_at or job.fine_tuned_model or str(job.status).lower() in DEAD):
            time.sleep(5)
            job = connect().fine_tuning.jobs.retrieve(job_id)
        return job.fine_tuned_model


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Upload a training file, create one job of it.")
    add = parser.add_argument
    add("training_file", nargs="?", default=TRAINING_FILE, help="chat JSONL (default: %(default)s)")
    add("--validation-file", metavar="FILE", help="chat JSONL not trained on, for validation loss")
    add("--model", help=f"base model (default: FINE_TUNE_MODEL, else {DEFAULT_MODEL})")
    add("--suffix", help="becomes part of the fine-tuned model's name")
    add("--n-epochs", type=int, metavar="N", help="passes over the data (default: server's choice)")
    add("--seed", type=int, help="makes a training repeatable")
    add("--extra", type=lambda s: dict(json.loads(s)), metavar="JSON", help="more of the request")
    add("--max-cost", type=float, default=MAX_COST, metavar="USD", help="default: %(default).2f")
    add("--force", action="store_true", help="order a job even if this one exists")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    try:
        start_fine_tuning(**vars(args))
        print("\nNext: python check_fine_tune_status.py --wait")
    except OSError as error:
        sys.exit(f"{error}. (Step 1 makes training files: python prepare_training_data.py)")
    except (openai.APIError, json.JSONDecodeError, AttributeError) as error:
        if isinstance(error, AttributeError) and not isinstance(error.obj, str | list | None):
            raise  # a slip in this script; only a server's nonsense gives a str, list or None
        sys.exit(f"{explain(error)}\nThe same command again is safe: it makes one job, never two.")
    except KeyboardInterrupt:
        print("\nInterrupted. The same command again is safe: one job, never two.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
