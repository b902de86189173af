"""Train one fine-tuning job: a LoRA adapter on a base model, in a process of its own, over a job directory.

    python -m local_api.train JOB_DIR

Reads    job.json        base model, data files, hyperparameters, seed
Writes   events.jsonl    one line per step, as it happens; the server copies them into the job's events
         checkpoints/    step-N/ after every epoch: an adapter and its metrics (the last three are kept)
         resume/         what it takes to go on after an interruption
         adapter/        the trained adapter, in PEFT's standard format
         result.csv      the figures of every step, in the API's columns
         outcome.json    succeeded or failed, written last

Stopped (SIGTERM) and started again on the same directory it goes on from where it was. It knows nothing of HTTP or of
the server's database, so it can also be run by hand or through a launcher.
"""

from __future__ import annotations

import csv
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from prepare_training_data import auto_epochs

from . import base_models
from .encoding import Encoded, EncodingError, encode_example

BASE_LEARNING_RATE = 1e-3  # high for LoRA, right for a small model and few examples; learning_rate_multiplier scales it
# Rank 16 is the most that vLLM takes by default.
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "bias": "none", "target_modules": "all-linear"}
AUTO_BATCH_SIZE = 2  # few examples and short answers: many small steps learn more than few large ones
AUTO_LEARNING_RATE_MULTIPLIER = 1.0
WARMUP_SHARE = 0.06  # of all steps; then the rate falls linearly to zero
MAX_GRADIENT_NORM = 1.0
TOKENS_AT_ONCE = 4096  # a larger batch is computed in parts of about this many tokens, to bound memory
MAX_TOKENS_PER_EXAMPLE = 65_536  # the API's limit; longer examples are cut from the end
KEPT_CHECKPOINTS = 3  # the API keeps those of the last three epochs
VALIDATIONS_PER_EPOCH = 4  # quick looks at one validation batch, beside the full pass after each epoch
PROGRESS_SECONDS = 5.0  # how often the expected end is reported


class JobFailed(Exception):
    """The job cannot go on; carries the API's error fields."""

    def __init__(self, code: str, message: str, param: str | None = None):
        super().__init__(message)
        self.error: dict[str, Any] = {"code": code, "message": message, "param": param}


class Row(NamedTuple):
    """Figures of one step, as the events and the result file show them."""

    step: int
    train_loss: float
    train_accuracy: float
    valid_loss: float | None = None
    valid_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_accuracy: float | None = None


# --- the data ---


def read_examples(path: str, tokenizer: Any, limit: int, param: str) -> list[Encoded]:
    """Encode every line of a training or validation file; JobFailed names the line that cannot be used."""
    examples = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                encoded = encode_example(tokenizer, json.loads(line))
            except (EncodingError, ValueError, KeyError, TypeError) as error:
                raise JobFailed(f"invalid_{param}", f"Invalid file format. Line {number}: {error}.", param) from None
            encoded = Encoded(encoded.ids[:limit], encoded.trained[:limit])
            if any(encoded.trained):  # a row whose answer was cut off whole teaches nothing
                examples.append(encoded)
    if not examples:
        raise JobFailed(f"invalid_{param}", "No line of the file holds an assistant message to train on.", param)
    return examples


def resolve(asked: dict, n_examples: int) -> dict:
    """Replace "auto" by numbers; epochs as step 1 of the tutorial announces them."""
    epochs = asked.get("n_epochs", "auto")
    batch_size = asked.get("batch_size", "auto")
    multiplier = asked.get("learning_rate_multiplier", "auto")
    return {
        "n_epochs": auto_epochs(n_examples) if epochs == "auto" else epochs,
        "batch_size": min(AUTO_BATCH_SIZE if batch_size == "auto" else batch_size, n_examples),
        "learning_rate_multiplier": AUTO_LEARNING_RATE_MULTIPLIER if multiplier == "auto" else multiplier,
    }


def epoch_batches(examples: list[Encoded], batch_size: int, seed: int, epoch: int) -> list[list[Encoded]]:
    """Return the epoch's batches, in an order that depends on the seed alone.

    Rows of like length share a batch, which saves padding; they are sorted within pools, so that chance still decides.
    """
    order = random.Random(f"{seed}/{epoch}")
    shuffled = order.sample(examples, len(examples))
    pool = 16 * batch_size
    for start in range(0, len(shuffled), pool):
        shuffled[start : start + pool] = sorted(shuffled[start : start + pool], key=lambda row: len(row.ids))
    batches = [shuffled[start : start + batch_size] for start in range(0, len(shuffled), batch_size)]
    order.shuffle(batches)
    return batches


