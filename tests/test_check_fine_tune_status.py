"""check_fine_tune_status.py: reads any server's job, follows it to its end, and says what comes of it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_api import FakeAPI

import check_fine_tune_status as script

SCRIPT = Path(script.__file__)
BASE = "gpt-4.1-mini-2025-04-14"


@pytest.fixture
def api(tmp_path, monkeypatch):
    with FakeAPI() as api:
        monkeypatch.chdir(tmp_path)
        for name, value in api.env().items():
            monkeypatch.setenv(name, value)
        yield api


@pytest.fixture
def fast(monkeypatch):
    """Waiting takes next to no time."""
    real_sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: real_sleep(0.002))


def write_record(job: dict, path: str = "fine_tune_job.json", **fields) -> None:
    """Write what fine_tune.py records of a job."""
    record = {"job_id": job["id"], "model": job["model"], "fine_tuned_model": None, **fields}
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text(json.dumps(record), encoding="utf-8")


def refused(*argv: str) -> str:
    """Return the sentence with which the script ends."""
    with pytest.raises(SystemExit) as end:
        script.main([*argv])
    assert isinstance(end.value.code, str)
    return end.value.code.strip()


# One look


def test_a_running_job(api, capsys):
    api.job_plan = ["running"]
    job = api.add_job()
    api.add_step(job["id"], 1, 6)
    api.add_step(job["id"], 2, 6)
    write_record(job)
    script.main([])
    out = capsys.readouterr().out
    assert "Status:           running\n" in out and "Latest event:     Step 2/6: training loss=1.768\n" in out
    assert "Training loss:    2.500 █▁ 1.768\n" in out
    assert out.endswith("\nNext: python check_fine_tune_status.py --wait\n")
    assert [request.method for request in api.requests] == ["GET", "GET"], "one look: the job and its events"


def test_a_job_that_succeeded_is_shown_and_its_model_recorded(api, capsys):
    job = api.finish(api.add_job(suffix="bot")["id"])
    write_record(job, estimated_cost=0.0, system_prompt="Sei freundlich. ü")
    script.main([])
    out = capsys.readouterr().out
    model = f"ft:{BASE}:acme:bot:0001"
    assert f"Fine-tuned model: {model}\n" in out and "n_epochs 3" in out and "12,345 (free)" in out
    assert f"  step 1      train_loss 2.500  {model}1:ckpt-step-1\n" in out
    assert out.endswith("\n\nNext: python use_fine_tuned_model.py\n")
    record = json.loads(Path("fine_tune_job.json").read_text("utf-8"))
    assert record["fine_tuned_model"] == model and record["system_prompt"] == "Sei freundlich. ü"
    assert record["checkpoints"][::-1] == [f"{model}1:ckpt-step-1", f"{model}2:ckpt-step-2", model]


def test_the_model_of_an_earlier_job_is_recorded_in_its_own_record(api, capsys):
    older, latest = api.finish(api.add_job()["id"]), api.add_job()
    write_record(latest)
    write_record(older, f"fine_tune_jobs/{older['id']}.json")
    script.main([older["id"]])
    assert capsys.readouterr().out.endswith(f"Next: python use_fine_tuned_model.py {older['id']}\n")
    records = [Path("fine_tune_job.json"), Path(f"fine_tune_jobs/{older['id']}.json")]
    names = [json.loads(path.read_text("utf-8"))["fine_tuned_model"] for path in records]
    assert names == [None, older["fine_tuned_model"]]
    script.main([latest["id"]])
    assert capsys.readouterr().out.endswith("Next: python check_fine_tune_status.py --wait\n"), "it needs no id"


@pytest.mark.parametrize(
    ("param", "next_step"),
    [
        ("training_file", 'prepare_training_data.py own.jsonl -o own.jsonl --system ""'),
        ("validation_file", 'prepare_training_data.py held.jsonl -o held.jsonl --system ""'),
        ("hyperparameters", "fine_tune.py own.jsonl"),
        (None, "fine_tune.py own.jsonl"),
    ],
)
def test_a_job_that_failed_says_why_and_names_the_file(api, param, next_step):
    job = api.add_job(status="failed", error={"code": "x", "message": "line 3 is no JSON.", "param": param})
    write_record(job, training_file_path="own.jsonl", validation_file_path="held.jsonl")
    assert refused() == f"Job failed: line 3 is no JSON. Next: python {next_step}"


@pytest.mark.parametrize("error", [{}, None, {"code": None, "message": None, "param": None}])
def test_a_job_without_a_reason(api, error):
    job = api.add_job(status="canceled", error=error)
    assert refused(job["id"]) == "Job cancelled: the server gives no reason. Next: python fine_tune.py"


ENDINGS = {
    "succeeded": "succeeded SUCCESS completed Succeeded",
    "failed": "failed Failed error user_error FAILED_VALIDATION",
    "cancelled": "cancelled canceled CANCELLED terminated",
    None: "validating_files queued running paused pending notRunning canceling QUEUED STARTED VALIDATED "
    "CANCELLATION_REQUESTED compressing uploading cancel_requested pausing hibernating",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_words_of_all_servers(ending):
    for word in ENDINGS[ending].split():
        assert script.ended(SimpleNamespace(status=word)) == ending, word


def test_a_server_that_has_little(api, capsys):
    """No events, no checkpoints, no model's name, no figures."""
    api.features = set()
    job = api.add_job()
    api.finish(job["id"])
    for name in ("hyperparameters", "result_files", "trained_tokens", "finished_at", "seed", "organization_id"):
        del job[name]
    script.main([job["id"]])
    out = capsys.readouterr().out
    assert "after you have deployed the model there" in out
    assert "Next: python use_fine_tuned_model.py NAME_OF_THE_DEPLOYMENT" in out


