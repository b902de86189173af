"""Step 3: look at the fine-tuning job, or follow it to its end, and see what it has learned.

Needs   the job that fine_tune.py has recorded in fine_tune_job.json, and the server that runs it.
Leaves  the names of the fine-tuned model and its checkpoints in that record, once there are any.
Omits   pausing a job; a picture of the loss (extras/plot_loss.py); deleting (extras/clean_up.py).

    python check_fine_tune_status.py --wait                   # until the job has ended
    python check_fine_tune_status.py                          # one look
    python check_fine_tune_status.py --list                   # the newest jobs
"""

try:
    import argparse
    import json
    import os
    import sys
    import time
    from pathlib import Path
    from statistics import fmean

    import openai
    from dotenv import load_dotenv
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is missing: activate .venv, or pip install -r requirements.txt")
except KeyboardInterrupt:  # the imports take half a second
    raise SystemExit(130) from None

# The words for a job's end, on all servers that are known. Any other word means: it goes on.
ENDED = dict.fromkeys(("succeeded", "success", "completed"), "succeeded")
ENDED |= dict.fromkeys(("failed", "error", "user_error", "failed_validation"), "failed")
ENDED |= dict.fromkeys(("cancelled", "canceled", "terminated"), "cancelled")
RETRIES = 75  # of a request without an answer: ten minutes, as the SDK waits up to 8 s each time
OVERFIT = 1.02  # a validation loss of more than this many times its lowest value has risen


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


def check_status(job_id: str) -> str:
    """Show what is known of a job and return its status; SystemExit if it ended without a model."""
    client = connect()
    job = client.fine_tuning.jobs.retrieve(job_id)
    show(client, job, new_events(client, job_id, []))
    return ended(job) or job.status


def wait_for_training(job_id: str) -> str | None:
    """Show what is new until a job has ended and return its model; SystemExit if it has failed."""
    client, job, tenth_shown = connect(), None, -1
    events: list = []
    while True:
        try:
            # First the job, then its events: so those of a job that has ended are complete.
            job = client.fine_tuning.jobs.retrieve(job_id)
            fresh = new_events(client, job_id, events)
        except (openai.APIConnectionError, openai.InternalServerError) as error:
            if job is None or client.max_retries == RETRIES:  # no contact ever, or not in 10 min
                raise
            say(f"{explain(error)} Asking again for ten minutes.")
            client = connect(max_retries=RETRIES)  # the SDK itself repeats the request
            continue
        for event in fresh:
            line = f"{time.strftime('%H:%M:%S', time.localtime(event.created_at))}  {event.message}"
            if event.type != "metrics":
                say(line)
                continue
            # A step. A terminal shows one line that moves, a log one for each tenth of the way.
            tenth = 10 * event.data["step"] // event.data.get("total_steps", 10)
            if sys.stdout.isatty() or tenth > tenth_shown:
                minutes = ((job.estimated_finish or 0) - time.time()) / 60
                line += f"  {minutes:.0f} min left" if minutes > 1 else ""
                say(line[:78], moves=True)
                tenth_shown = tenth
        if ended(job):
            say("")  # clears the line that moves
            show(client, job, events)
            return job.fine_tuned_model
        time.sleep(2)


def say(line: str, moves: bool = False) -> None:
    """Print a line; in a terminal the next one takes the place of a line that moves."""
    terminal = sys.stdout.isatty()
    print(line.ljust(78 if terminal else 0), end="\r" if moves and terminal else "\n", flush=True)


def new_events(client, job_id: str, events: list) -> list:
    """Fetch the events that `events` does not hold, add them to it, and return them in order."""
    seen = {event.id for event in events}
    fresh: list = []
    try:
        # The API lists the newest first, 100 to a page; the loop fetches page after page.
        for event in client.fine_tuning.jobs.list_events(job_id, limit=100):
            if event.id in seen:
                break
            seen.add(event.id)
            fresh.insert(0, event)
    except openai.NotFoundError:  # a server without events
        pass
    events += fresh
    return fresh


def ended(job) -> str | None:
    """Return how the job has ended: succeeded, failed or cancelled; None while it goes on."""
    return ENDED.get(str(job.status).lower().replace(" ", "_"))


def show(client, job, events: list) -> None:
    """Print what is known of the job; then record its model and name the next step."""
    facts = {"Job ID": job.id, "Status": ended(job) or job.status, "Model": job.model}
    facts["Latest event"] = events[-1].message if events and not ended(job) else ""
    # Looping over an object of the SDK gives pairs of name and value.
    facts["Hyperparameters"] = ", ".join(f"{name} {n}" for name, n in job.hyperparameters or ())
    if job.trained_tokens:
        free = " (free)" if read_job(job.id).get("estimated_cost") == 0 else ""
        facts["Trained tokens"] = f"{job.trained_tokens:,}{free}"
    steps = [event.data for event in events if event.type == "metrics"]
    facts["Training loss"] = sparkline(curve(steps, "train_loss"))
    facts["Token accuracy"] = sparkline(curve(steps, "train_mean_token_accuracy"))
    facts["Validation loss"] = sparkline(curve(steps, "full_valid_loss", "valid_loss"))
    facts["Fine-tuned model"] = job.fine_tuned_model
    for name, fact in facts.items():
        if fact:
            print(f"{name + ':':<18}{fact}")
    conclude(client, job)


def curve(steps: list[dict], *names: str) -> list[float]:
    """Return the values, step by step, of the first of these figures that there is."""
    for name in names:
        numbers = [float(step[name]) for step in steps if step.get(name) is not None]
        # A missing value is null (None), NaN or, on Azure, -1.
        if values := [number for number in numbers if 0 <= number < float("inf")]:
            return values
    return []


