"""check_fine_tune_status.py: reads any server's job, follows it through faults, and shows what it learned."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_api import FakeAPI

import check_fine_tune_status as script

SCRIPT = Path(script.__file__)


@pytest.fixture
def api(tmp_path, monkeypatch):
    with FakeAPI() as api:
        monkeypatch.chdir(tmp_path)
        for name, value in api.env(FINE_TUNE_TIMEOUT="0.8").items():
            monkeypatch.setenv(name, value)
        yield api


@pytest.fixture
def fast(monkeypatch):
    """Waiting takes next to no time, and is written down."""
    waits: list[float] = []
    real_sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: (waits.append(seconds), real_sleep(0.002)))
    return waits


def write_job_record(api, job: dict, **fields) -> None:
    record = {"job_id": job["id"], "base_url": api.base_url, "model": job["model"], **fields}
    Path("fine_tune_job.json").write_text(json.dumps(record), encoding="utf-8")


def check_json(argv, capsys) -> tuple[int, dict]:
    capsys.readouterr()
    code = script.main([*argv, "--json"])
    return code, json.loads(capsys.readouterr().out)


# One look


def test_a_running_job(api, capsys):
    api.job_plan = ["running"]
    job = api.add_job()
    api.add_step(job["id"], 1, 6)
    api.add_step(job["id"], 2, 6)
    write_job_record(api, job)
    assert script.main([]) == 0
    out = capsys.readouterr().out
    assert "Status:           running" in out
    assert "Training loss:    2.500 █▁ 1.768" in out
    assert out.endswith("Next: python check_fine_tune_status.py --wait\n")
    assert [request.method for request in api.requests] == ["GET", "GET"], "one look: the job and its events"


def test_a_job_that_succeeded(api, capsys):
    job = api.add_job(suffix="bot")
    api.finish(job["id"])
    write_job_record(api, job, estimated_cost=0.07)
    assert script.main([]) == 0
    out = capsys.readouterr().out
    assert "Fine-tuned model: ft:gpt-4.1-mini-2025-04-14:acme:bot:0001" in out
    assert "n_epochs 3" in out and "12,345" in out
    assert out.endswith("Next: python use_fine_tuned_model.py\n")
    events = [event["message"] for event in check_json([], capsys)[1]["events"]]
    assert events[0] == "Created fine-tuning job" and events[-1].endswith("successfully completed"), "oldest first"


def test_cost_of_the_trained_tokens_against_the_estimate(api, capsys, monkeypatch):
    import prepare_training_data

    monkeypatch.setattr(prepare_training_data, "training_price", lambda model: 5.0)
    job = api.add_job()
    api.finish(job["id"])
    write_job_record(api, job, estimated_cost=0.07)
    assert script.main([]) == 0
    assert "12,345 ($0.06; the estimate was $0.07)" in capsys.readouterr().out


def test_a_job_that_failed(api, capsys):
    api.job_plan = ["queued", "failed"]
    job = api.add_job()
    assert script.main([job["id"]]) == 1
    out = capsys.readouterr().out
    assert "line 3 is not valid JSON (code invalid_training_file, param training_file)" in out
    assert "prepare_training_data.py --check" in out
    code, seen = check_json([job["id"]], capsys)
    assert (code, seen["error"]["code"]) == (1, "invalid_training_file")


@pytest.mark.parametrize("error", [{}, None, {"code": None, "message": None, "param": None}])
def test_an_empty_error_is_none(api, capsys, error):
    job = api.add_job(error=error)
    assert check_json([job["id"]], capsys)[1]["error"] is None


DIALECTS = {
    "OpenAI": "validating_files queued running paused succeeded failed cancelled",
    "Azure": "pending notRunning running canceling canceled succeeded failed",
    "Mistral": "QUEUED STARTED VALIDATING VALIDATED RUNNING FAILED_VALIDATION FAILED SUCCESS CANCELLED "
    "CANCELLATION_REQUESTED",
    "Together": "pending queued running compressing uploading cancel_requested cancelled completed error user_error",
}


@pytest.mark.parametrize("server", DIALECTS)
def test_every_dialect(server):
    ours = {word: script.status_of(SimpleNamespace(status=word)) for word in DIALECTS[server].split()}
    assert set(ours.values()) <= set(script.STATUSES), "no word of theirs is unknown"
    ended = {word for word, status in ours.items() if status in script.ENDED}
    assert ended == set(
        re.findall(r"\b(?:succeeded|success|completed|failed\w*|error|user_error|cancell?ed)\b", DIALECTS[server], re.I)
    )


@pytest.mark.parametrize(
    ("word", "ours", "code"),
    [("SUCCESS", "succeeded", 0), ("canceled", "cancelled", 1), ("hibernating", "hibernating", 0)],
)
def test_a_word_of_another_server(api, capsys, word, ours, code):
    api.job_plan = [word]
    job = api.add_job()
    assert check_json([job["id"]], capsys)[1]["status"] == ours
    assert script.main([job["id"]]) == code


def test_what_a_server_lacks_is_lived_with(api, capsys):
    api.features = set()
    job = api.add_job(suffix=None)
    api.finish(job["id"])
    for name in ("hyperparameters", "result_files", "trained_tokens", "finished_at", "seed", "organization_id"):
        del job[name]
    code, seen = check_json([job["id"]], capsys)
    assert code == 0 and seen["events"] == [] and seen["checkpoints"] == [] and seen["fine_tuned_model"] is None
    assert script.main([job["id"]]) == 0
    assert "how the trained model is deployed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "status"),
    [*itertools.product(["events", "checkpoints", "content"], ["400", "404", "405", "501"]), ("content", "403")],
)
def test_an_endpoint_that_is_missing_hides_no_job(api, capsys, path, status):
    job = api.add_job()
    api.finish(job["id"])
    api.fault(f"GET /*/{path}", status, times=9)
    code, seen = check_json([job["id"]], capsys)
    assert (code, seen["status"]) == (0, "succeeded")
    assert not seen[{"events": "events", "checkpoints": "checkpoints", "content": "metrics"}[path]]


@pytest.mark.parametrize("of", [lambda seconds: seconds * 1000, lambda seconds: f"{seconds:d}", "iso"])
def test_times_in_other_forms(api, fast, capsys, of):
    if of == "iso":
        of = lambda seconds: datetime.fromtimestamp(seconds, timezone.utc).isoformat()[:-6] + "Z"  # noqa: E731
    job = api.add_job(estimated_finish=of(1_900_000_000))
    created_at, job["created_at"] = job["created_at"], of(job["created_at"])
    for event in api.events[job["id"]]:
        event["created_at"] = of(event["created_at"])
    assert script.main(["--list"]) == 0
    assert script.main(["--wait", job["id"]]) == 0
    assert check_json([job["id"]], capsys)[1]["created_at"] == created_at
    assert (script.seconds_of("soon"), script.seconds_of(None)) == (None, None)


def test_the_key_in_events_and_in_the_error(api, fast, capsys):
    job = api.add_job(status="failed", error={"code": "x", "message": f"no credit for {api.key}.", "param": None})
    api.add_event(job["id"], f"using {api.key}")
    for argv in ([], ["--wait"], ["--json"]):
        assert script.main([job["id"], *argv]) == 1
    out = "".join(capsys.readouterr())
    assert "no credit for [key]" in out and "using [key]" in out and api.key not in out
    with pytest.raises(script.StepError, match=r"failed: no credit for \[key\]\.$"):
        script.wait_for_training(job["id"])


def test_a_deployment_step_is_named(api):
    seen = {"status": "succeeded", "fine_tuned_model": "gpt-4.1.ft-abc", "overfitting": None, "best_checkpoint": None}

    class Client:
        base_url = "https://me.openai.azure.com/openai/v1/"

    assert "create a deployment" in script.next_step(seen, Client)


@pytest.mark.parametrize("base64", [True, False])
def test_the_result_file_plain_or_base64(api, capsys, base64):
    if not base64:
        api.features.discard("base64 results")
    job = api.add_job()
    api.finish(job["id"])
    seen = check_json([job["id"]], capsys)[1]
    assert [figures["step"] for figures in seen["metrics"]] == [1, 2, 3]
    assert seen["metrics"][0] == {"step": 1, "train_loss": 2.5, "train_mean_token_accuracy": 0.8}


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"not a csv", b"step,\n1\n", b"step,train_loss\nx,y\n"])
def test_a_result_file_that_is_something_else(api, capsys, content):
    job = api.add_job()
    api.finish(job["id"])
    api.contents[job["result_files"][0]] = content
    assert check_json([job["id"]], capsys)[0] == 0


def test_best_checkpoint_and_over_fitting(api, capsys):
    job = api.add_job()
    api.finish(job["id"], valid_losses=(0.9, 0.5, 0.8))
    assert script.main([job["id"]]) == 0
    out = capsys.readouterr().out
    assert "Over-fitting: the validation loss was lowest at step 2 (0.500) and has risen to 0.800" in out
    assert out.endswith("Next: python use_fine_tuned_model.py ft:gpt-4.1-mini-2025-04-14:acme::0001:ckpt-step-2\n")
    assert out.count("lowest validation loss\n") == 1


def test_no_over_fitting_where_the_loss_keeps_falling(api, capsys):
    job = api.add_job()
    api.finish(job["id"], valid_losses=(0.9, 0.8, 0.7))
    seen = check_json([job["id"]], capsys)[1]
    assert seen["overfitting"] is None
    assert seen["best_checkpoint"] == seen["fine_tuned_model"]


def test_figures_that_are_no_numbers(api, capsys):
    """A diverged run: null and NaN break neither the lines nor the JSON."""
    api.job_plan = ["running"]
    job = api.add_job(status="running")
    api.add_event(job["id"], "Step 1/3", step=1, total_steps=3, train_loss=None)
    api.add_event(job["id"], "Step 2/3", step=2, total_steps=3, train_loss=float("nan"), valid_loss=None)
    api.add_event(job["id"], "Step 3/3", step=3, total_steps=3, train_loss=2.0)
    assert script.main([job["id"]]) == 0
    assert "Training loss:    2.000 ▁ 2.000" in capsys.readouterr().out
    assert [figures["train_loss"] for figures in check_json([job["id"]], capsys)[1]["metrics"]] == [2.0]


# The pictures


def test_plot(api, capsys):
    job = api.add_job()
    for step in range(1, 31):
        api.add_step(job["id"], step, 30, valid_loss=1.5 if step % 10 == 0 else None)
    api.finish(job["id"])
    assert script.main([job["id"], "--plot", "loss.svg"]) == 0
    root = ElementTree.parse("loss.svg").getroot()
    svg = "{http://www.w3.org/2000/svg}"
    lines = root.findall(f"{svg}polyline")
    assert [len(line.get("points").split()) for line in lines] == [30, 3], "training and validation"
    assert sum(line.get("stroke-dasharray") is not None for line in root.findall(f"{svg}line")) == 3, "three epochs"
    labels = [text.text for text in root.findall(f"{svg}text")]
    assert {"0", "30", "2.5", "training", "validation"} <= set(labels)


@pytest.mark.parametrize(
    "rows",
    [[(0, 2.5)], [(1, -0.5), (2, -0.7)], [(1, 2.5), (2, None)], [(0, 0.0)]],
    ids=["step 0", "negative", "gap", "0"],
)
def test_plots_of_odd_figures(rows):
    metrics = [{"step": step, "train_loss": loss} if loss is not None else {"step": step} for step, loss in rows]
    ElementTree.fromstring(
        script.plot_svg({"job_id": "ftjob-1", "metrics": metrics, "hyperparameters": {"n_epochs": 2}})
    )


def test_nothing_to_plot(api, capsys):
    api.job_plan = ["queued"]
    assert script.main([api.add_job()["id"], "--plot", "loss.svg"]) == 3
    assert "no loss to draw" in capsys.readouterr().err
    assert not Path("loss.svg").exists()


@pytest.mark.parametrize(
    ("values", "line"),
    [([1.0], "▁"), ([1.0, 1.0], "▁▁"), ([0, 7], "▁█"), ([7, 0], "█▁")],
)
def test_sparkline(values, line):
    assert script.sparkline(values) == line
    assert len(script.sparkline([float(number) for number in range(1000)])) == 40


@pytest.mark.parametrize("largest", [1e-4, 0.3, 1, 2.5, 7, 60, 12345])
def test_ticks(largest):
    ticks = script.ticks(largest)
    assert ticks[0] == 0 and ticks[-1] <= largest and 3 <= len(ticks) <= 7


def test_duration():
    assert [script.duration(s) for s in (0, 45, 150, 9000, 360000)] == ["0 s", "45 s", "2 min", "2.5 h", "4.2 days"]


# Following


def test_wait_shows_each_event_once_oldest_first(api, fast, capsys):
    api.job_plan = ["validating_files", "queued", "running", "running", "running", "succeeded"]
    job = api.add_job()
    write_job_record(api, job)
    assert script.main(["--wait"]) == 0
    out = capsys.readouterr().out
    followed = out[: out.index("\n\nJob ID")].splitlines()
    steps = [line for line in followed if line.startswith("step")]
    assert [line.split()[1] for line in steps] == [f"{step}/6" for step in range(1, 7)]
    assert steps[1].startswith("step 2/6  loss 1.768  token accuracy 0.67")
    assert sum("Created fine-tuning job" in line for line in followed) == 1
    assert followed[-1] == "succeeded"
    assert "Next: python use_fine_tuned_model.py" in out


def test_only_new_events_are_fetched(api, fast, monkeypatch):
    api.job_plan = ["running"] * 6 + ["succeeded"]
    job = api.add_job()
    for step in range(1, 251):
        api.add_step(job["id"], step, 300)
    assert script.main(["--wait", job["id"]]) == 0
    pages = [request for request in api.requests if request.path.endswith("/events")]
    assert sum("after" in request.query for request in pages) == 2, "250 events are three pages, read once"


@pytest.mark.parametrize("times", [[5, 5, 5, 5], [5, 6, 7, 8], [9, 9, 3, 4], [0, 0, 0, 0]])
@pytest.mark.parametrize("oldest_first", [False, True])
def test_steps_come_in_order_whatever_the_page_says(api, capsys, times, oldest_first):
    job = api.add_job(status="running")
    api.job_plan = ["running"]
    for step, created_at in enumerate(times, 1):
        api.add_step(job["id"], step, 4)
        api.events[job["id"]][-1]["created_at"] = created_at
    if oldest_first:
        api.events[job["id"]].reverse()
    assert [figures["step"] for figures in check_json([job["id"]], capsys)[1]["metrics"]] == [1, 2, 3, 4]


@pytest.mark.parametrize("with_id", [True, False])
def test_many_events_oldest_first(api, fast, monkeypatch, capsys, with_id):
    """All of them are read at each look, since the news stand on the last page."""
    api.job_plan = ["running"] * 2 + ["succeeded"]
    job, original, count = api.add_job(), api.page, 150 if with_id else 50

    def oldest_first(request, items, **how):
        for second, item in enumerate(items := list(items)):
            item["created_at"] = 1_700_000_000 + second
        page = original(request, reversed(items), **how)
        return page if with_id else {**page, "data": [{**item, "id": None} for item in page["data"]]}

    monkeypatch.setattr(api, "page", oldest_first)
    for step in range(1, count + 1):
        api.add_step(job["id"], step, 300)
    assert script.main(["--wait", job["id"]]) == 0
    out = capsys.readouterr().out
    assert all(out.count(f"step {step}/300 ") == 1 for step in range(1, count + 1))
    assert out.count("successfully completed") == 1


def test_a_server_whose_pages_never_end(api, fast):
    job = api.add_job()
    original = api.list_events
    api.list_events = lambda request, job_id: {**original(request, job_id), "has_more": True}
    assert script.main(["--wait", job["id"]]) == 0


@pytest.mark.parametrize(("status", "code"), [("succeeded", 0), ("failed", 1), ("cancelled", 1), ("canceled", 1)])
def test_every_end_ends_the_wait(api, fast, status, code):
    api.job_plan = ["queued", "running", status]
    assert script.main(["--wait", api.add_job()["id"]]) == code


def test_an_unknown_word_is_said_once_and_waited_on(api, fast, capsys):
    api.job_plan = ["queued", "hibernating", "hibernating", "hibernating", "succeeded"]
    assert script.main(["--wait", api.add_job()["id"]]) == 0
    assert capsys.readouterr().out.count("no status known here") == 1


def test_timeout(api, capsys):
    api.job_plan = ["running"]
    started = time.monotonic()
    assert script.main(["--wait", "--timeout", "0.6", api.add_job()["id"]]) == 3
    assert 0.5 < time.monotonic() - started < 5
    assert "goes on at the server" in capsys.readouterr().err


def test_silence_is_said(api, fast, monkeypatch, capsys):
    monkeypatch.setattr(script, "SILENCE", 0.02)
    api.job_plan = ["running"] * 30 + ["succeeded"]
    assert script.main(["--wait", api.add_job()["id"]]) == 0
    assert "No news from the job" in capsys.readouterr().out


def test_the_pause_grows_and_starts_short(api, fast):
    api.job_plan = ["running"] * 20 + ["succeeded"]
    assert script.main(["--wait", api.add_job()["id"]]) == 0
    assert fast[0] < 1.0 and script.LONGEST_PAUSE * 0.8 <= fast[-1] <= script.LONGEST_PAUSE * 1.2
    assert len(set(fast)) == len(fast), "jitter"


RIDDEN_OUT = [
    ("500 before", {}), ("drop before", {}), ("drop after", {}), ("slow", {"seconds": 1}), ("malformed", {}),
    ("html", {}), ("truncated", {}), ("429", {}), ("429", {"retry_after": 7}), ("429", {"retry_after": 500}),
]  # fmt: skip
ENDING = [("401", {}), ("403", {}), ("404", {}), ("429", {"code": "insufficient_quota"})]


@pytest.mark.parametrize(
    "number", [pytest.param(number, marks=() if number in (2, 5) else pytest.mark.slow) for number in range(2, 8)]
)
@pytest.mark.parametrize(("kind", "how"), RIDDEN_OUT, ids=str)
def test_faults_in_between_are_ridden_out(api, fast, capsys, number, kind, how):
    """Request 0 and 1 are the first look; a fault at any later one is said and waited out."""
    api.job_plan = ["queued", "running", "running", "running", "succeeded"]
    job = api.add_job()
    api.fault(number, kind, **how)
    assert script.main(["--wait", job["id"]]) == 0
    out = capsys.readouterr().out
    assert out.count("No answer from the server") == 1 and out.count("answers again") == 1
    assert out.count("step 3/6") == 1 and out.count("Created fine-tuning job") == 1
    if how:
        assert how.get("retry_after", 0) in [0, *fast]


@pytest.mark.parametrize("kind", ["500 before", "429", "drop before"])
def test_one_fault_at_the_first_look_does_not_end_the_wait(api, fast, kind):
    api.fault(0, kind)
    assert script.main(["--wait", api.add_job()["id"]]) == 0


@pytest.mark.parametrize("number", range(2, 5))
@pytest.mark.parametrize(("kind", "how"), ENDING, ids=str)
def test_some_answers_end_the_wait_at_once(api, fast, number, kind, how):
    api.job_plan = ["running"] * 9 + ["succeeded"]
    job = api.add_job()
    api.fault(number, kind, **how)
    code = script.main(["--wait", job["id"]])
    if kind == "404" and api.requests[number].path.endswith("/events"):
        assert code == 0, "a server without events"
    else:
        assert code == (4 if kind == "429" else 2)
        assert len(api.requests) == number + 1


def test_a_server_that_stays_away_ends_the_wait(api, fast, monkeypatch, capsys):
    monkeypatch.setattr(script, "FAULT_PATIENCE", 0.5)
    api.job_plan = ["running"]
    job = api.add_job()
    for number in range(2, 500):
        api.fault(number, "500 before")
    assert script.main(["--wait", job["id"]]) == 4
    captured = capsys.readouterr()
    assert captured.out.count("No answer from the server") == 1
    assert "the server failed" in captured.err


FLOWS = [["JOB"], ["--wait", "JOB"], ["--list"], ["--cancel", "JOB"], ["--clean-up", "JOB", "--yes"]]


@pytest.mark.slow
@pytest.mark.parametrize("argv", FLOWS, ids=str)
@pytest.mark.parametrize(("kind", "how"), RIDDEN_OUT + ENDING, ids=str)
@pytest.mark.parametrize("number", range(5))
def test_every_fault_at_every_request_of_every_flow(api, fast, capsys, argv, kind, how, number):
    """Whatever happens: a documented exit code, at most one sentence, no traceback, no key, one cancellation."""
    job = api.add_job()
    if "--clean-up" in argv:
        api.finish(job["id"])
    api.echo_key = True
    api.fault(number, kind, **how)
    code = script.main([job["id"] if word == "JOB" else word for word in argv])
    captured = capsys.readouterr()
    assert code in (0, 1, 2, 3, 4)
    assert (code in (0, 1) and "--cancel" not in argv) or code == 0 or captured.err.strip()
    assert api.key not in captured.out + captured.err
    assert len(captured.err.strip().splitlines()) <= 1
    if code == 0 and "--cancel" in argv:
        assert api.jobs[job["id"]]["status"] == "cancelled"


def test_on_a_terminal_steps_share_one_line(api):
    pty = pytest.importorskip("pty")
    api.job_plan = ["queued", "running", "succeeded"]
    job = api.add_job()
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, str(SCRIPT), "--wait", job["id"]], stdout=slave, stderr=subprocess.PIPE)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # Linux ends a closed terminal with an error
        while chunk := os.read(master, 4096):
            shown += chunk
    assert process.wait(20) == 0
    text = shown.decode()
    assert "\rstep 2/6" in text and "step 2/6  loss 1.768  token accuracy 0.67\n" not in text
    assert "Next: python use_fine_tuned_model.py" in text


@pytest.mark.skipif(os.name == "nt", reason="needs SIGINT")
def test_interrupted(api):
    api.job_plan = ["running"]
    job = api.add_job()
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--wait", job["id"]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 20
    while len(api.requests) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "the job goes on at the server" in err and "Traceback" not in err
    assert api.jobs[job["id"]]["status"] == "running"


# The other commands


def test_list(api, capsys):
    for number in range(25):
        api.add_job(created_at=int(time.time()) - 3600 * (25 - number))
    api.finish("ftjob-0049")
    assert script.main(["--list", "--limit", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["JOB", "ID", "STATUS", "MODEL", "AGE", "FINE-TUNED", "MODEL"]
    assert [line.split()[0] for line in lines[1:]] == ["ftjob-0049", "ftjob-0047", "ftjob-0045"]
    assert "ft:gpt-4.1-mini-2025-04-14:acme::0049" in lines[1]
    assert api.calls("GET /fine_tuning/jobs") == 1
    assert script.main(["--list", "--limit", "3", "--json"]) == 0
    assert [job["job_id"] for job in json.loads(capsys.readouterr().out)] == ["ftjob-0049", "ftjob-0047", "ftjob-0045"]


def test_cancel(api, capsys):
    job = api.add_job()
    assert script.main(["--cancel", job["id"]]) == 0
    assert job["status"] == "cancelled"
    assert script.main(["--cancel", job["id"]]) == 0, "it is what was asked for"
    api.finish(job["id"])
    assert script.main(["--cancel", job["id"]]) == 1


def test_clean_up_shows_first_and_deletes_with_yes(api, capsys):
    training = api.add_file("a.jsonl", b"x")
    job = api.add_job(training_file=training["id"])
    assert script.main(["--clean-up", job["id"]]) == 2, "not while it is running"
    assert "needs these files" in capsys.readouterr().err
    model = api.finish(job["id"])["fine_tuned_model"]
    assert script.main(["--clean-up", job["id"]]) == 0
    assert training["id"] in capsys.readouterr().out
    assert api.calls("DELETE *") == 0
    assert script.main(["--clean-up", job["id"], "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["deleted"] == [training["id"], job["result_files"][0], model]
    assert api.files == {} and model not in api.models
    assert script.main(["--clean-up", job["id"], "--yes"]) == 0, "what is gone is gone"


def test_clean_up_keeps_what_a_running_job_reads(api, capsys):
    training = api.add_file("a.jsonl", b"x")
    job = api.add_job(training_file=training["id"])
    other = api.add_job(training_file=training["id"])
    api.finish(job["id"])
    assert script.main(["--clean-up", job["id"], "--yes"]) == 2
    assert f"Job {other['id']} is queued and needs these files" in capsys.readouterr().err
    assert api.calls("DELETE *") == 0


def test_json_with_wait_is_one_document(api, fast, capsys):
    job = api.add_job()
    code, seen = check_json(["--wait", job["id"]], capsys)
    assert (code, seen["status"], len(seen["metrics"])) == (0, "succeeded", 6)


# Which job


def test_no_job_yet(api, capsys):
    assert script.main([]) == 2
    assert "There is no job yet" in capsys.readouterr().err


def test_an_unfinished_record(api, capsys):
    write_job_record(api, {"id": None, "model": "m"})
    assert script.main([]) == 2
    assert "has not finished" in capsys.readouterr().err


def test_a_corrupt_record_does_not_hide_a_job_that_is_named(api, capsys):
    Path("fine_tune_job.json").write_text("{")
    assert script.main([]) == 2
    assert "not readable JSON" in capsys.readouterr().err
    assert script.main([api.add_job()["id"]]) == 0


def test_a_record_of_another_server(api, capsys):
    job = api.add_job()
    write_job_record(api, job, base_url="https://api.openai.com/v1")
    assert script.main([]) == 2
    assert "https://api.openai.com/v1" in capsys.readouterr().err
    assert api.requests == []
    assert script.main([job["id"]]) == 0, "a named job is asked for where the client points"


def test_a_record_of_the_same_server_under_another_name(api):
    job = api.add_job()
    write_job_record(api, job, base_url=api.base_url.replace("127.0.0.1", "localhost") + "/")
    assert script.main([]) == 0


def test_the_next_command_repeats_the_job_id_that_was_given(api, capsys):
    api.job_plan = ["running"]
    job = api.add_job()
    assert script.main([job["id"]]) == 0
    assert capsys.readouterr().out.endswith(f"Next: python check_fine_tune_status.py {job['id']} --wait\n")
    assert script.main([job["id"], "--wait", "--timeout", "0.1"]) == 3
    assert f"check_fine_tune_status.py {job['id']} --wait" in capsys.readouterr().err
    api.finish(job["id"])
    assert script.main([job["id"]]) == 0
    assert capsys.readouterr().out.endswith(f"Next: python use_fine_tuned_model.py {job['id']}\n")


def test_unknown_job(api, capsys):
    assert script.main(["ftjob-nope"]) == 2
    assert "no such model, job or file" in capsys.readouterr().err


# For other code


def test_for_other_code(api, fast, capsys):
    job = api.add_job()
    assert script.wait_for_training(job["id"]) == api.jobs[job["id"]]["fine_tuned_model"]
    assert script.check_status(job["id"])["status"] == "succeeded"
    assert [row["job_id"] for row in script.list_jobs()] == [job["id"]]
    assert capsys.readouterr().out == ""
    api.job_plan = ["queued", "failed"]
    with pytest.raises(script.StepError, match="failed: line 3") as caught:
        script.wait_for_training(api.add_job()["id"])
    assert caught.value.exit_code == 1
    api.job_plan = ["running"]
    with pytest.raises(script.StepError) as caught:
        script.wait_for_training(api.add_job()["id"], timeout=0.01)
    assert caught.value.exit_code == 3


def test_a_closed_pipe_is_no_error(api):
    api.job_plan = ["running"]
    job = api.add_job()
    reader, writer = os.pipe()
    os.close(reader)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, str(SCRIPT), job["id"]]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=buffered)
    os.close(writer)
    assert (done.returncode, "Traceback" in done.stderr, "Exception" in done.stderr) == (0, False, False)


def test_an_ascii_terminal(api):
    job = api.add_job()
    api.finish(job["id"])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), job["id"]], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 0, done.stderr
    assert b"Training loss:" in done.stdout


def test_with_the_real_server(tiny_api, tmp_path):
    """Steps 2 and 3 on the local API, as a reader runs them."""
    row = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "It is a long enough answer. " * 3},
    ]
    data = "".join(
        json.dumps({"messages": [*row, {"role": "user", "content": f"{n}?"}, row[1]]}) + "\n" for n in range(10)
    )
    (tmp_path / "training_data.jsonl").write_text(data)

    def run(name, *argv):
        command = [sys.executable, str(SCRIPT.with_name(name)), *argv]
        done = subprocess.run(
            command, cwd=tmp_path, env=tiny_api.environment("tiny"), capture_output=True, text=True, encoding="utf-8"
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    job_id = run("fine_tune.py", "--quiet", "--n-epochs", "1").strip()
    followed = run("check_fine_tune_status.py", "--wait")
    assert "New fine-tuned model created: ft:tiny:local:" in followed
    assert followed.endswith("Next: python use_fine_tuned_model.py\n")
    run("check_fine_tune_status.py", "--clean-up", job_id, "--yes")
    seen = json.loads(run("check_fine_tune_status.py", "--json", "--plot", "loss.svg"))
    assert (seen["job_id"], seen["status"], seen["hyperparameters"]["n_epochs"]) == (job_id, "succeeded", 1)
    assert seen["metrics"] and seen["trained_tokens"] and seen["cost"] == 0
    assert ElementTree.parse(tmp_path / "loss.svg")
    assert run("fine_tune.py", "--quiet", "--n-epochs", "1").strip() == job_id