def test_a_model_that_azure_names_wants_a_deployment(api, capsys):
    job = api.finish(api.add_job()["id"])
    job["fine_tuned_model"] = f"{BASE}.ft-0123abcd"
    script.main([job["id"]])
    assert "NAME_OF_THE_DEPLOYMENT" in capsys.readouterr().out


def test_missing_figures(api, capsys):
    """null, NaN and -1 are no losses; 0 is one."""
    api.job_plan = ["running"]
    job = api.add_job(status="running")
    losses = [None, float("nan"), -1, 2.0, 0.0]
    for step, loss in enumerate(losses, 1):
        api.add_event(job["id"], f"Step {step}/5", step=step, total_steps=5, train_loss=loss, valid_loss=-1)
    script.main([job["id"]])
    out = capsys.readouterr().out
    assert "Training loss:    2.000 █▁ 0.000\n" in out and "Validation loss" not in out


def test_over_fitting_leads_to_the_best_checkpoint(api, capsys):
    job = api.add_job()
    api.finish(job["id"], valid_losses=(0.9, 0.5, 0.8))
    script.main([job["id"]])
    out = capsys.readouterr().out
    assert "Over-fitting: validation loss rose from 0.500 (step 2) to 0.800." in out
    assert out.endswith(f"Next: python use_fine_tuned_model.py ft:{BASE}:acme::00012:ckpt-step-2\n")


@pytest.mark.parametrize("losses", [(0.9, 0.8, 0.7), (0.9, 0.5, 0.505), (-1, -1, -1), (0.5, None, float("nan"))])
def test_no_over_fitting_where_the_loss_has_not_risen(api, capsys, losses):
    job = api.add_job()
    api.finish(job["id"], valid_losses=losses)
    script.main([job["id"]])
    out = capsys.readouterr().out
    assert "Over-fitting" not in out and out.endswith(f"Next: python use_fine_tuned_model.py {job['id']}\n")


@pytest.mark.parametrize(("values", "line"), [([1.0], "▁"), ([0.0, 7.0], "▁█"), ([7.0, 0.0], "█▁"), ([], "")])
def test_sparkline(values, line):
    assert re.sub("[^▁▂▃▄▅▆▇█]", "", script.sparkline(values)) == line
    assert len(script.sparkline([float(number) for number in range(1000)]).split()[1]) == 40


# Following


def test_wait_shows_each_event_once_oldest_first(api, fast, capsys):
    api.job_plan = ["validating_files", "queued", "running", "running", "running", "succeeded"]
    job = api.add_job()
    write_record(job)
    script.main(["--wait"])
    out = capsys.readouterr().out
    events = [line[10:] for line in out[: out.index("\n\nJob ID")].splitlines()]
    assert events[0] == "Created fine-tuning job" and events[-1] == "The job has successfully completed"
    assert [event.split(":")[0] for event in events[1:7]] == [f"Step {step}/6" for step in range(1, 7)]
    assert out.endswith("Next: python use_fine_tuned_model.py\n")
    assert json.loads(Path("fine_tune_job.json").read_text("utf-8"))["fine_tuned_model"].startswith("ft:")