def parts(batch: list[Encoded]) -> list[list[Encoded]]:
    """Cut a batch into parts of at most about TOKENS_AT_ONCE tokens, padding included."""
    result: list[list[Encoded]] = []
    for row in sorted(batch, key=lambda e: len(e.ids)):
        if result and (len(result[-1]) + 1) * len(row.ids) <= TOKENS_AT_ONCE:
            result[-1].append(row)
        else:
            result.append([row])
    return result


# --- the model ---


def losses(model: Any, rows: list[Encoded], pad_id: int) -> tuple[Any, int, int]:
    """Return (summed cross-entropy over trained tokens, how many were predicted right, how many there are).

    Rows are padded on the left: the answers then stand together at the end, and the large output layer is computed for
    that tail alone.
    """
    import torch

    device, width = model.device, max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    attended, trained = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        start = width - len(row.ids)
        ids[i, start:] = torch.tensor(row.ids)
        attended[i, start:] = 1
        trained[i, start + 1 :] = torch.tensor(row.trained[1:])  # the first token is predicted from nothing
    tail = width - int(trained.any(0).nonzero()[0])
    positions = (attended.cumsum(1) - 1).clamp(min=0)
    output = model(
        input_ids=ids.to(device),
        attention_mask=attended.to(device),
        position_ids=positions.to(device),
        use_cache=False,
        logits_to_keep=tail + 1,
    )
    wanted = trained[:, -tail:].to(device)
    logits = output.logits[:, :-1][wanted].float()  # (trained tokens, vocabulary)
    targets = ids[:, -tail:].to(device)[wanted]
    right = int((logits.detach().argmax(-1) == targets).sum())
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum"), right, len(targets)


def mean_losses(model: Any, rows: list[Encoded], pad_id: int) -> tuple[float, float]:
    """Return (mean loss, token accuracy) of validation rows; nothing is learnt."""
    import torch

    total, right, count = 0.0, 0, 0
    with torch.no_grad():
        for part in parts(rows):
            loss, hits, tokens = losses(model, part, pad_id)
            total, right, count = total + loss.item(), right + hits, count + tokens
    return total / count, right / count


