"""Every kind of fault at every moment of a job's way: each ends in the adapter of an undisturbed run.

Moments of the server: a file is uploaded, a job created, validated, its model recorded; here the trainer is the double,
and where it is to be killed it is at work on an earlier job. Moments of the trainer: a step, a checkpoint, the adapter;
here it is the real one, on a tiny model. Faults: the server, the trainer or both are killed, the disk is full for a
while, the power is cut. The trainer has ended when a model is recorded, so there it cannot be killed.
"""

import json
import random
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from local_api_doubles import ENDS, training_file, wait_for
from test_local_api_faults import cut
from test_local_api_process import Process

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]
FAULT_POINTS = Path(__file__).with_name("fault_points.py")
SERVER, TRAINER = ("upload", "create", "validate", "record"), ("step", "checkpoint", "adapter")
KILLS = ("kill the server", "kill the trainer", "kill both")
CASES = [
    (moment, fault)
    for moment in SERVER + TRAINER
    for fault in (*KILLS, "full disk", "cut")
    if moment != "record" or fault not in KILLS[1:]
]


@contextmanager
def disk(folder, is_small):
    """Yield the folder, on a small disk of its own if it is to become full."""
    folder.mkdir()
    if is_small:
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("only root may mount a small disk")
    try:
        yield folder
    finally:
        if is_small:
            subprocess.run(["umount", "--lazy", folder], check=True)


def run(folder, base, moment, fault):
    """Lead one job through the fault to its end; return its files that are to be the same in every run."""
    real = moment in TRAINER
    plan, struck = folder / "plan.json", folder / "struck"
    environment = {"FAULT_PLAN": str(plan), "OMP_NUM_THREADS": "1"}
    shutil.copytree(base, folder / "base") if real else None

    def start():
        return Process(folder, trainer=FAULT_POINTS if real else None, **environment)

    plan.write_text('{"point": null}')
    process, job, file, earlier, deadline = start(), None, None, None, time.monotonic() + 240
    parameters = {"hyperparameters": {"n_epochs": 2, "batch_size": 4}} if real else {}
    try:
        if not real and fault in KILLS[1:]:
            earlier = process.create_job()
            process.wait_for_step(earlier, 3)
        if fault != "none":
            planned = {"point": moment, "fault": fault, "server": process.process.pid, "filler": str(folder / "filler")}
            plan.write_text(json.dumps(planned))
        while job is None or job.status not in ENDS:
            assert time.monotonic() < deadline, f"the job is {job and job.status}"
            time.sleep(0.1)
            try:
                file = file or process.client.files.create(file=("data.jsonl", training_file()), purpose="fine-tune")
                if job is None:
                    job = process.client.fine_tuning.jobs.create(
                        model="base", training_file=file.id, seed=1, **parameters)  # fmt: skip
                job = process.client.fine_tuning.jobs.retrieve(job.id)
            except openai.APIConnectionError:
                assert process.process.wait(10) == -9, "the server ends only where it is killed"
                events = folder / "data" / "jobs" / (job.id if job else "") / "events.jsonl"
                if fault == "cut" and events.exists() and not events.with_name("outcome.json").exists():
                    cut(events, random.Random(moment))
                process = start()
            except openai.InternalServerError as error:
                assert fault == "full disk" and "disk" in str(error)
            if struck.exists():
                process.let_trainers_go()
            if fault == "full disk" and struck.exists() and time.time() - struck.stat().st_mtime > 3:
                (folder / "filler").unlink(missing_ok=True)
        assert job.status == "succeeded", job.error
        assert struck.exists() == (fault != "none")
        for one in filter(None, (earlier, job)):
            assert wait_for(one.id, process.client).status == "succeeded"
            assert process.steps(one) == list(range(1, process.steps(one)[-1] + 1)), "every step is there once"
        assert process.client.files.content(file.id).content == training_file()
        said = [event.message for event in process.client.fine_tuning.jobs.list_events(job.id, limit=100)]
        assert len([text for text in said if "is tried again" in text]) <= 2, said
        adapter = folder / "data" / "jobs" / job.id / "adapter" / "adapter_model.safetensors"
        return adapter.read_bytes().replace(job.id.encode(), b""), process.steps(job)
    finally:
        process.stop() if process.process.poll() is None else process.wait()
        for trainer in process.trainers():
            trainer.kill()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_model):
    folders = {moment: tmp_path_factory.mktemp("undisturbed") for moment in ("record", "step")}
    ended = {moment: run(folder, tiny_model, moment, "none") for moment, folder in folders.items()}
    return {moment: ended["step" if moment in TRAINER else "record"] for moment in SERVER + TRAINER}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("moment, fault", CASES)
def test_a_fault_at_any_moment_ends_in_the_adapter_of_an_undisturbed_run(
    tmp_path, moment, fault, undisturbed, tiny_model
):
    with disk(tmp_path / "disk", fault == "full disk") as folder:
        assert run(folder, tiny_model, moment, fault) == undisturbed[moment]
