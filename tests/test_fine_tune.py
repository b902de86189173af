"""fine_tune.py: the step as the guide shows it, and one job whatever the server does and wherever the run is killed."""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from hashlib import sha256
from pathlib import Path

import pytest
from fake_api import FakeAPI

import fine_tune

SCRIPT = Path(fine_tune.__file__)
MODEL = "gpt-4.1-mini-2025-04-14"
TRANSCRIPT = """\
[1/3] Uploading training file: training_data.jsonl
✓ File uploaded successfully!
  File ID: file-0001

[2/3] Waiting for file to be processed...
✓ File processed successfully!

[3/3] Creating fine-tuning job...
✓ Fine-tuning job created successfully!

Job ID: ftjob-0002
Model: gpt-4.1-mini-2025-04-14
Status: queued

Next: python check_fine_tune_status.py --wait
"""


def write_rows(path: str, count: int = 12) -> None:
    row = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because it is so."}]}
    Path(path).write_text((json.dumps(row) + "\n") * count, encoding="utf-8")


def write_report(**fields) -> None:
    """What step 1 leaves beside the training file."""
    report = {
        "sha256": sha256(Path("training_data.jsonl").read_bytes()).hexdigest(),
        **{"examples": 60, "tokens": 400_000, "counted": "exact", "system_prompt": "You are helpful."},
    }
    Path("training_data.report.json").write_text(json.dumps({**report, **fields}), encoding="utf-8")


@pytest.fixture
def api(tmp_path, monkeypatch):
    """A fake API, its variables set, a folder with training data, and a short wait for a lost order."""
    with FakeAPI() as api:
        monkeypatch.chdir(tmp_path)
        for name, value in api.env().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(fine_tune, "ORDER_WAIT", 1.0)
        write_rows("training_data.jsonl")
        yield api


def run(*argv: str) -> int:
    """Run the script's main; return its exit code. What it says at an exit goes to stderr, as Python does it."""
    try:
        fine_tune.main(list(argv))
        return 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return int(end.code or 0)


def in_a_child(call):
    """Start a process that has imported all this one has, so that a second is not spent on that, and calls this."""
    process = multiprocessing.get_context("fork").Process(target=call)
    process.start()
    return process


def record() -> dict:
    return json.loads(Path("fine_tune_job.json").read_text("utf-8"))


# The step as the guide shows it


def test_transcript_and_record(api, capsys):
    write_report()
    assert run("--max-cost", "7") == 0
    assert capsys.readouterr().out == (
        f"Data:  60 examples, 400,000 tokens (exact)\n"
        f"Cost:  about $6.00, at OpenAI's prices, for 3 epochs of {MODEL}\n" + TRANSCRIPT
    )
    expected = {"job_id": "ftjob-0002", "training_file": "file-0001", "training_file_path": "training_data.jsonl"}
    expected |= {"server": api.base_url, "model": MODEL, "fine_tuned_model": None, "hyperparameters": {}}
    expected |= {"system_prompt": "You are helpful.", "estimated_cost": 6.0}
    assert record().items() >= expected.items()
    assert not Path("fine_tune_order.json").exists()
    sent = next(request.body for request in api.requests if request.name == "POST /fine_tuning/jobs")
    assert sent == {"model": MODEL, "training_file": "file-0001"}, "what the reader did not choose is not sent"


def test_options_reach_the_request(api):
    write_rows("validation_data.jsonl", 3)
    argv = ["--validation-file", "validation_data.jsonl", "--suffix", "bot", "--n-epochs", "2", "--seed", "7"]
    extra = {"trainingType": "GlobalStandard", "hyperparameters": {"batch_size": 4}}
    assert run(*argv, "--extra", json.dumps(extra)) == 0
    sent = next(request.body for request in api.requests if request.name == "POST /fine_tuning/jobs")
    assert sent["validation_file"] == "file-0002" and sent["suffix"] == "bot" and sent["seed"] == 7
    assert sent["hyperparameters"] == {"n_epochs": 2, "batch_size": 4} and sent["trainingType"] == "GlobalStandard"
    assert record()["validation_file"] == "file-0002" and record()["validation_file_path"] == "validation_data.jsonl"