def add_lora(model: Any, adapter: str | None, base_model: str) -> Any:
    """Freeze the base model and put a LoRA adapter on its linear layers: a new one, or `adapter` to train further."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if adapter:
        return PeftModel.from_pretrained(model, adapter, is_trainable=True, autocast_adapter_dtype=False)
    # No cast to float32: the exact values live in the Optimizer, the layers compute in the model's precision.
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA), autocast_adapter_dtype=False)
    is_default = base_model == base_models.DEFAULT_BASE_MODEL
    model.peft_config["default"].base_model_name_or_path = base_models.DEFAULT_HUB_ID if is_default else base_model
    return model


class Optimizer:
    """AdamW on float32 copies of the adapter: in bfloat16 most updates would be too small to change a weight."""

    def __init__(self, model: Any, learning_rate: float, total_steps: int):
        import torch

        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.exact = [weight.detach().float().clone() for weight in self.weights]
        self.adamw = torch.optim.AdamW(self.exact, lr=learning_rate, weight_decay=0.0)
        warmup = max(1, round(WARMUP_SHARE * total_steps))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.adamw, lambda step: min((step + 1) / warmup, (total_steps - step) / max(1, total_steps - warmup))
        )

    def step(self) -> None:
        import torch

        for exact, weight in zip(self.exact, self.weights, strict=True):
            exact.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.exact, MAX_GRADIENT_NORM)
        self.adamw.step()
        self.schedule.step()
        self.copy_back()

    def copy_back(self) -> None:
        for exact, weight in zip(self.exact, self.weights, strict=True):
            weight.data.copy_(exact)

    def state(self) -> dict:
        return {"exact": self.exact, "adamw": self.adamw.state_dict(), "schedule": self.schedule.state_dict()}

    def restore(self, state: dict) -> None:
        for exact, saved in zip(self.exact, state["exact"], strict=True):
            exact.copy_(saved)
        self.adamw.load_state_dict(state["adamw"])
        self.schedule.load_state_dict({**self.schedule.state_dict(), **state["schedule"]})
        self.copy_back()


# --- what the job leaves behind ---


class Journal:
    """Appends to events.jsonl; after a restart, steps that were reported before are not reported twice."""

    def __init__(self, path: Path):
        self.reported = 0
        if path.exists():
            text = path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]  # a kill can leave half a line behind
            if whole != text:
                os.truncate(path, len(whole))
            lines = [json.loads(line) for line in whole.splitlines()]
            self.reported = max((line["data"]["step"] for line in lines if line.get("type") == "metrics"), default=0)
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open for the life of the process

    def write(self, line: dict) -> None:
        self.file.write(json.dumps({"created_at": int(time.time()), **line}, ensure_ascii=False) + "\n")
        self.file.flush()

    def message(self, text: str, level: str = "info") -> None:
        self.write({"level": level, "type": "message", "message": text, "data": None})

    def metrics(self, row: Row, total_steps: int) -> None:
        if row.step <= self.reported:
            return
        losses = {"training": row.train_loss, "validation": row.valid_loss, "full validation": row.full_valid_loss}
        text = ", ".join(f"{name} loss={value:.2f}" for name, value in losses.items() if value is not None)
        message = f"Step {row.step}/{total_steps}: {text}"
        data = {"step": row.step, "total_steps": total_steps, **api_metrics(row)}
        self.write({"level": "info", "type": "metrics", "message": message, "data": data})


def api_metrics(row: Row) -> dict:
    """Return a step's figures under the names of the API's events and checkpoints; absent ones are left out."""
    figures = {
        "train_loss": row.train_loss,
        "train_mean_token_accuracy": row.train_accuracy,
        "valid_loss": row.valid_loss,
        "valid_mean_token_accuracy": row.valid_accuracy,
        "full_valid_loss": row.full_valid_loss,
        "full_valid_mean_token_accuracy": row.full_valid_accuracy,
    }
    return {name: round(value, 5) for name, value in figures.items() if value is not None}


def write_whole(target: Path, fill: Any) -> None:
    """Let `fill(folder)` make a folder and put it in place of `target` at once: never half of it."""
    scratch = target.with_name(f".{target.name}.new")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    fill(scratch)
    for path in scratch.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    shutil.rmtree(target, ignore_errors=True)
    os.replace(scratch, target)


def save_adapter(model: Any, folder: Path, metrics: dict | None = None) -> None:
    # save_embedding_layers=False: PEFT would otherwise ask the hub whether the vocabulary was changed.
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")


def save_resume_state(job_dir: Path, optimizer: Optimizer, step: int, rows: list[Row]) -> None:
    import torch

    def fill(folder: Path) -> None:
        torch.save(
            {"optimizer": optimizer.state(), "step": step, "rows": [list(row) for row in rows]}, folder / "state.pt"
        )

    write_whole(job_dir / "resume", fill)


def load_resume_state(job_dir: Path, optimizer: Optimizer) -> tuple[int, list[Row]]:
    """Return (steps done, their figures) and bring the optimizer there; (0, []) for a fresh job."""
    import torch

    path = job_dir / "resume" / "state.pt"
    if not path.exists():
        return 0, []
    state = torch.load(path, weights_only=True)
    optimizer.restore(state["optimizer"])
    return state["step"], [Row(*row) for row in state["rows"]]


def write_result_csv(path: Path, rows: list[Row]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"])
        for row in rows:
            figures = (row.train_loss, row.train_accuracy, row.valid_loss, row.valid_accuracy)
            writer.writerow([row.step, *("" if figure is None else round(figure, 5) for figure in figures)])


def failed(code: str, message: str, param: str | None = None) -> dict:
    return {"status": "failed", "error": {"code": code, "message": message, "param": param}}


def write_outcome(job_dir: Path, outcome: dict) -> None:
    scratch = job_dir / ".outcome.json.new"
    scratch.write_text(json.dumps(outcome), encoding="utf-8")
    os.replace(scratch, job_dir / "outcome.json")


# --- the job ---


def train(job_dir: Path, stop: dict) -> dict | None:
    """Run the job to its end and return its outcome, or None if `stop["asked"]` became true and it can go on later."""
    import torch

    job = json.loads((job_dir / "job.json").read_text(encoding="utf-8"))
    journal = Journal(job_dir / "events.jsonl")
    torch.manual_seed(job["seed"])
    model, tokenizer = base_models.load(Path(job["model_dir"]))
    limit = min(MAX_TOKENS_PER_EXAMPLE, getattr(model.config, "max_position_embeddings", MAX_TOKENS_PER_EXAMPLE))
    examples = read_examples(job["training_file"], tokenizer, limit, "training_file")
    validation = []
    if job.get("validation_file"):
        validation = read_examples(job["validation_file"], tokenizer, limit, "validation_file")
    settings = resolve(job["hyperparameters"], len(examples))
    epochs, batch_size = settings["n_epochs"], settings["batch_size"]
    steps_per_epoch = math.ceil(len(examples) / batch_size)
    total_steps = epochs * steps_per_epoch
    journal.write({"type": "update", "hyperparameters": settings})

    model = add_lora(model, job.get("adapter"), job["base_model"])
    optimizer = Optimizer(model, BASE_LEARNING_RATE * settings["learning_rate_multiplier"], total_steps)
    done, rows = load_resume_state(job_dir, optimizer)
    if done:
        journal.message(f"Training goes on from step {done}.")
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    look_every = max(1, steps_per_epoch // VALIDATIONS_PER_EPOCH)
    started, reported_at = time.monotonic(), -PROGRESS_SECONDS

    for step in range(done + 1, total_steps + 1):
        epoch, index = divmod(step - 1, steps_per_epoch)
        batch = epoch_batches(examples, batch_size, job["seed"], epoch)[index]
        row = train_step(model, optimizer, batch, pad_id, step)
        epoch_ends = index + 1 == steps_per_epoch
        if validation and (epoch_ends or step % look_every == 0):
            row = validate(model, row, validation, pad_id, batch_size, whole=epoch_ends)
        rows.append(row)
        journal.metrics(row, total_steps)
        if epoch_ends:
            save_checkpoint(job_dir, model, optimizer, row, rows)
        if time.monotonic() - reported_at >= PROGRESS_SECONDS:
            reported_at = time.monotonic()
            per_step = (reported_at - started) / (step - done)
            journal.write({"type": "update", "estimated_finish": int(time.time() + per_step * (total_steps - step))})
        if stop["asked"] and step < total_steps:
            save_resume_state(job_dir, optimizer, step, rows)
            return None

    write_whole(job_dir / "adapter", lambda folder: save_adapter(model, folder))
    write_result_csv(job_dir / "result.csv", rows)
    return {"status": "succeeded", "trained_tokens": epochs * sum(len(example.ids) for example in examples)}


def train_step(model: Any, optimizer: Optimizer, batch: list[Encoded], pad_id: int, step: int) -> Row:
    """One update of the adapter: the mean loss over the batch's trained tokens, whatever parts it is computed in."""
    count = sum(sum(row.trained[1:]) for row in batch)
    total, right = 0.0, 0
    model.train()
    for part in parts(batch):
        loss, hits, _ = losses(model, part, pad_id)
        (loss / count).backward()
        total, right = total + loss.item(), right + hits
    optimizer.step()
    if not math.isfinite(total):
        sentence = f"The training loss is no number at step {step}; choose a lower learning_rate_multiplier."
        raise JobFailed("training_diverged", sentence, "learning_rate_multiplier")
    return Row(step, total / count, right / count)


