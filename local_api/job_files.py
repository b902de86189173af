"""How a trainer writes what it leaves in its job's directory: whole or not at all, and safe from a power cut."""

from __future__ import annotations

import csv
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Journal:
    """Appends to events.jsonl; after a restart, steps that were reported before are not reported twice."""

    def __init__(self, path: Path):
        text = path.read_bytes() if path.is_file() else b""
        reports, whole = whole_reports(text)
        if whole < len(text):
            os.truncate(path, whole)
        steps = [report["data"]["step"] for report in reports if report["type"] == "metrics"]
        self.reported = steps[-1] if steps else 0
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open for the life of the process

    def write(self, **line: Any) -> None:
        self.file.write(json.dumps({"created_at": int(time.time()), **line}, ensure_ascii=False) + "\n")
        self.file.flush()

    def say(self, message: str, level: str = "info", data: dict | None = None) -> None:
        self.write(level=level, type="message", message=message, data=data)

    def warn(self, message: str, data: dict) -> None:
        if not self.reported:
            self.say(message, "warn", data)

    def metrics(self, row: dict, total_steps: int) -> None:
        if row["step"] <= self.reported:
            return
        names = {"train_loss": "training", "valid_loss": "validation", "full_valid_loss": "full validation"}
        text = ", ".join(f"{name} loss={row[key]:.2f}" for key, name in names.items() if key in row)
        message = f"Step {row['step']}/{total_steps}: {text}"
        self.write(level="info", type="metrics", message=message, data={**row, "total_steps": total_steps})


def parse(text: bytes) -> dict:
    return json.loads(text, parse_constant=lambda constant: None)  # JSON knows no NaN and no Infinity


def whole_reports(text: bytes) -> tuple[list[dict], int]:
    """Return the reports before the first line that a kill or a power cut has spoilt, and how many bytes they take."""
    reports, size = [], 0
    for line in text.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            reports.append(parse(line))
        except ValueError:
            break
        size += len(line)
    return reports, size


def write_whole(target: Path, fill: Callable[[Path], Any]) -> None:
    """Let `fill(path)` write a file or a folder, and put it in place of `target` at once: never half of it."""
    process = os.environ.get("RANK", "0")  # of several that train one job, each may have the same to say
    scratch = target.with_name(f".{target.name}.{process}.new")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        fill(scratch)
    except Exception as error:  # the libraries complain of a full disk in many ways
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise OSError(f"{target.name} cannot be written ({reason})") from error
    for path in scratch.iterdir() if scratch.is_dir() else [scratch]:
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    if scratch.is_dir():
        flush_directory(scratch)
        shutil.rmtree(target, ignore_errors=True)
    os.replace(scratch, target)
    flush_directory(target.parent)


def flush_directory(directory: Path) -> None:
    """Make what was written under new names in this directory survive a power cut (Windows has no such call)."""
    if os.name != "nt":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_adapter(target: Path, save: Callable[..., None], metrics: dict | None = None) -> None:
    """Save an adapter, by PEFT's `save_pretrained`, and a checkpoint's metrics to a folder."""

    def fill(folder: Path) -> None:
        # save_embedding_layers=False: PEFT would otherwise ask the hub whether the vocabulary was changed.
        save(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        if metrics:
            (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")

    write_whole(target, fill)


def write_results(path: Path, rows: list[dict]) -> None:
    names = ("step", "train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"])
        writer.writerows([row.get(name, "") for name in names] for row in rows)
