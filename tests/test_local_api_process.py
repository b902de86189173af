"""The server as a process: how it starts, refuses to start, stops, and what is left after kill -9.

The engine and the trainer are the doubles of local_api_doubles.py; processes, signals, files and the database are real.
"""

import logging
import multiprocessing
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx2
import local_api_doubles
import openai
import psutil
import pytest
from local_api_doubles import TRAINER, training_file, wait_for, wait_until

from conftest import CACHE
from local_api import __main__ as program
from local_api.worker import MAX_KILLS

ROOT = Path(__file__).resolve().parent.parent
if os.name == "nt":
    pytest.skip("POSIX signals; the server's Windows side has no test double", allow_module_level=True)


class Fork(multiprocessing.get_context("fork").Process):
    """A process that has imported what this one has, which otherwise takes most of its time; as subprocess.Popen."""

    def __init__(self, folder, main, argv, **environment):
        self.out, self.folder, self.main, self.argv, self.environment = os.pipe(), folder, main, argv, environment
        super().__init__()
        self.start()
        os.close(self.out[1])
        self.stdout = open(self.out[0], encoding="utf-8")  # noqa: SIM115 - closed with the process

    def run(self):
        os.dup2(self.out[1], 1)
        os.dup2(os.open(self.folder / "server.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
        logging.getLogger().handlers.clear()  # pytest's
        os.environ.update(self.environment, PYTHONPATH=str(ROOT))
        os.chdir(self.folder)
        sys.argv = ["local_api", *map(str, self.argv)]
        sys.exit(self.main())

    def wait(self, seconds):
        self.join(seconds)
        assert self.exitcode is not None, "it has not ended in time"
        return self.exitcode

    def send_signal(self, how):
        os.kill(self.pid, how)

    def kill(self):
        super().kill()
        self.join()  # the next server starts so soon that this one may hold its lock yet

    poll = multiprocessing.Process.exitcode.fget
    returncode = multiprocessing.Process.exitcode


class Process:
    """A server process on a data directory; `kill` is kill -9."""

    def __init__(self, folder, *arguments, trainer=None, **environment):
        (folder / "base").mkdir(exist_ok=True)
        trainer = trainer or folder / "trainer.py"
        (folder / "trainer.py").write_text(TRAINER)
        self.folder = folder
        argv = [trainer, "--port", "0", "--data-dir", folder / "data", "--cache-dir", CACHE,
                "--base-model", folder / "base", *arguments]  # fmt: skip
        self.process = Fork(folder, local_api_doubles.main, argv, **environment)
        line = self.process.stdout.readline()
        assert line.startswith("Local API ready: http://127.0.0.1:"), (folder / "server.log").read_text()
        self.url = line.split()[-1]
        self.client = openai.OpenAI(base_url=self.url, api_key="any", max_retries=0)

    def create_job(self, first="held"):
        file = self.client.files.create(file=("data.jsonl", training_file(first)), purpose="fine-tune")
        return self.client.fine_tuning.jobs.create(model="base", training_file=file.id)

    def steps(self, job):
        return local_api_doubles.steps(self.client, job)

    def wait_for_step(self, job, step):
        wait_until(lambda: max(self.steps(job), default=0) >= step)

    def wait_for_event(self, job, text):
        events = self.client.fine_tuning.jobs.list_events
        wait_until(lambda: any(text in event.message for event in events(job.id)))

    def let_trainers_go(self):
        (self.folder / "data" / "go").touch()

    def trainers(self):
        return [process for process in psutil.process_iter(["cmdline"])
                if str(self.folder / "trainer.py") in (process.info["cmdline"] or [])
                and process.pid != self.process.pid]  # fmt: skip

    def stop(self, how=signal.SIGTERM):
        self.process.send_signal(how)
        return self.wait()

    def wait(self):
        try:
            return self.process.wait(15)
        finally:
            self.process.kill()
            self.process.stdout.close()


@contextmanager
def server(folder, *arguments, **environment):
    process = Process(folder, *arguments, **environment)
    try:
        yield process
    finally:
        if process.process.poll() is None:
            process.stop()
        for trainer in process.trainers():
            trainer.kill()


def refused(folder, *arguments, **environment):
    """Start a server that must refuse to start; return its sentence."""
    (folder / "server.log").unlink(missing_ok=True)
    argv = ["--port", "0", "--data-dir", folder / "data", "--cache-dir", CACHE, "--base-model", folder, *arguments]
    process = Fork(folder, program.main, argv, **environment)
    assert process.stdout.read() == "" and process.wait(30) == 2
    process.stdout.close()
    said = (folder / "server.log").read_text()
    assert "Traceback" not in said and len(said.splitlines()) == 1
    return said


def test_it_says_when_it_is_ready_and_keeps_its_state(tmp_path):
    with server(tmp_path, "--cache-dir", tmp_path / "data" / "cache") as first:
        file = first.client.files.create(file=("data.jsonl", training_file()), purpose="fine-tune")
        job = wait_for(first.create_job("hello").id, first.client)
        assert httpx2.get(first.url.replace("/v1", "/healthz")).json() == {"status": "ok"}
        assert (tmp_path / "data" / "cache" / "tiktoken" / "fb374d419588a4632f3f557e76b4b70aebbca790").exists()
    assert first.process.returncode == 0
    with server(tmp_path) as second:
        assert second.client.files.retrieve(file.id) == file
        assert second.client.fine_tuning.jobs.retrieve(job.id) == job
        assert job.fine_tuned_model in [model.id for model in second.client.models.list()]


def test_a_second_server_on_the_same_data_refuses(tmp_path):
    with server(tmp_path):
        assert not list((tmp_path / "data").glob("*lock*")), "there is nothing that somebody could remove"
        assert "Another server is running" in refused(tmp_path)


def test_what_cannot_be_served_is_refused_at_once(tmp_path):
    assert "there is no such directory" in refused(tmp_path, "--base-model", "/no/such/model")
    assert "there is no such directory" in refused(tmp_path, "--base-model", "alias=/no/such/model")
    assert "Two base models have the name a" in refused(tmp_path, "--base-model", f"a={tmp_path}", "--base-model", "a")
    assert "--launcher nothing: there is no such command" in refused(tmp_path, "--launcher", "nothing launch")


def test_a_refusal_is_one_sentence_and_exit_code_2_of_the_program(tmp_path):
    command = [sys.executable, "-m", "local_api", "--data-dir", tmp_path / "data", "--port", "99999"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "Cannot start: a --port is a number from 0 to 65535.\n"


def test_a_damaged_database_is_a_sentence_and_exit_code_2(tmp_path):
    (tmp_path / "data" / "files").mkdir(parents=True)
    (tmp_path / "data" / "files" / "file-1").write_bytes(b"x")
    (tmp_path / "data" / "state.sqlite3").write_bytes(b"garbage " * 1000)
    assert "state.sqlite3 is damaged (file is not a database); put a copy" in refused(tmp_path)
    assert (tmp_path / "data" / "files" / "file-1").exists()


def test_a_launcher_whose_quotes_do_not_end_is_a_usage_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        program.build_parser().parse_args(["--launcher", "'x"])
    assert "argument --launcher: invalid split value" in capsys.readouterr().err


def test_a_job_waits_for_a_launcher_that_is_gone(tmp_path):
    launcher = tmp_path / "launcher"
    launcher.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path / "trainer.py"} "$3"\n')
    launcher.chmod(0o755)
    with server(tmp_path, "--launcher", str(launcher)) as process:
        launcher.rename(tmp_path / "away")
        job = process.create_job("hello")
        process.wait_for_event(job, f"{launcher} cannot be started (No such file or directory); see --launcher.")
        (tmp_path / "away").rename(launcher)
        assert wait_for(job.id, process.client).status == "succeeded"


def test_a_job_waits_for_the_disk_of_a_trainer_whose_launcher_has_its_own_exit_code(tmp_path):
    launcher = tmp_path / "launcher"
    launcher.write_text(
        f'#!/bin/sh\n{sys.executable} {tmp_path / "trainer.py"} "$3"\n'
        f"echo traceback : To enable traceback see ... >&2\necho >> {tmp_path / 'tries'}\nexit 1\n"
    )
    launcher.chmod(0o755)
    with server(tmp_path, "--launcher", str(launcher)) as process:
        job = process.create_job("full disk")
        tries = tmp_path / "tries"
        wait_until(lambda: tries.exists() and tries.stat().st_size > MAX_KILLS, 40)
        assert process.client.fine_tuning.jobs.retrieve(job.id).status == "running"
        said = [event.message for event in process.client.fine_tuning.jobs.list_events(job.id) if event.level == "warn"]
        assert len(said) == 1 and said[0].endswith("could not use its files: No space left on device.")
        process.let_trainers_go()
        assert wait_for(job.id, process.client).status == "succeeded"


def test_a_port_in_use_is_said(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "is in use" in refused(tmp_path, "--port", str(taken.getsockname()[1]))


def test_other_addresses_need_a_key(tmp_path):
    assert "LOCAL_API_KEY" in refused(tmp_path, "--host", "0.0.0.0", LOCAL_API_KEY="")


def test_an_address_of_another_machine_is_said(tmp_path):
    assert "192.0.2.1" in refused(tmp_path, "--host", "192.0.2.1", LOCAL_API_KEY="k")


@pytest.mark.parametrize("how", [
    "SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow), pytest.param("SIGHUP", marks=pytest.mark.slow),
])  # fmt: skip
def test_asked_to_stop_it_finishes_answers_and_lets_the_trainer_save(tmp_path, how):
    with server(tmp_path) as first:
        job = first.create_job()
        first.wait_for_step(job, 3)
        question = {"role": "user", "content": "slow"}
        stream = first.client.chat.completions.create(model="base", messages=[question], max_tokens=60, stream=True)
        next(stream)  # the answer has begun
        started = time.monotonic()
        assert first.stop(getattr(signal, how)) == 0 and time.monotonic() - started < 10
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason == "length" and len(chunks) >= 60 and not first.trainers()
    with server(tmp_path) as second:
        second.let_trainers_go()
        assert wait_for(job.id, second.client).status == "succeeded"
        assert second.steps(job) == list(range(1, 11)), "no step was lost and none was repeated"


def test_a_launcher_starts_the_trainer(tmp_path):
    launcher, seen = tmp_path / "launcher.py", tmp_path / "seen.txt"
    launcher.write_text(
        f"import os, sys\nopen({str(seen)!r}, 'w').write(' '.join(sys.argv[1:]))\n"
        f"os.execv(sys.executable, [sys.executable, {str(tmp_path / 'trainer.py')!r}, sys.argv[-1]])\n"
    )
    with server(tmp_path, "--launcher", f"{sys.executable} {launcher} --processes 2", "--load-in-4bit") as process:
        job = wait_for(process.create_job("hello").id, process.client)
        directory = tmp_path / "data" / "jobs" / job.id
        assert seen.read_text() == f"--processes 2 -m local_api.train_distributed --load-in-4bit {directory}"


@pytest.mark.slow
def test_asked_to_stop_it_ends_a_long_stream_with_an_error(tmp_path):
    with server(tmp_path) as process:
        question = {"role": "user", "content": "slow"}
        stream = process.client.chat.completions.create(model="base", messages=[question], stream=True)
        next(stream)
        started = time.monotonic()
        process.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="The server is shutting down"):
            list(stream)
        assert process.wait() == 0 and time.monotonic() - started < 10
    assert "Traceback" not in (tmp_path / "server.log").read_text()


ENDLESS_STEP = """
import sys, torch
from local_api import __main__, batch

def forward(*_):
    open("begun", "w").close()
    while True:
        torch.ones(2000, 2000).mm(torch.ones(2000, 2000))

batch.Batch.forward = forward
sys.exit(__main__.main())
"""


@pytest.mark.slow
def test_asked_to_stop_in_a_step_that_does_not_end_it_ends_in_order(tmp_path, tiny_model):
    program = tmp_path / "program.py"
    program.write_text(ENDLESS_STEP)
    process = subprocess.Popen(
        [sys.executable, program, "--port", "0", "--data-dir", tmp_path / "data", "--base-model", tiny_model],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    try:
        url, errors = process.stdout.readline().split()[-1], []
        client = openai.OpenAI(base_url=url, api_key="any", max_retries=0)

        def ask():
            try:
                client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hello"}])
            except openai.APIError as error:
                errors.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        while not (tmp_path / "begun").exists():
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        asking.join()
        assert errors[0].code == "server_shutting_down"
    finally:
        process.kill()
        process.stdout.close()


@pytest.mark.slow
def test_a_trainer_that_does_not_stop_is_killed_in_time(tmp_path):
    with server(tmp_path) as process:
        job = process.create_job("stubborn")
        process.wait_for_step(job, 1)
        started = time.monotonic()
        assert process.stop() == 0 and time.monotonic() - started < 10.5 and not process.trainers()


@pytest.mark.parametrize("victims", ["server", "trainer", "both"])
def test_kill_9_loses_no_work(tmp_path, victims):
    with server(tmp_path) as first:
        job, waiting = first.create_job(), first.create_job("hello")
        first.wait_for_step(job, 3)
        trainer = first.trainers()[0]
        if victims != "trainer":
            first.process.kill()
        if victims != "server":
            trainer.kill()
        if victims == "trainer":
            first.let_trainers_go()
            assert wait_for(job.id, first.client).status == "succeeded"
            assert any("killed" in event.message for event in first.client.fine_tuning.jobs.list_events(job.id))
        first.process.kill()
    with server(tmp_path) as second:
        second.let_trainers_go()
        for one in (job, waiting):
            assert wait_for(one.id, second.client).status == "succeeded"
        assert second.steps(job) == list(range(1, 11)), "what was repeated is reported once"


def test_a_trainer_asked_to_stop_by_someone_else_goes_on(tmp_path):
    with server(tmp_path) as process:
        job = process.create_job()
        process.wait_for_step(job, 3)
        process.trainers()[0].terminate()
        process.let_trainers_go()
        assert wait_for(job.id, process.client).status == "succeeded"
        said = [event.message for event in process.client.fine_tuning.jobs.list_events(job.id)]
        assert any("The trainer was stopped" in message for message in said)
        assert process.steps(job) == list(range(1, 11))


def test_an_orphaned_trainer_is_ended_by_the_next_server(tmp_path):
    with server(tmp_path) as first:
        job = first.create_job()
        first.wait_for_step(job, 3)
        orphan = first.trainers()[0]
        first.process.kill()
        assert orphan.is_running()
        first.client.close()
        with server(tmp_path) as second:
            assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
            wait_until(lambda: len(second.trainers()) == 1)


def test_a_cancelled_job_stays_cancelled_after_kill_9(tmp_path):
    with server(tmp_path) as first:
        job = first.create_job("stubborn")
        first.wait_for_step(job, 1)
        first.client.fine_tuning.jobs.cancel(job.id)
        first.process.kill()
    with server(tmp_path) as second:
        assert second.client.fine_tuning.jobs.retrieve(job.id).status == "cancelled"
        assert not [one for one in second.trainers() if one.status() != psutil.STATUS_ZOMBIE]


def accept_until_killed(process, accepted):
    """Upload files and create jobs until the server is gone; `accepted` gets all that it has acknowledged."""
    try:
        while True:
            file = process.client.files.create(file=("data.jsonl", training_file()), purpose="fine-tune")
            accepted.append(file)
            accepted.append(process.client.fine_tuning.jobs.create(model="base", training_file=file.id))
    except openai.APIError:
        pass


@pytest.mark.parametrize("seed", [
    0,
    *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 7)),
    *(pytest.param(seed, marks=[pytest.mark.slow, pytest.mark.exhaustive]) for seed in range(7, 25)),
])  # fmt: skip
def test_what_was_accepted_is_there_after_kill_9_at_any_moment(tmp_path, seed):
    chance, accepted = random.Random(seed), []
    for _ in range(3):
        with server(tmp_path) as process:
            thread = threading.Thread(target=accept_until_killed, args=(process, accepted))
            thread.start()
            time.sleep(chance.uniform(0.05, 0.6))
            process.process.kill()
            for trainer in process.trainers() if chance.random() < 0.5 else []:
                trainer.kill()
            thread.join()
    with server(tmp_path) as process:
        for one in accepted:
            if one.object == "file":
                assert process.client.files.content(one.id).content == training_file()
            else:
                assert process.client.fine_tuning.jobs.retrieve(one.id).error is None
        jobs = [one for one in accepted if one.object == "fine_tuning.job"]
        for job in jobs[:2]:
            assert wait_for(job.id, process.client, seconds=60).status == "succeeded"
    on_disk = {path.name for path in (tmp_path / "data" / "files").iterdir()}
    with sqlite3.connect(tmp_path / "data" / "state.sqlite3") as database:
        listed = {row[0] for row in database.execute("SELECT id FROM objects WHERE kind = 'file'")}
    assert listed == on_disk, "no file is listed without its bytes, and none lies there unlisted"