def validate(model: Any, row: Row, validation: list[Encoded], pad_id: int, batch_size: int, whole: bool) -> Row:
    """Add validation figures to a step: of a small batch in passing, of the whole validation file after an epoch."""
    model.eval()
    start = (row.step * batch_size) % len(validation)
    loss, accuracy = mean_losses(model, (validation + validation)[start : start + batch_size], pad_id)
    row = row._replace(valid_loss=loss, valid_accuracy=accuracy)
    if whole:
        loss, accuracy = mean_losses(model, validation, pad_id)
        row = row._replace(full_valid_loss=loss, full_valid_accuracy=accuracy)
    return row


def save_checkpoint(job_dir: Path, model: Any, optimizer: Optimizer, row: Row, rows: list[Row]) -> None:
    """Keep the adapter as it is after an epoch, and only the last KEPT_CHECKPOINTS of them."""
    folder = job_dir / "checkpoints"
    metrics = {
        "step_number": row.step,
        "created_at": int(time.time()),
        "metrics": {"step": row.step, **api_metrics(row)},
    }
    write_whole(folder / f"step-{row.step}", lambda place: save_adapter(model, place, metrics))
    kept = sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    for old in kept[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old)
    save_resume_state(job_dir, optimizer, row.step, rows)


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1 or not (Path(arguments[0]) / "job.json").is_file():
        print("Usage: python -m local_api.train JOB_DIR   (a directory that holds job.json)", file=sys.stderr)
        return 2
    base_models.share_processor()
    if hasattr(os, "nice"):
        os.nice(5)  # answers go before training
    job_dir, stop = Path(arguments[0]), {"asked": False}
    for name in ("SIGTERM", "SIGBREAK"):  # the second is how Windows asks
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: stop.update(asked=True))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the server's terminal reaches us too; the server decides
    try:
        outcome = train(job_dir, stop)
    except JobFailed as failure:
        outcome = failed(**failure.error)
    except base_models.ModelUnavailable as failure:
        outcome = failed("model_unavailable", str(failure), "model")
    except MemoryError:
        cure = "use a smaller batch_size, shorter examples or a smaller model"
        outcome = failed("out_of_memory", f"The trainer ran out of memory; {cure}.")
    except OSError as failure:  # a full disk, a folder taken away
        outcome = failed("storage_error", f"The trainer could not use its files: {failure.strerror or failure}.")
    if outcome is None:
        return 0
    write_outcome(job_dir, outcome)
    return 0 if outcome["status"] == "succeeded" else 1


if __name__ == "__main__":
    raise SystemExit(main())