def test_the_same_command_again_reports_the_job(api, capsys):
    assert run() == run() == 0
    assert "This job exists already" in capsys.readouterr().out
    assert len(api.jobs) == len(api.files) == 1


@pytest.mark.parametrize("argv", [["--n-epochs", "5"], ["--suffix", "x"], ["--seed", "1"], ["--force"]])
def test_another_order_makes_another_job_and_keeps_the_old_record(api, argv):
    assert run() == run(*argv) == 0
    assert len(api.jobs) == 2 and record()["job_id"] != "ftjob-0002"
    assert json.loads(Path("fine_tune_jobs/ftjob-0002.json").read_text())["job_id"] == "ftjob-0002"


def test_other_bytes_make_another_job(api):
    assert run() == 0
    write_rows("training_data.jsonl", 13)
    assert run() == 0
    assert len(api.jobs) == 2


@pytest.mark.parametrize("status", ["failed", "cancelled", "canceled", "FAILED", "Failed Validation"])
def test_a_dead_job_is_followed_by_a_new_one(api, capsys, status):
    assert run() == 0
    api.jobs["ftjob-0002"]["status"] = status
    assert run() == 0
    assert len(api.jobs) == 2 and "ordering another" in capsys.readouterr().out


@pytest.mark.parametrize("deleted", ["job", "model"])
def test_what_was_deleted_is_not_alive(api, capsys, deleted):
    assert run() == 0
    if deleted == "job":
        del api.jobs["ftjob-0002"]
    else:
        del api.models[api.finish("ftjob-0002")["fine_tuned_model"]]
    assert run() == 0
    assert "was deleted; ordering another" in capsys.readouterr().out
    assert record()["job_id"] != "ftjob-0002"


def test_for_other_code(api):
    job_id = fine_tune.start_fine_tuning("training_data.jsonl", suffix="bot")
    tuner = fine_tune.FineTuner()
    assert tuner.create_job("training_data.jsonl", suffix="bot") == job_id
    api.finish(job_id)
    assert tuner.monitor_progress(job_id).startswith(f"ft:{MODEL}:")
    failed = api.add_job(status="failed")  # as at OpenAI, where a failed job has no finished_at
    assert failed["finished_at"] is None and tuner.monitor_progress(failed["id"]) is None


# Before spending


def test_max_cost_stops_before_anything_is_sent(api, capsys):
    write_report(tokens=10_000_000)
    assert run() == 1
    assert "--max-cost" in capsys.readouterr().err and api.requests == []
    assert run("--n-epochs", "1", "--max-cost", "60") == 0
    assert record()["estimated_cost"] == 50.0


@pytest.mark.parametrize(
    ("examples", "epochs"), [(10, 10), (12, 8), (33, 3), (34, 3), (8_333, 3), (8_334, 2), (30_000, 1)]
)
def test_the_cookbook_s_rule_for_epochs(api, capsys, examples, epochs):
    write_report(examples=examples, tokens=1000)
    assert run() == 0
    assert f"for {epochs} epochs of" in capsys.readouterr().out


@pytest.mark.parametrize(("model", "words"), [("smollm2-135m-instruct", "free (local API)"), ("another", "not known")])
def test_costs_that_are_none(api, capsys, model, words):
    write_report()
    run("--model", model)
    assert f"Cost:  {words}, for 3 epochs of {model}" in capsys.readouterr().out


def test_epochs_that_the_server_chooses_are_estimated_by_the_cookbook_s_rule(api, capsys):
    write_report()
    assert run("--extra", '{"hyperparameters": {"n_epochs": "auto"}}', "--max-cost", "6") == 0
    assert "Cost:  about $6.00, at OpenAI's prices, for 3 epochs" in capsys.readouterr().out
    sent = next(request.body for request in api.requests if request.name == "POST /fine_tuning/jobs")
    assert sent["hyperparameters"] == {"n_epochs": "auto"}


def test_seed_0_is_a_seed(api):
    assert run("--seed", "0") == 0
    assert next(request.body for request in api.requests if request.name == "POST /fine_tuning/jobs")["seed"] == 0


