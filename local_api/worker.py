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
"""

import json
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import psutil

from local_api.base_models import ModelUnavailable
from local_api.errors import explain
from local_api.files import add_file
from local_api.jobs import add_event
from local_api.models import Models
from local_api.store import CHECKPOINT, JOB, MODEL, Document, Store, new_id, now
from local_api.train import KEPT_CHECKPOINTS
from local_api.validation import JobFailed, validate

POLL_SECONDS = 0.2
STOP_SECONDS = 8.0  # what a trainer gets to save its state; the whole server is to end within 10
MAX_KILLS = 3  # a trainer that something kills again and again is not started for ever

log = logging.getLogger("local_api")


class Worker:
    """Two threads: one validates the files of new jobs at once, one trains the queued jobs one at a time, in order."""

    def __init__(self, store: Store, models: Models, trainer_command: Sequence[str]):
        self.store, self.models = store, models
        self.trainer_command = list(trainer_command)
        self.stopping = 0.0  # when it was asked to stop (time.monotonic), else 0
        self.training = False
        self._news = threading.Condition()
        lines = {"validate": (self._validate_job, "validating_files"), "train": (self._train_job, "running", "queued")}
        self._threads = [
            threading.Thread(target=self._loop, args=line, name=name, daemon=True) for name, line in lines.items()
        ]

    def start(self) -> None:
        stop_processes(self._leftovers())
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        with self._news:
            self._news.notify_all()

    def ask_to_stop(self) -> None:
        """Have the trainer save its state and end. A signal handler calls this, so it takes no lock."""
        self.stopping = self.stopping or time.monotonic()

    def stop(self) -> None:
        """Wait for that, at most about STOP_SECONDS after it was asked for; jobs go on at the next start."""
        self.ask_to_stop()
        self.wake()
        for thread in self._threads:
            thread.join(max(0, self.stopping + STOP_SECONDS + 1 - time.monotonic()))

    def _loop(self, handle: Callable[[Document], None], *statuses: str) -> None:
        """Handle the oldest job of the first of these statuses that has one, again and again."""
        while not self.stopping:
            try:
                where = "json_extract(document, '$.status') = ?"
                waiting = [job for status in statuses for job in self.store.find(JOB, where, (status,), limit=1)]
                if waiting:
                    self._handle_safely(handle, waiting[0])
                    continue
            except Exception:  # a full disk, a deleted directory: the server lives
                log.exception("The worker cannot use the data directory; it tries again in 5 s")
                time.sleep(5)
            with self._news:
                self._news.wait(1)

    def _handle_safely(self, handle: Callable[[Document], None], job: Document) -> None:
        try:
            handle(job)
        except JobFailed as failure:
            self._fail(job["id"], failure)
        except Exception as error:
            log.exception("%s failed", job["id"])
            self._fail(job["id"], JobFailed("server_error", explain(error).detail))

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
        if self._take_outcome(job["id"], directory):  # the trainer had finished when this server was not there to see
            return
        try:
            weights = self.models.weights(job["_base"])
        except ModelUnavailable as error:
            raise JobFailed("model_not_available", str(error), "model") from None
        started_before = (directory / "job.json").exists()
        if started_before:  # what its trainer reported while no server was there comes first
            self._read_events(job["id"], directory)
        with self.store.transaction():
            status = self._status(job["id"])
            if status not in ("queued", "running"):
                return  # cancelled or paused meanwhile
            how = "goes on from its last checkpoint" if started_before else "started"
            add_event(self.store, job["id"], f"Fine-tuning job {how}")
            job = self.store.update(JOB, job["id"], status="running")
        self._write_job(job, directory, weights)
        with open(directory / "trainer.log", "ab") as trainer_log:
            try:
                trainer = self._start_trainer(directory, trainer_log)
            except OSError as error:
                reason = f"{self.trainer_command[0]} cannot be started ({error.strerror}); see --launcher."
                raise JobFailed("server_error", reason) from None
        self.training = True
        try:
            stopped = self._follow(trainer, job["id"], directory)
        except BaseException:  # a full disk, for instance: two trainers in one directory would be worse
            stop_processes([psutil.Process(trainer.pid)])
            raise
        finally:
            self.training = False
        self._read_events(job["id"], directory)
        if not self._take_outcome(job["id"], directory) and not stopped:
            self._record_death(trainer.returncode, job["id"], directory)

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
        return subprocess.Popen(
            [*self.trainer_command, str(directory)],
            stdin=subprocess.DEVNULL,
            stdout=trainer_log,
            stderr=trainer_log,
            env={**os.environ, "PYTHONPATH": path},
            # A group of its own: Ctrl-C in the terminal reaches this server alone, which stops the trainer in peace.
            start_new_session=os.name != "nt",
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # Windows' word for it
        )

    def _follow(self, trainer: subprocess.Popen, job_id: str, directory: Path) -> bool:
        """Read the trainer's events until it ends; stop it when its job is no longer to run. True if it was stopped."""
        while trainer.poll() is None:
            if self.stopping or self._status(job_id) != "running":
                stop_processes([psutil.Process(trainer.pid)])
                trainer.wait()
                return True
            self._read_events(job_id, directory)
            time.sleep(POLL_SECONDS)
        return bool(self.stopping)  # a service manager may have stopped the two together

    def _status(self, job_id: str) -> str | None:
        return (self.store.get(JOB, job_id) or {}).get("status")

    def _leftovers(self) -> list[psutil.Process]:
        """Return the trainers of this data directory that outlived their server, because that was killed."""
        of_this_server = {(self.trainer_command[-1], str(path)) for path in self.store.job_dir("").iterdir()}
        running = psutil.process_iter(["cmdline"])
        return [process for process in running if tuple((process.info["cmdline"] or [])[-2:]) in of_this_server]

    def _read_events(self, job_id: str, directory: Path) -> None:
        """Move what the trainer has written since the last time into the store: complete lines only, each once."""
        try:
            with open(directory / "events.jsonl", "rb") as file:
                job = self.store.get(JOB, job_id) or {}
                file.seek(job.get("_events_read", 0))
                new = file.read()
        except FileNotFoundError:
            return
        complete = new[: new.rfind(b"\n") + 1]
        if not complete:
            return
        with self.store.transaction():
            job = self.store.get(JOB, job_id) or {}
            changes: Document = {"_events_read": job["_events_read"] + len(complete)}
            for line in complete.splitlines():
                report = json.loads(line, parse_constant=lambda constant: None)
                if report["type"] == "update":
                    changes.update(self._update(job, report))
                else:
                    add_event(self.store, job_id, **report)
            self.store.update(JOB, job_id, **changes)

    def _update(self, job: Document, report: Document) -> Document:
        changes: Document = {}
        if resolved := report.get("hyperparameters"):
            changes["hyperparameters"] = {**job["hyperparameters"], **resolved}
            changes["method"] = {"type": "supervised", "supervised": {"hyperparameters": changes["hyperparameters"]}}
        if report.get("estimated_finish") and job["status"] == "running":
            changes["estimated_finish"] = int(report["estimated_finish"])
        return changes

    # The end of a job

    def _take_outcome(self, job_id: str, directory: Path) -> bool:
        """Record the trainer's last word, if it has spoken it."""
        try:
            outcome = read_json(directory / "outcome.json")
        except FileNotFoundError:
            return False
        self._read_events(job_id, directory)
        if outcome["status"] == "succeeded":
            self._succeed(job_id, directory, outcome)
        else:
            self._fail(job_id, JobFailed(**outcome["error"]))
        return True

    def _succeed(self, job_id: str, directory: Path, outcome: Document) -> None:
        """Make the model, its checkpoints and the result file known, all in one transaction."""
        with self.store.transaction():
            job = self.store.get(JOB, job_id)
            if job is None or job["status"] not in ("queued", "running"):  # queued: resumed after its last step
                return  # cancelled or paused at the last moment
            name = f"ft:{job['_base']}:local:{job['_suffix']}:{new_id('', 8)}"
            self._add_model(job, name, directory / "adapter")
            saved = [(path.parent, read_json(path)) for path in directory.glob("checkpoints/step-*/metrics.json")]
            for adapter, checkpoint in sorted(saved, key=lambda pair: pair[1]["step_number"])[-KEPT_CHECKPOINTS:]:
                model = f"{name}:ckpt-step-{checkpoint['step_number']}"
                checkpoint |= {"id": new_id("ftckpt_"), "object": CHECKPOINT, "fine_tuning_job_id": job_id}
                self.store.add({**checkpoint, "fine_tuned_model_checkpoint": model}, job_id)
                self._add_model(job, model, adapter)
            with open(directory / "result.csv", "rb") as results:
                file = add_file(self.store, results, "step_metrics.csv", "fine-tune-results")
            add_event(self.store, job_id, f"New fine-tuned model created: {name}")
            add_event(self.store, job_id, "The job has successfully completed")
            self.store.update(
                JOB,
                job_id,
                status="succeeded",
                finished_at=now(),
                estimated_finish=None,
                fine_tuned_model=name,
                trained_tokens=outcome["trained_tokens"],
                result_files=[file["id"]],
            )

    def _add_model(self, job: Document, name: str, adapter: Path) -> None:
        where = adapter.relative_to(self.store.data_dir).as_posix()
        model = {"id": name, "object": MODEL, "created": now(), "owned_by": "local"}
        self.store.add({**model, "_base": job["_base"], "_adapter": where}, job["id"])

    def _fail(self, job_id: str, failure: JobFailed) -> None:
        with self.store.transaction():
            if self._status(job_id) in ("validating_files", "queued", "running"):
                add_event(self.store, job_id, f"The job failed: {failure}", level="error")
                end = {"status": "failed", "finished_at": now(), "estimated_finish": None, "error": failure.error}
                self.store.update(JOB, job_id, **end)

    def _record_death(self, returncode: int, job_id: str, directory: Path) -> None:
        """The trainer ended without a last word: try again if something killed it, else the job has failed."""
        times_killed = (self.store.get(JOB, job_id) or {}).get("_times_killed", 0) + 1
        # 0 without a last word: it was asked to stop, and has left behind where it was.
        if returncode in (0, -signal.SIGTERM) or (returncode < 0 and times_killed < MAX_KILLS):
            how = f"was killed (signal {-returncode})" if returncode else "was stopped"
            add_event(self.store, job_id, f"The trainer {how}", level="warn")
            self.store.update(JOB, job_id, _times_killed=times_killed)
            return
        reason = f"The trainer stopped with exit code {returncode}: {last_line(directory / 'trainer.log')}"
        if returncode < 0:
            reason = (
                f"The trainer was killed {times_killed} times, the last time by signal {-returncode}; signal 9 mostly "
                "means that the machine ran out of memory: try a smaller batch_size or a smaller model."
            )
        self._fail(job_id, JobFailed("server_error", reason))


def read_json(path: Path) -> Document:
    return json.loads(path.read_bytes(), parse_constant=lambda constant: None)  # JSON knows no NaN and no Infinity


def last_line(path: Path) -> str:
    """Return the last line of a log that says something: where a Python program has said what ended it."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8", "replace").splitlines()]
    except OSError:
        lines = []
    said = [line for line in lines if any(letter.isalpha() for letter in line)]  # a launcher rules off its last words
    return said[-1].removeprefix("traceback : ")[:300] if said else "it said nothing."


def stop_processes(processes: list[psutil.Process]) -> None:
    """Ask these processes and their children to end, and kill what has not ended after STOP_SECONDS."""
    family: list[psutil.Process] = []
    for process in processes:
        try:
            family += [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
    for process in family:
        try:
            if os.name == "nt":  # terminate() would be a kill; CTRL_BREAK is what a process can answer there
                process.send_signal(signal.CTRL_BREAK_EVENT)  # type: ignore[attr-defined]
            else:
                process.terminate()
        except (psutil.NoSuchProcess, OSError):
            continue
    _, alive = psutil.wait_procs(family, timeout=STOP_SECONDS)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
