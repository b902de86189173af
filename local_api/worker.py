"""Runs the jobs: validates their files, trains one after the other in a process of its own, records what comes of it.

The trainer (local_api/train.py) knows nothing of this server. The two meet in the job's directory:

    job.json         what to train: written here before the trainer starts
    training.jsonl   the job's own copies of its files (validation.jsonl too, if it has one)
    parent/          the adapter that training goes on from, for a job on a fine-tuned model
    events.jsonl     what the trainer reports: events, and updates of the job; read here while it runs
    checkpoints/step-N/   an adapter and its metrics.json, each
    adapter/         the final adapter in PEFT's format
    result.csv       the figures of each step
    outcome.json     the trainer's last word: succeeded or failed, and why
    trainer.log      its stderr

A job's status in the store is the one truth: a handler that cancels or pauses only changes it, and the thread here
sees that and stops the trainer. After a restart the store says what to go on with.

Only what its data, its hyperparameters or its model bring about ends a job (JobFailed). Any other fault may pass, be it
a full disk, a lock or a network that is away: the job keeps its status, an event says once what is in the way, and it
is tried again.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import psutil

from local_api.base_models import ModelOutOfReach, ModelUnavailable
from local_api.errors import explain
from local_api.jobs import add_event
from local_api.models import Models
from local_api.processes import LATER, STOP_SECONDS, stop_processes, trainer_of
from local_api.reports import Reports
from local_api.store import JOB, Document, Store, event_id, now
from local_api.train import job_failed
from local_api.validation import JobFailed, validate

POLL_SECONDS = 0.2
IDLE_SECONDS = 1.0  # after which a thread without work looks again, for what waited may be due
MAX_KILLS = 3  # a trainer that dies again and again, with no progress between, is not started for ever
SMALL_BYTES = 16 * 1024 * 1024  # of files that are validated beside larger ones
MAX_WAIT_SECONDS = 30.0  # how long a job that something hinders waits at most before it is tried again

log = logging.getLogger("local_api")


class JobWaits(Exception):
    """A job cannot go on now, and can later; the message is the sentence that says why."""


class Hindrance(NamedTuple):
    """How often a job was tried that something keeps from going on, when it is tried again, and what was said of it."""

    tries: int = 0
    until: float = 0.0  # time.monotonic
    told: str = ""


class Worker:
    """Three threads. One validates the large files of new jobs and one the small ones, which so wait for no large one.
    The third trains the queued jobs one at a time, in order."""

    def __init__(self, store: Store, models: Models, trainer_command: Sequence[str]):
        self.store, self.models = store, models
        self.trainer_command = list(trainer_command)
        self.stopping = 0.0  # when it was asked to stop (time.monotonic), else 0
        self.training = False
        self._hindrances: dict[str, Hindrance] = {}  # by job
        self._news = threading.Condition()
        lines = {
            "validate": (self._validate_job, lambda job: not self._is_small(job), "validating_files"),
            "validate small": (self._validate_job, self._is_small, "validating_files"),
            "train": (self._train_job, lambda job: True, "running", "queued"),
        }
        self._threads = {
            name: threading.Thread(target=self._loop, args=line, name=name, daemon=True) for name, line in lines.items()
        }

    def start(self) -> None:
        directories = filter(Path.is_dir, (self.store.data_dir / "jobs").iterdir())
        left_over = map(trainer_of, directories)  # their server was killed
        stop_processes([trainer for trainer in left_over if trainer])
        for thread in self._threads.values():
            thread.start()

    def wake(self) -> None:
        """Look for work at once: a job was made, or a client changed its status."""
        for job_id, hindrance in list(self._hindrances.items()):
            self._hindrances[job_id] = hindrance._replace(until=0.0)
        with self._news:
            self._news.notify_all()

    def ask_to_stop(self) -> None:
        """Have the trainer save its state and end. A signal handler calls this, so it takes no lock."""
        self.stopping = self.stopping or time.monotonic()

    def stop(self) -> None:
        """Wait for that, at most about STOP_SECONDS after it was asked for; jobs go on at the next start."""
        self.ask_to_stop()
        self.wake()
        if self._threads["train"].is_alive():  # what is being validated is validated anew
            self._threads["train"].join(max(0, self.stopping + STOP_SECONDS + 1 - time.monotonic()))

    def _loop(self, handle: Callable[[Document], None], is_mine: Callable[[Document], bool], *statuses: str) -> None:
        """Handle the oldest job of the first of these statuses that has one that can be tried, again and again."""
        while not self.stopping:
            try:
                where = "json_extract(document, '$.status') = ?"
                jobs = [job for status in statuses for job in self.store.find(JOB, where, (status,))]
                ready = next((job for job in jobs if self._may_try(job["id"]) and is_mine(job)), None)
            except Exception:  # a full disk, a deleted directory: the server lives
                log.exception("The worker cannot use the data directory; it tries again")
                ready = None
            if ready:
                self._handle_safely(handle, ready)
            else:
                with self._news:
                    self._news.wait(IDLE_SECONDS)

    def _is_small(self, job: Document) -> bool:
        try:
            return sum(path.stat().st_size for path in self.store.job_dir(job["id"]).glob("*.jsonl")) <= SMALL_BYTES
        except OSError:  # to validate it says what is in the way
            return True

    def _handle_safely(self, handle: Callable[[Document], None], job: Document) -> None:
        try:
            try:
                handle(job)
            except (JobFailed, ModelUnavailable) as error:
                self._fail(job["id"], job_failed(error))  # it raises a ModelOutOfReach anew: the job waits
            self._hindrances.pop(job["id"], None)
        except Exception as error:
            self._hinder(job["id"], error)

    def _may_try(self, job_id: str) -> bool:
        return self._hindrances.get(job_id, Hindrance()).until <= time.monotonic()

    def _hinder(self, job_id: str, error: Exception) -> None:
        """Let the job wait, longer each time, for what is in its way; say what that is when it is new."""
        if isinstance(error, (JobWaits, ModelOutOfReach)):
            reason = str(error)
        else:
            reason = explain(error).detail
            log.error("%s waits: %s", job_id, reason, exc_info=error)
        tries, _, told = self._hindrances.get(job_id, Hindrance())
        if told != reason:
            with contextlib.suppress(Exception):  # the database may be what is in the way: then at the next try
                add_event(self.store, job_id, f"The job waits and is tried again: {reason}", level="warn")
                told = reason
        until = time.monotonic() + min(MAX_WAIT_SECONDS, 2**tries)
        self._hindrances[job_id] = Hindrance(tries + 1, until, told)

    # Validation

    def _validate_job(self, job: Document) -> None:
        directory = self.store.job_dir(job["id"])
        for name, param in (("training", "training_file"), ("validation", "validation_file")):
            if job[param]:
                validate(directory / f"{name}.jsonl", param)
        with self.store.transaction():
            if self._status(job["id"]) == "validating_files":
                where = "json_extract(document, '$.status') IN ('running', 'queued')"
                before = " and ".join(other["id"] for other in self.store.find(JOB, where))
                told = f", behind {before}" if before else ""
                add_event(self.store, job["id"], f"Files validated, moving job to queued state{told}")
                self.store.update(JOB, job["id"], status="queued")
        self.wake()

    # Training

    def _train_job(self, job: Document) -> None:
        directory = self.store.job_dir(job["id"])
        reports = Reports(self.store, job["id"], directory)
        if self._take_outcome(reports):  # its trainer has ended while no server was there
            return
        if other := trainer_of(directory):
            stop_processes([other])
        weights = self.models.weights(job["_base"])
        with self.store.transaction():
            if self._status(job["id"]) not in ("queued", "running"):
                return  # cancelled or paused meanwhile
            is_new = add_event(self.store, job["id"], "Fine-tuning job started", id=event_id(job["id"], "started"))
            if not is_new and job["id"] not in self._hindrances:
                add_event(self.store, job["id"], "Fine-tuning job goes on from its last checkpoint")
            job = self.store.update(JOB, job["id"], status="running")
        self._write_job(job, directory, weights)
        with open(directory / "trainer.log", "ab") as trainer_log:
            begun = trainer_log.tell()
            trainer = self._start_trainer(directory, trainer_log)
        self.training, reports.first = True, None
        try:
            stopped = self._follow(trainer, reports)
        finally:
            self.training = False
        if not self._take_outcome(reports) and not stopped:
            self._record_death(trainer.returncode, job["id"], directory, said_since(directory / "trainer.log", begun))

    def _write_job(self, job: Document, directory: Path, weights: Path) -> None:
        validation, parent = directory / "validation.jsonl", directory / "parent"
        task = {
            "id": job["id"],
            "base_model": self.models.root_of(job["_base"]),
            "model_dir": str(weights),
            "adapter": str(parent) if parent.exists() else None,
            "training_file": str(directory / "training.jsonl"),
            "validation_file": str(validation) if validation.exists() else None,
            "hyperparameters": job["hyperparameters"],
            "seed": job["seed"],
        }
        with self.store.writing(directory / "job.json") as file:
            file.write(json.dumps(task, indent=2).encode())

    def _start_trainer(self, directory: Path, trainer_log: IO[bytes]) -> subprocess.Popen:
        path = os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")]))
        try:
            return subprocess.Popen(
                [*self.trainer_command, str(directory)],
                stdin=subprocess.DEVNULL,
                stdout=trainer_log,
                stderr=trainer_log,
                env={**os.environ, "PYTHONPATH": path},
                # A group of its own: Ctrl-C in the terminal reaches this server alone, which stops the trainer.
                start_new_session=os.name != "nt",
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # Windows' word for it
            )
        except (FileNotFoundError, PermissionError) as error:
            reason = f"{self.trainer_command[0]} cannot be started ({error.strerror}); see --launcher."
            raise JobWaits(reason) from None

    def _follow(self, trainer: subprocess.Popen, reports: Reports) -> bool:
        """Read the trainer's events until it ends; stop it when its job is no longer to run. True if it was stopped."""
        while trainer.poll() is None:
            to_run = not self.stopping
            if to_run and self._may_try(reports.job_id):
                try:
                    to_run = self._status(reports.job_id) == "running"
                    self._read(reports)
                except Exception as error:  # the trainer need not wait with it
                    self._hinder(reports.job_id, error)
            if not to_run:
                stop_processes([psutil.Process(trainer.pid)])
                trainer.wait()
                return True
            time.sleep(POLL_SECONDS)
        return bool(self.stopping)  # a service manager may have stopped the two together

    def _read(self, reports: Reports) -> None:
        reports.read()
        if reports.first:  # a new step: nothing is in the way any more
            self._hindrances.pop(reports.job_id, None)

    def _status(self, job_id: str) -> str | None:
        return (self.store.get(JOB, job_id) or {}).get("status")

    # The end of a job

    def _take_outcome(self, reports: Reports) -> bool:
        """Record the trainer's last word, if it has spoken it."""
        outcome = reports.outcome()
        self._read(reports)  # all that came before the last word is in the file by now
        if outcome is None:
            return False
        if outcome["status"] == "succeeded":
            reports.record_success(outcome)
        else:
            self._fail(reports.job_id, JobFailed(**outcome["error"]))
        return True

    def _fail(self, job_id: str, failure: JobFailed) -> None:
        with self.store.transaction():
            if self._status(job_id) in ("validating_files", "queued", "running"):
                add_event(self.store, job_id, f"The job failed: {failure}", level="error")
                end = {"status": "failed", "finished_at": now(), "estimated_finish": None, "error": failure.error}
                self.store.update(JOB, job_id, **end)

    def _record_death(self, returncode: int, job_id: str, directory: Path, said: list[str]) -> None:
        """The trainer ended without a last word: say what there is to wait for; too many such ends fail the job."""
        if hindered := [line for line in said if line.startswith(LATER)]:
            raise JobWaits(hindered[-1])
        # 0 without a last word: it was asked to stop, and has left behind where it was.
        if returncode in (0, -signal.SIGTERM):
            raise JobWaits("The trainer was stopped.")
        progress = max((path.stat().st_mtime_ns for path in directory.glob("resume*")), default=0)
        job = self.store.get(JOB, job_id) or {}
        times = job["_times_killed"] + 1 if job.get("_progress") == progress else 1
        self.store.update(JOB, job_id, _times_killed=times, _progress=progress)
        reason = f"The trainer stopped with exit code {returncode}: {last_line(said)}"
        if returncode < 0:
            reason = (
                f"The trainer was killed (signal {-returncode}); signal 9 mostly means that the machine ran out of "
                "memory: try a smaller batch_size or a smaller model."
            )
        raise JobWaits(reason) if times < MAX_KILLS else JobFailed("server_error", reason)


def said_since(path: Path, begun: int) -> list[str]:
    """Return the lines of a log from this byte on."""
    with open(path, "rb") as file:
        file.seek(begun)
        return [line.strip() for line in file.read().decode("utf-8", "replace").splitlines()]


def last_line(lines: list[str]) -> str:
    """Return the last line that says something: where a Python program has said what ended it."""
    said = [line for line in lines if any(letter.isalpha() for letter in line)]  # a launcher rules off its last words
    return said[-1].removeprefix("traceback : ")[:300] if said else "it said nothing."
