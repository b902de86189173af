"""Faults of the machine that pass: what the server does while they last, and that nothing is lost by them.

The engine and the trainer are the doubles of local_api_doubles.py.
"""

import errno
import random
import shutil
import sqlite3
import time

import openai
from local_api_doubles import ENDS, running, training_file, wait_for

from local_api import reports
from local_api.base_models import ModelOutOfReach


def connect(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)


def create_job(client, first="hello", **changes):
    file = client.files.create(file=("data.jsonl", training_file(first)), purpose="fine-tune")
    return client.fine_tuning.jobs.create(model="tiny-base", training_file=file.id, **changes)


def messages(client, job, text=""):
    """Return the job's events that hold this text, oldest first."""
    found = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
    return [message for message in found[::-1] if text in message]


def steps(client, job):
    events = client.fine_tuning.jobs.list_events(job.id, limit=100)
    return [event.data["step"] for event in events if event.type == "metrics"][::-1]


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- jobs wait ---


def test_a_full_disk_while_recording_costs_waiting_and_is_said_once(tmp_path, monkeypatch):
    tries, add_file = [], reports.add_file

    def full(*arguments, **private):
        tries.append(1)
        if len(tries) <= 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return add_file(*arguments, **private)

    monkeypatch.setattr(reports, "add_file", full)
    with running(tmp_path / "data") as (url, _):
        client = connect(url)
        job = wait_for(create_job(client).id, client)
        assert job.status == "succeeded" and len(tries) == 3 and job.fine_tuned_model
        assert len(messages(client, job, "The job waits and is tried again: The disk")) == 1
        assert len(list(client.files.list(purpose="fine-tune-results"))) == 1


def test_a_job_waits_for_the_trainers_disk(tmp_path):
    with running(tmp_path / "data") as (url, _):
        client = connect(url)
        job = create_job(client, "full disk")
        wait_until(lambda: messages(client, job, "No space left on device"))
        assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
        other = create_job(client)
        assert wait_for(other.id, client).status == "succeeded", "the jobs behind it go on"
        (tmp_path / "data" / "go").touch()
        assert wait_for(job.id, client).status == "succeeded"
        assert len(messages(client, job, "No space left")) == 1 and len(messages(client, job, "job started")) == 1


def test_a_job_waits_for_its_base_model_and_can_be_cancelled(tmp_path, monkeypatch):
    with running(tmp_path / "data") as (url, app):
        client, weights = connect(url), app.state.models.weights

        def away(model_id):
            raise ModelOutOfReach("The directory is not there.")

        monkeypatch.setattr(app.state.models, "weights", away)
        job, other = create_job(client), create_job(client)
        wait_until(lambda: messages(client, job, "is tried again: The directory is not there."))
        wait_until(lambda: messages(client, other, "is tried again"))
        assert client.fine_tuning.jobs.cancel(other.id).status == "cancelled"
        monkeypatch.setattr(app.state.models, "weights", weights)
        assert wait_for(job.id, client).status == "succeeded"


def test_a_job_waits_for_a_locked_database(tmp_path, monkeypatch):
    monkeypatch.setattr("local_api.store.LOCK_SECONDS", 0.2)
    with running(tmp_path / "data") as (url, app):
        client = connect(url)
        job = create_job(client, "held")
        wait_until(lambda: steps(client, job))
        other = sqlite3.connect(tmp_path / "data" / "state.sqlite3", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        (tmp_path / "data" / "go").touch()
        wait_until((app.state.store.job_dir(job.id) / "outcome.json").exists)
        time.sleep(1)
        other.execute("ROLLBACK")
        assert wait_for(job.id, client).status == "succeeded" and steps(client, job) == list(range(1, 11))


def test_a_trainer_that_makes_progress_may_be_killed_often(tmp_path):
    with running(tmp_path / "data") as (url, _):
        client = connect(url)
        job = wait_for(create_job(client, "killed each epoch").id, client, seconds=60)
        assert job.status == "succeeded" and steps(client, job) == list(range(1, 11))


# --- cuts of power ---


def cut(path, chance):
    """Leave of a file that was never synced what a power cut can leave: less of it, zeros, or nothing at all."""
    content = path.read_bytes()
    kept = content[: chance.randrange(len(content) + 1)]
    how = chance.choice(["torn", "zeros", "gone"])
    path.unlink()
    if how != "gone":
        path.write_bytes(kept + b"\0" * (len(content) - len(kept)) * (how == "zeros"))


def image_of(data_dir, image):
    """Copy a data directory in use as the disk holds it at this moment."""
    image.mkdir()
    source, target = (sqlite3.connect(folder / "state.sqlite3") for folder in (data_dir, image))
    with target:
        source.backup(target)
    source.close(), target.close()
    ignored = shutil.ignore_patterns("state.sqlite3*", "unfinished", "tmp")
    shutil.copytree(data_dir, image, dirs_exist_ok=True, ignore=ignored)


def test_every_step_is_there_once_after_many_cuts_of_power(tmp_path):
    chance, job, data_dir = random.Random(0), None, tmp_path / "data"

    def has_more_than(client, known):
        return len(steps(client, job)) > known or client.fine_tuning.jobs.retrieve(job.id).status in ENDS

    for _ in range(15):
        with running(data_dir) as (url, _):
            client = connect(url)
            job = job or create_job(client, "slow")
            known, deadline = len(steps(client, job)), time.monotonic() + 20
            while not has_more_than(client, known):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            image_of(data_dir, tmp_path / "image")
        shutil.rmtree(data_dir)
        (tmp_path / "image").rename(data_dir)
        events = data_dir / "jobs" / job.id / "events.jsonl"
        if events.exists() and not events.with_name("outcome.json").exists():  # then it is synced
            cut(events, chance)
    with running(data_dir) as (url, _):
        client = connect(url)
        assert wait_for(job.id, client).status == "succeeded"
        assert steps(client, job) == list(range(1, 11))