def sparkline(values: list[float]) -> str:
    """Return "2.950 █▆▄▃▂▁ 0.926": the first value, the curve in up to 40 places, the last."""
    if not values:
        return ""
    share = (len(values) - 1) // 40 + 1  # how many values one place stands for: their mean
    means = [fmean(values[start : start + share]) for start in range(0, len(values), share)]
    low, spread = min(means), max(means) - min(means)
    bars = ["▁▂▃▄▅▆▇█"[round((mean - low) / (spread or 1) * 7)] for mean in means]
    return f"{values[0]:.3f} {''.join(bars)} {values[-1]:.3f}"


def conclude(client, job) -> None:
    """Record the model and print the next command; SystemExit if the job ended without."""
    record, is_latest = read_job(job.id), read_job().get("job_id") == job.id
    named = "" if is_latest else f" {job.id}"  # steps 3 to 5 take the latest job by themselves
    if not ended(job):
        return print(f"\nNext: python check_fine_tune_status.py{named} --wait")
    if ended(job) != "succeeded":
        said = getattr(job.error, "message", None) or "the server gives no reason"
        fault = getattr(job.error, "param", None)  # what the server holds to be wrong
        step = f"fine_tune.py {record.get('training_file_path', '')}"
        if fault in ("training_file", "validation_file"):
            path = record.get(f"{fault}_path", "FILE")
            step = f'prepare_training_data.py {path} -o {path} --system ""'
        sys.exit(f"\nJob {ended(job)}: {said.rstrip('.')}. Next: python {step}")
    best = show_checkpoints(client, job, record)
    if "job_id" in record and job.fine_tuned_model:  # the job was ordered from this folder
        path = Path("fine_tune_job.json" if is_latest else f"fine_tune_jobs/{job.id}.json")
        path.write_text(json.dumps({**record, "fine_tuned_model": job.fine_tuned_model}, indent=2))
    if str(job.fine_tuned_model).startswith("ft:"):  # OpenAI, local API: it answers at once
        return print(f"\nNext: python use_fine_tuned_model.py{best or named}")
    print("\nThis server answers after you have deployed the model there (docs/providers.md).")
    print('Next: python use_fine_tuned_model.py NAME_OF_THE_DEPLOYMENT "..." --system "..."')


def show_checkpoints(client, job, record: dict) -> str:
    """Print and note the model after each epoch; return " BEST" if the last is over-fitted."""
    try:
        checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id, limit=50).data
    except openai.NotFoundError:  # a server without checkpoints
        return ""
    record["checkpoints"] = [one.fine_tuned_model_checkpoint for one in checkpoints]
    print("\nCheckpoints:")
    validated = []  # [(validation loss, step, model)]
    for checkpoint in sorted(checkpoints, key=lambda checkpoint: checkpoint.step_number):
        metrics, model = [dict(checkpoint.metrics)], checkpoint.fine_tuned_model_checkpoint
        line = f"  step {checkpoint.step_number:<5}"
        for loss in curve(metrics, "train_loss"):  # one, or none
            line += f"  train_loss {loss:.3f}"
        for loss in curve(metrics, "full_valid_loss", "valid_loss"):
            line += f"  valid_loss {loss:.3f}"
            validated.append((loss, checkpoint.step_number, model))
        print(f"{line}  {model}")
    if not validated:
        return ""
    lowest, step, best = min(validated)
    last = validated[-1][0]
    if last <= OVERFIT * lowest:
        return ""
    print(f"\nOver-fitting: validation loss rose from {lowest:.3f} (step {step}) to {last:.3f}.")
    return f" {best}"


def list_jobs(limit: int = 20) -> list[dict]:
    """Return the newest jobs, as the API describes them: [{"id", "status", "model", ...}]."""
    return [job.model_dump() for job in connect().fine_tuning.jobs.list(limit=limit).data]


def check(args: argparse.Namespace) -> None:
    if args.cancel:
        job = connect().fine_tuning.jobs.cancel(args.cancel)
        return print(f"Job {job.id}: {ended(job) or job.status}")
    if args.list and args.json:
        return print(json.dumps(list_jobs(), indent=2))
    if args.list:
        for row in list_jobs():
            print(f"{row['id']:<34}{row['status']:<18}{row['fine_tuned_model'] or row['model']}")
        return
    job_id = args.job_id or read_job().get("job_id")
    if not job_id:
        sys.exit("No fine_tune_job.json is here: run python fine_tune.py, name a job, or --list.")
    wait_for_training(job_id) if args.wait else check_status(job_id)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Step 3: look at a fine-tuning job, or follow it.")
    parser.add_argument("job_id", nargs="?", help="default: the job in fine_tune_job.json")
    parser.add_argument("--wait", action="store_true", help="follow the job to its end")
    parser.add_argument("--list", action="store_true", help="show the newest jobs")
    parser.add_argument("--json", action="store_true", help="with --list: as JSON")
    parser.add_argument("--cancel", metavar="JOB_ID", help="cancel a job")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    try:
        check(args)
    except (openai.APIError, json.JSONDecodeError, AttributeError) as error:
        if isinstance(error, AttributeError) and not isinstance(error.obj, str | list | None):
            raise  # a slip in this script; only a server's nonsense gives a str, list or None
        sys.exit(explain(error))
    except KeyboardInterrupt:
        print("\nInterrupted here, not at the server; look again.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