def test_a_report_of_other_bytes_is_not_used(api, capsys):
    write_report()
    write_rows("training_data.jsonl", 13)
    assert run() == 0
    assert "no report of step 1" in capsys.readouterr().out
    assert record()["system_prompt"] is None and record()["estimated_cost"] is None


# Files on the server


def test_a_file_found_unfit(api, capsys):
    api.file_plan = ["error"]
    assert run() == 1
    assert "unfit" in capsys.readouterr().err and not api.jobs


@pytest.mark.parametrize("plan", [[None], ["pending"]])
def test_a_server_that_never_calls_a_file_processed(api, monkeypatch, capsys, plan):
    monkeypatch.setattr(fine_tune, "FILE_WAIT", 0.1)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    api.file_plan = plan
    assert run() == 0
    out = capsys.readouterr().out
    assert "going on" in out and "✓ File processed" not in out


# One job, never two

LOST = ["500 before", "500 after", "drop before", "drop after", "slow", "malformed", "html", "truncated", "429"]


def assert_one_job(api) -> None:
    assert len(api.jobs) == 1 and record()["job_id"] == next(iter(api.jobs))
    assert not Path("fine_tune_order.json").exists()


@pytest.mark.parametrize("kind", LOST)
@pytest.mark.parametrize("match", ["POST /files", "GET /files/*", "POST /fine_tuning/jobs"])
def test_any_fault_and_then_the_same_command(api, monkeypatch, capsys, match, kind):
    real_sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: real_sleep(min(seconds, 0.05)))  # the SDK's pauses, and ours
    if kind == "slow":
        monkeypatch.setattr(fine_tune, "REQUEST_TIMEOUT", 0.5)
    api.echo_key = True
    api.fault(match, kind, seconds=1.0)
    if run() != 0:
        assert run() == 0
    assert_one_job(api)
    printed = capsys.readouterr()
    assert record()["job_id"] in printed.out
    written = "".join(path.read_text("utf-8") for path in Path().iterdir() if path.is_file())
    assert api.key not in printed.out + printed.err + written
    assert "Traceback" not in printed.err


def test_a_lost_order_is_found_again(api, capsys):
    api.fault("POST /fine_tuning/jobs", "drop after")
    assert run() == 1
    assert "one job, never two" in capsys.readouterr().err
    assert run() == 0
    assert "its job is there" in capsys.readouterr().out
    assert_one_job(api)
    assert api.calls("POST /fine_tuning/jobs") == 1


def test_an_order_that_did_not_arrive_is_sent_again_when_its_time_has_passed(api, capsys):
    api.fault("POST /fine_tuning/jobs", "drop before")
    assert run() == 1
    assert run() == 0
    out = capsys.readouterr().out
    assert "may still come" in out and "did not arrive" in out
    assert_one_job(api)
    assert len(api.files) == 1, "the same order, so the same file"


def test_a_lost_order_is_settled_before_another_is_made(api):
    api.fault("POST /fine_tuning/jobs", "500 after")
    assert run() == 1
    assert run("--suffix", "other") == 0
    assert len(api.jobs) == 2 and len(list(Path("fine_tune_jobs").iterdir())) == 1


def test_a_lost_order_is_not_given_up_at_another_server(api, capsys, monkeypatch):
    api.fault("POST /fine_tuning/jobs", "500 after")
    assert run() == 1
    order = Path("fine_tune_order.json").read_text("utf-8")
    with FakeAPI() as other:
        monkeypatch.setenv("OPENAI_BASE_URL", other.base_url)
        assert run() == 1
    assert f"set OPENAI_BASE_URL to {api.base_url}; if that is gone, delete" in capsys.readouterr().err
    assert Path("fine_tune_order.json").read_text("utf-8") == order
    monkeypatch.setenv("OPENAI_BASE_URL", api.base_url.replace("127.0.0.1", "localhost"))  # the same, by another name
    assert run("--suffix", "other") == 0
    assert len(api.jobs) == 2 and not Path("fine_tune_order.json").exists()


def test_a_lost_forced_order_is_not_forced_twice(api):
    assert run() == 0
    api.fault("POST /fine_tuning/jobs", "500 after")
    assert run("--force") == 1
    assert run("--force") == 0
    assert len(api.jobs) == 2


