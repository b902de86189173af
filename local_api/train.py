"""Train one fine-tuning job: a LoRA adapter on a base model, in a process of its own, over a job directory.

    python -m local_api.train JOB_DIR

Reads    job.json        base model, data files, hyperparameters, seed
Writes   events.jsonl    one line per step, as it happens; the server copies them into the job's events
         checkpoints/    step-N/ after every epoch: an adapter and its metrics (the last three are kept)
         resume.pt       what it takes to go on after an interruption: after every epoch and every five minutes
         adapter/        the trained adapter, in PEFT's standard format
         result.csv      the figures of every step, in the API's columns
         outcome.json    succeeded or failed, written last

Stopped (SIGTERM) and started again on the same directory it goes on from where it was. It knows nothing of HTTP or of
the server's database, so it can also be run by hand.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from . import base_models
from .encoding import Encoded, read_examples
from .job_files import Journal, flush_directory, write_adapter, write_results, write_whole
from .processes import LATER, TRY_LATER, lock_job
from .step import (
    BASE_LEARNING_RATE,
    Optimizer,
    add_lora,
    epoch_batches,
    mean_losses,
    quicken,
    train_step,
)
from .validation import JobFailed

AUTO_BATCH_SIZE = 2  # few examples and short answers: many small steps learn more than few large ones
AUTO_LEARNING_RATE_MULTIPLIER = 1.0
MAX_TOKENS_PER_EXAMPLE = 65_536  # the API's limit; longer examples are cut from the end
KEPT_CHECKPOINTS = 3  # the API keeps those of the last three epochs
SAVE_SECONDS = 300.0  # at most so much work is repeated after a crash, however long an epoch is
VALIDATIONS_PER_EPOCH = 4  # quick looks at one validation batch, beside the full pass after each epoch


# --- what the job is given ---


def resolve(asked: dict, n_examples: int) -> dict:
    """Replace "auto" by numbers."""
    auto = {
        "n_epochs": auto_epochs(n_examples),
        "batch_size": AUTO_BATCH_SIZE,
        "learning_rate_multiplier": AUTO_LEARNING_RATE_MULTIPLIER,
    }
    resolved = {name: auto[name] if asked.get(name, "auto") == "auto" else asked[name] for name in auto}
    return {**resolved, "batch_size": min(resolved["batch_size"], n_examples)}


def auto_epochs(examples: int) -> int:
    """Return the epochs that "auto" chooses: 3, but 1 to 25 to have 100 to 25,000 examples in all.

    Source: https://github.com/openai/openai-cookbook, examples/Chat_finetuning_data_prep.ipynb
    """
    if examples * 3 < 100:
        return min(25, 100 // max(1, examples))
    return 3 if examples * 3 <= 25_000 else max(1, 25_000 // examples)


class Plan(NamedTuple):
    """What a job comes to, once its files are read."""

    batches: list[list[Encoded]]  # one for each step
    validation: list[Encoded]
    batch_size: int
    steps_per_epoch: int
    learning_rate: float
    trained_tokens: int


def make_plan(job: dict, model: Any, tokenizer: Any, journal: Journal) -> Plan:
    """Read the job's files and settle its settings; the journal gets them, and what is to be said of the rows."""
    limit = min(MAX_TOKENS_PER_EXAMPLE, getattr(model.config, "max_position_embeddings", MAX_TOKENS_PER_EXAMPLE))
    examples = read_examples(job["training_file"], tokenizer, limit, "training_file", journal.warn)
    path = job.get("validation_file")
    validation = read_examples(path, tokenizer, limit, "validation_file", journal.warn) if path else []
    settings = resolve(job["hyperparameters"], len(examples))
    journal.write(type="update", hyperparameters=settings)
    n_epochs, size = settings["n_epochs"], settings["batch_size"]
    batches = [batch for epoch in range(n_epochs) for batch in epoch_batches(examples, size, job["seed"], epoch)]
    rate = BASE_LEARNING_RATE * settings["learning_rate_multiplier"]
    tokens = n_epochs * sum(len(example.ids) for example in examples)
    return Plan(batches, validation, size, len(batches) // n_epochs, rate, tokens)


# --- what it leaves behind ---


def save_checkpoint(job_dir: Path, save: Callable, row: dict) -> None:
    """Keep the adapter as it is after an epoch, and only the last KEPT_CHECKPOINTS of them."""
    folder = job_dir / "checkpoints"
    folder.mkdir(exist_ok=True)
    flush_directory(job_dir)
    metrics = {"step_number": row["step"], "created_at": int(time.time()), "metrics": row}
    write_adapter(folder / f"step-{row['step']}", save, metrics)
    kept = sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    for old in kept[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old)


def load_resume_state(job_dir: Path, optimizer: Optimizer, journal: Journal) -> list[dict]:
    """Bring the optimizer to where it was and return the figures of the steps done; [] for a fresh job."""
    import torch

    path = job_dir / "resume.pt"
    if not path.exists():
        return []
    try:
        state = torch.load(path, weights_only=True)
        rows = state["rows"]
        optimizer.restore(state["optimizer"])
    except OSError:
        raise
    except Exception as error:  # torch names no exception of its own for a damaged file
        path.rename(path.with_name("resume.pt.damaged"))
        message = f"The saved state cannot be read ({type(error).__name__}); training starts over."
        journal.say(message, "warn")
        return []
    journal.say(f"Training goes on from step {len(rows)}.")
    return rows


# --- the job ---


def train(job_dir: Path, stop: dict) -> dict | None:
    """Run the job to its end and return its outcome, or None if `stop["asked"]` became true and it can go on later."""
    import torch

    job = json.loads((job_dir / "job.json").read_text(encoding="utf-8"))
    journal = Journal(job_dir / "events.jsonl")
    torch.manual_seed(job["seed"])
    model, tokenizer = base_models.load(Path(job["model_dir"]))
    plan = make_plan(job, model, tokenizer, journal)
    total_steps = len(plan.batches)

    model = add_lora(model, job.get("adapter"), job["base_model"])
    quicken(model, max(len(row.ids) for rows in [*plan.batches, plan.validation] for row in rows))
    optimizer = Optimizer(model, plan.learning_rate, total_steps)
    rows = load_resume_state(job_dir, optimizer, journal)
    for row in rows:  # those of which a power cut has taken the report
        journal.metrics(row, total_steps)
    saved_at = time.monotonic()

    for step in range(len(rows) + 1, total_steps + 1):
        loss, accuracy = train_step(model, optimizer, plan.batches[step - 1])
        rows.append(row_of_step(step, loss, accuracy, plan, partial(mean_losses, model)))

        epoch_ends = step % plan.steps_per_epoch == 0
        now, stop_asked = time.monotonic(), stop["asked"]
        journal.metrics(rows[-1], total_steps)
        if epoch_ends:
            save_checkpoint(job_dir, model.save_pretrained, rows[-1])
        if epoch_ends or stop_asked or now - saved_at >= SAVE_SECONDS:
            saved_at = now
            write_whole(job_dir / "resume.pt", partial(torch.save, {"optimizer": optimizer.state(), "rows": rows}))
        if stop_asked and step < total_steps:
            return None

    return finish(job_dir, model.save_pretrained, rows, journal, plan)


def row_of_step(step: int, loss: float, accuracy: float, plan: Plan, mean_losses: Callable) -> dict:
    """Return the figures of a step; JobFailed if its loss is no number.

    The validation file's are now and then those of one batch, another one each time, and after an epoch of all of it.
    """
    if not math.isfinite(loss):
        sentence = f"The training loss is no number at step {step}; choose a lower learning_rate_multiplier."
        raise JobFailed("training_diverged", sentence, "learning_rate_multiplier")
    figures = {"train_loss": loss, "train_mean_token_accuracy": accuracy}
    rows, epoch_ends = plan.validation, step % plan.steps_per_epoch == 0
    if rows and (epoch_ends or step % max(1, plan.steps_per_epoch // VALIDATIONS_PER_EPOCH) == 0):
        start = step * plan.batch_size % len(rows)
        batch = (rows + rows)[start : start + plan.batch_size]
        figures["valid_loss"], figures["valid_mean_token_accuracy"] = mean_losses(batch)
        if epoch_ends:
            figures["full_valid_loss"], figures["full_valid_mean_token_accuracy"] = mean_losses(rows)
    return {"step": step, **{name: round(figure, 5) for name, figure in figures.items()}}


def finish(job_dir: Path, save: Callable, rows: list[dict], journal: Journal, plan: Plan) -> dict:
    """Leave behind what was learnt, and return the outcome."""
    write_adapter(job_dir / "adapter", save)
    write_whole(job_dir / "result.csv", lambda scratch: write_results(scratch, rows))
    os.fsync(journal.file.fileno())  # after the last word nobody reports a step again
    return {"status": "succeeded", "trained_tokens": plan.trained_tokens}


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1 or not (Path(arguments[0]) / "job.json").is_file():
        print("Usage: python -m local_api.train JOB_DIR   (a directory that holds job.json)", file=sys.stderr)
        return 2
    base_models.share_processor(base_models.BUSY_LOOPS)
    job_dir = Path(arguments[0])
    return run_job(job_dir, lambda stop: train(job_dir, stop))


def run_job(job_dir: Path, train: Callable[[dict], dict | None]) -> int:
    """Run a trainer as a process of its own: `train(stop)` returns its outcome, or None. Return the exit code."""
    if hasattr(os, "nice"):
        os.nice(5)  # answers go before training
    stop = {"asked": False}
    for name in ("SIGTERM", "SIGBREAK"):  # the second is how Windows asks
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: stop.update(asked=True))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the server's terminal reaches us too; the server decides
    release = None
    try:
        is_first = os.environ.get("RANK", "0") == "0"  # of several processes that train one job
        release = lock_job(job_dir) if is_first else None
        if is_first and not release:
            raise OSError("another trainer is at work in the job's directory")
        try:
            outcome = train(stop)
        except Exception as error:
            outcome = {"status": "failed", "error": job_failed(error).error}
        if outcome:
            text = json.dumps(outcome)
            write_whole(job_dir / "outcome.json", lambda scratch: scratch.write_text(text, encoding="utf-8"))
    except (OSError, base_models.ModelOutOfReach) as error:  # a full disk, a folder taken away: it goes on later
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        print(f"{LATER}{reason}.", file=sys.stderr)
        return TRY_LATER
    finally:
        if release:
            release()
    return 1 if outcome and outcome["status"] == "failed" else 0


def job_failed(error: Exception) -> JobFailed:
    """Return what a job says of an error that its data, hyperparameters or model bring about; raise any other."""
    if isinstance(error, JobFailed):
        return error
    if isinstance(error, base_models.ModelOutOfReach):  # may pass
        raise error
    if isinstance(error, base_models.ModelUnavailable):
        return JobFailed("model_not_available", str(error), "model")
    if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", str(error)):  # or a RuntimeError
        cure = "use a smaller batch_size, shorter examples or a smaller model"
        return JobFailed("out_of_memory", f"The trainer ran out of memory; {cure}.")
    raise error


if __name__ == "__main__":
    raise SystemExit(main())
