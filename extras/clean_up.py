"""Delete from the server what a job has left there: its files and its model.

Needs   a job that has ended: its id, or the record of the latest one in fine_tune_job.json.
Leaves  everything as it is, and shows it. With --yes the files, the model and the job's record in
        this folder are gone for good, and fine_tune.py trains anew.
Omits   the job and its events, which servers keep.

    python extras/clean_up.py                        # show what the latest job has left
    python extras/clean_up.py ftjob-abc123 --yes     # delete what this job has left
"""

import argparse
import json
import os
import sys
from pathlib import Path

try:
    import openai
    from dotenv import load_dotenv
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is missing: activate .venv, or pip install -r requirements.txt")

RECORD = Path("fine_tune_job.json")  # step 2 writes it; earlier jobs are fine_tune_jobs/JOBID.json
# What servers call a job that has ended. Any other word is taken for a job that still runs.
ENDED = ["succeeded", "success", "completed", "failed", "error", "user_error"]
ENDED += ["failed_validation", "cancelled", "canceled", "terminated"]


def explain(error: Exception) -> str:
    """Return what went wrong between us and the server, without the key."""
    key = os.environ.get("OPENAI_API_KEY", "")  # "local" is no secret
    said = str(error).replace(key, "[key]") if len(key) > 8 else str(error)
    return f"No success at {os.environ.get('OPENAI_BASE_URL') or 'OpenAI'}: {said}"


def clean_up(client: openai.OpenAI, job_id: str, really: bool) -> None:
    """Show what the job has left on the server; `really`: delete it."""
    job = client.fine_tuning.jobs.retrieve(job_id)
    uploads = {job.training_file, job.validation_file} - {None}
    for other in client.fine_tuning.jobs.list(limit=100):  # this job is among them
        runs = other.status.lower().replace(" ", "_") not in ENDED
        if runs and uploads & {other.training_file, other.validation_file}:
            sys.exit(f"Job {other.id} is {other.status} and reads the files: wait, or cancel it.")

    things = [("training file", job.training_file), ("validation file", job.validation_file)]
    things += [("result file", name) for name in job.result_files or []]
    things += [("model", job.fine_tuned_model)]
    for what, name in things:
        if not name:  # no validation file, or no model: the job has failed
            continue
        api = client.models if what == "model" else client.files
        try:
            api.retrieve(name)
            state = "there"
            if really:
                api.delete(name)
                state = "deleted"
        except openai.NotFoundError:
            state = "gone already"
        print(f"{what:<16}  {state:<12}  {name}")


def forget(job_id: str) -> None:
    """Delete the job's record here: step 2 would take the deleted model for a living one."""
    for path in (RECORD, Path("fine_tune_jobs", f"{job_id}.json")):
        if path.exists() and json.loads(path.read_text("utf-8"))["job_id"] == job_id:
            path.unlink()
            print(f"{'record':<16}  {'deleted':<12}  {path}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Delete a job's files and model from the server.")
    parser.add_argument("job_id", nargs="?", help="default: the job in fine_tune_job.json")
    parser.add_argument("--yes", action="store_true", help="delete; without it they are shown")
    args = parser.parse_args(argv)
    if not (args.job_id or RECORD.exists()):
        sys.exit(f"No {RECORD} here: name a job. All: python check_fine_tune_status.py --list")
    job_id = args.job_id or json.loads(RECORD.read_text("utf-8"))["job_id"]
    load_dotenv()
    try:
        client = openai.OpenAI()  # of the server that OPENAI_BASE_URL and OPENAI_API_KEY name
        clean_up(client, job_id, args.yes)
    except openai.OpenAIError as error:
        sys.exit(explain(error))
    except KeyboardInterrupt:
        sys.exit(130)
    if args.yes:
        forget(job_id)
    else:
        print(f"\nNothing is deleted yet. Next: python extras/clean_up.py {job_id} --yes")


if __name__ == "__main__":
    main()