@pytest.mark.parametrize("status", ["401", "404", "400"])
def test_a_refused_order_leaves_the_record_as_it_was(api, capsys, status):
    assert run() == 0
    before = record()
    api.fault("POST /fine_tuning/jobs", status, message="No such model.")
    assert run("--suffix", "other") == 1
    assert "No such model." in capsys.readouterr().err
    assert record() == before and not Path("fine_tune_order.json").exists()


@pytest.mark.skipif(os.name == "nt", reason="needs fork")
def test_two_terminals_at_once_make_one_job(api, capfd):
    uploaded = threading.Barrier(2)
    api.after = lambda request: request.name == "POST /files" and uploaded.wait(60)  # before either orders
    runs = [in_a_child(lambda: fine_tune.main([])) for _ in range(2)]
    for process in runs:
        process.join(60)
    error = capfd.readouterr().err
    assert sorted(process.exitcode for process in runs) == [0, 1], error
    assert "nother run" in error
    assert_one_job(api)


# Killed. Each moment at which the run has written something or the server has carried something out.


def run_until_write(number: int, when: str) -> None:
    """Run the script until it writes for the so-manieth time, and be killed before or after that."""
    left = number

    def wrapped(name: str):
        real = getattr(Path, name)

        def call(self, *args, **options):
            nonlocal left
            counts = name != "open" or "x" in args[:1]
            left -= counts
            if counts and left == 0 and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(self, *args, **options)
            if counts and left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in ("open", "write_text", "replace", "unlink"):
        setattr(Path, name, wrapped(name))
    fine_tune.main([])


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", range(1, 5))
def test_killed_at_a_write(api, number, when):
    process = in_a_child(lambda: run_until_write(number, when))
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert run() == 0
    assert_one_job(api)


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
@pytest.mark.parametrize("match", ["POST /files", "GET /files/*", "POST /fine_tuning/jobs"])
def test_killed_at_a_request(api, match):
    process, started = None, threading.Event()

    def after(request):
        assert started.wait(60)
        if api.calls(match):
            process.kill()
            with contextlib.suppress(ChildProcessError):  # it is dead, and left to be joined below
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    api.after = after
    process = in_a_child(lambda: fine_tune.main([]))
    started.set()
    process.join(60)
    api.after = lambda request: None
    assert process.exitcode == -signal.SIGKILL
    assert run() == 0
    assert_one_job(api)


@pytest.mark.skipif(os.name == "nt", reason="needs SIGINT")
def test_interrupted(api):
    api.fault("POST /fine_tuning/jobs", "slow", seconds=5)
    process = subprocess.Popen([sys.executable, str(SCRIPT)], stderr=subprocess.PIPE, text=True)
    while not api.calls("POST /fine_tuning/jobs") and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130 and "Interrupted" in error and "Traceback" not in error
    assert run() == 0
    assert_one_job(api)


# What is said


@pytest.mark.parametrize(
    ("match", "kind", "how", "words"),
    [
        ("POST /files", "401", {}, "check OPENAI_API_KEY"),
        ("POST /fine_tuning/jobs", "404", {"message": "The model does not exist."}, "The model does not exist."),
        ("POST /fine_tuning/jobs", "429", {"code": "insufficient_quota"}, "see your limits"),
        ("POST /files", "html", {}, "nonsense"),
    ],
)
def test_sentences(api, capsys, match, kind, how, words):
    api.fault(match, kind, **how)
    assert run() == 1
    error = capsys.readouterr().err
    assert words in error and re.search(r"http://127\.0\.0\.1:\d+/v1 answered", error)


def test_a_slip_in_an_edited_script_is_not_blamed_on_the_server(api, monkeypatch):
    monkeypatch.setattr(fine_tune, "wait_until_processed", lambda client, file_id: client.filez.retrieve(file_id))
    with pytest.raises(AttributeError, match="filez"):
        run()


def test_no_server_there(api, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert run() == 1
    assert "Is it running? (Local API: python -m local_api)" in capsys.readouterr().err


def test_usage(api, capsys):
    assert run("no_such.jsonl") == 1
    assert "no_such.jsonl" in capsys.readouterr().err
    assert run("--n-epochs", "many") == 2
    assert run("--extra", "{") == 2
    assert api.requests == []
