"""What a trainer reports in its job's directory, copied into the store: events while it runs, in the end the model.

All of it can be read and recorded again at any time: an event's id follows from what it reports. So a trainer can also
report a step again, and each is in the store once, whatever a kill or a power cut has left of the files.
"""

import time
from pathlib import Path

from local_api.files import add_file
from local_api.job_files import parse, whole_reports
from local_api.jobs import add_event
from local_api.store import CHECKPOINT, JOB, MODEL, Document, Store, event_id, new_id, now
from local_api.train import KEPT_CHECKPOINTS


class Reports:
    """The reports of one job's trainer; the position in events.jsonl is kept in memory only."""

    def __init__(self, store: Store, job_id: str, directory: Path):
        self.store, self.job_id, self.directory = store, job_id, directory
        self.position = 0  # bytes of events.jsonl that have been read
        self.first: tuple[int, float] | None = None  # the first new step, and when it was read

    def read(self) -> None:
        """Copy what the trainer has written since the last time."""
        try:
            with open(self.directory / "events.jsonl", "rb") as file:
                file.seek(self.position)
                new = file.read()
        except FileNotFoundError:
            return
        if not new:
            return
        reports, read = whole_reports(new)  # of the rest, the trainer writes anew what it has not written whole
        last_step, changes = None, Document()
        with self.store.transaction():
            job = self.store.get(JOB, self.job_id) or {}
            for report in reports:
                if report["type"] == "update":
                    changes |= resolved(job | changes, report.get("hyperparameters", {}))
                    continue
                is_step = report["type"] == "metrics"
                what = f"step {report['data']['step']}" if is_step else f"{report['created_at']} {report['message']}"
                added = add_event(self.store, self.job_id, **report, id=event_id(self.job_id, what))
                if added and is_step:
                    last_step = report["data"]
            if last_step and job["status"] == "running":
                changes["estimated_finish"] = self.estimate(last_step)
            if changes:
                self.store.update(JOB, self.job_id, **changes)
        self.position += read

    def estimate(self, step: Document) -> int | None:
        """Return when all steps will be done, by the pace since the first one; None as long as there is no other."""
        number, seconds = step["step"], time.time()
        self.first = self.first or (number, seconds)
        done = number - self.first[0]
        return int(seconds + (seconds - self.first[1]) / done * (step["total_steps"] - number)) if done else None

    def outcome(self) -> Document | None:
        try:
            return parse((self.directory / "outcome.json").read_bytes())
        except FileNotFoundError:
            return None

    def record_success(self, outcome: Document) -> None:
        """Make the model, its checkpoints and the result file known, all in one transaction."""
        store, job_id = self.store, self.job_id
        with store.transaction():
            job = store.get(JOB, job_id)
            if job is None or job["status"] not in ("queued", "running"):  # queued: resumed after its last step
                return  # cancelled or paused at the last moment
            name = f"ft:{job['_base']}:local:{job['_suffix']}:{new_id('', 8)}"
            self.add_model(job, name, self.directory / "adapter")
            found = self.directory.glob("checkpoints/step-*/metrics.json")
            saved = [(path.parent, parse(path.read_bytes())) for path in found]
            for adapter, checkpoint in sorted(saved, key=lambda pair: pair[1]["step_number"])[-KEPT_CHECKPOINTS:]:
                model = f"{name}:ckpt-step-{checkpoint['step_number']}"
                checkpoint |= {"id": new_id("ftckpt_"), "object": CHECKPOINT, "fine_tuning_job_id": job_id}
                store.add({**checkpoint, "fine_tuned_model_checkpoint": model}, job_id)
                self.add_model(job, model, adapter)
            with open(self.directory / "result.csv", "rb") as results:
                same = job_id.replace("ftjob-", "file-")  # when it is recorded again
                file = add_file(store, results, "step_metrics.csv", "fine-tune-results", same)
            add_event(store, job_id, f"New fine-tuned model created: {name}")
            add_event(store, job_id, "The job has successfully completed")
            end = {"status": "succeeded", "finished_at": now(), "estimated_finish": None, "fine_tuned_model": name}
            trained = {"trained_tokens": outcome["trained_tokens"], "result_files": [file["id"]]}
            store.update(JOB, job_id, **end, **trained)

    def add_model(self, job: Document, name: str, adapter: Path) -> None:
        where = adapter.relative_to(self.store.data_dir).as_posix()
        model = {"id": name, "object": MODEL, "created": now(), "owned_by": "local"}
        self.store.add({**model, "_base": job["_base"], "_adapter": where}, job["id"])


def resolved(job: Document, numbers: Document) -> Document:
    """Return what changes in a job when its trainer has put numbers in the place of "auto"."""
    numbers = {**job["hyperparameters"], **numbers}
    return {"hyperparameters": numbers, "method": {"type": "supervised", "supervised": {"hyperparameters": numbers}}}