def test_a_log_gets_a_line_for_each_tenth_and_only_new_events_are_fetched(api, fast, capsys):
    api.job_plan = ["running"] * 6 + ["succeeded"]
    job = api.add_job()
    for step in range(1, 251):
        api.add_step(job["id"], step, 250)
    script.main(["--wait", job["id"]])
    out = capsys.readouterr().out
    assert [int(step) for step in re.findall(r"Step (\d+)/250", out)] == [1, *range(25, 251, 25)]
    pages = [request for request in api.requests if request.path.endswith("/events")]
    assert sum("after" in request.query for request in pages) == 2, "250 events are three pages, read once"


def test_on_a_terminal_steps_share_one_line(api):
    pty = pytest.importorskip("pty")
    job = api.add_job(estimated_finish=int(time.time()) + 190)
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, str(SCRIPT), "--wait", job["id"]], stdout=slave)
    os.close(slave)
    shown = b""
    try:
        while chunk := os.read(master, 4096):
            shown += chunk
    except OSError:  # Linux ends a closed terminal with an error
        pass
    assert process.wait(20) == 0
    steps = re.findall(r"Step (\d)/6: training loss=\d\.\d+  3 min left +\r[^\n]", shown.decode())
    assert steps == list("123456")


def test_a_server_whose_pages_never_end(api, fast):
    job, original = api.add_job(), api.list_events
    api.list_events = lambda request, job_id: {**original(request, job_id), "has_more": True}
    script.main(["--wait", job["id"]])


def test_a_server_that_is_lost_and_comes_back(api, fast, capsys):
    api.job_plan = ["running"] * 3 + ["succeeded"]
    job = api.add_job()
    for number, fault in ((2, "drop before"), (3, "drop before"), (4, "drop before"), (5, "500 before")):
        api.fault(number, fault)
    script.main(["--wait", job["id"]])
    out = capsys.readouterr().out
    assert out.count("Is it running? (Local API: python -m local_api) Asking again") == 1
    assert out.count("Created fine-tuning job") == 1 and "succeeded" in out


def test_a_server_without_events_may_be_lost_for_a_while_too(api, fast, capsys):
    api.job_plan = ["running"] * 3 + ["succeeded"]
    job = api.add_job()
    api.fault("GET /fine_tuning/jobs/ftjob-0001/events", "404", times=99)
    for number in (2, 3, 4):  # the second look at the job, three times over
        api.fault(number, "drop before")
    script.main(["--wait", job["id"]])
    out = capsys.readouterr().out
    assert out.count("Asking again") == 1 and "succeeded" in out


def test_a_server_that_stays_away_ends_the_wait(api, fast, monkeypatch, capsys):
    monkeypatch.setattr(script, "RETRIES", 1)
    api.job_plan = ["running"]
    job = api.add_job()
    for number in range(2, 20):
        api.fault(number, "500 before")
    assert "answered 500" in refused("--wait", job["id"])
    assert capsys.readouterr().out.count("Asking again") == 1 and len(api.requests) == 2 + 3 + 2


def test_a_server_that_was_never_there_is_not_waited_for(fast, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    assert "Is it running? (Local API: python -m local_api)" in refused("--wait", "ftjob-1")


@pytest.mark.skipif(os.name == "nt", reason="needs SIGINT")
def test_interrupted(api):
    api.job_plan = ["running"]
    job = api.add_job()
    command = [sys.executable, str(SCRIPT), "--wait", job["id"]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "Created fine-tuning job" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "Interrupted here, not at the server" in err and "Traceback" not in err
    assert api.jobs[job["id"]]["status"] == "running"


# The other commands


def test_list(api, capsys):
    for _ in range(25):
        api.add_job()
    finished = api.finish(list(api.jobs)[-2])
    script.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20 and lines[0].split() == [list(api.jobs)[-1], "queued", BASE]
    assert lines[1].split() == [finished["id"], "succeeded", finished["fine_tuned_model"]]
    script.main(["--list", "--json"])
    assert [job["id"] for job in json.loads(capsys.readouterr().out)] == list(api.jobs)[:-21:-1]


def test_cancel(api, capsys):
    job = api.add_job()
    script.main(["--cancel", job["id"]])
    assert job["status"] == "cancelled" and f"Job {job['id']}: cancelled" in capsys.readouterr().out
    assert "Job has already cancelled" in refused("--cancel", job["id"])


def test_no_job_yet(api):
    assert "run python fine_tune.py" in refused()
    api.echo_key = True
    sentence = refused("ftjob-nope")
    assert "answered 404" in sentence and api.key not in sentence


def test_for_other_code(api, fast, capsys):
    job = api.add_job()
    assert script.wait_for_training(job["id"]) == api.jobs[job["id"]]["fine_tuned_model"]
    assert script.check_status(job["id"]) == "succeeded"
    assert [row["id"] for row in script.list_jobs()] == [job["id"]]
