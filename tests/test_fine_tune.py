"""fine_tune.py: one upload and one job, whatever the server does and wherever the process is killed."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_api import FakeAPI

import fine_tune

SCRIPT = Path(fine_tune.__file__)
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
ALL_FAULTS = [
    ("500 before", {}), ("500 after", {}), ("drop before", {}), ("drop after", {}), ("slow", {"seconds": 1.0}),
    ("429", {}), ("429", {"retry_after": 1}), ("429", {"retry_after": 150}), ("429", {"code": "insufficient_quota"}),
    ("malformed", {}), ("html", {}), ("truncated", {}), ("401", {}), ("403", {}), ("404", {}),
]  # fmt: skip


def chat_row(number: int, system: str = "You are a helpful assistant.") -> dict:
    answer = f"Answer number {number}: it is long enough to be taken for a proper answer of the assistant."
    return {
        "messages": [
            {"role": "system", "content": system},
            {"role": "user", "content": f"What is the meaning of question number {number}?"},
            {"role": "assistant", "content": answer},
        ]
    }


def write_rows(path: str, numbers) -> None:
    Path(path).write_text("".join(json.dumps(chat_row(number)) + "\n" for number in numbers), encoding="utf-8")


@pytest.fixture
def api(tmp_path, monkeypatch):
    """A fake API, its variables set, and a folder with training data as the current one."""
    with FakeAPI() as api:
        monkeypatch.chdir(tmp_path)
        for name, value in api.env(FINE_TUNE_TIMEOUT="0.4").items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("FINE_TUNE_MODEL", raising=False)
        write_rows("training_data.jsonl", range(12))
        yield api


@pytest.fixture
def no_sleep(monkeypatch):
    """Waiting takes no time, and is written down. The seconds until a lost request is given up still pass."""
    waits: list[float] = []

    def sleep(seconds):
        waits.append(seconds)
        real_sleep(min(seconds, 0.05))

    real_sleep = time.sleep
    monkeypatch.setattr(time, "sleep", sleep)
    return waits


def record() -> dict:
    return json.loads(Path("fine_tune_job.json").read_text(encoding="utf-8"))


def earlier_records() -> list[dict]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in Path("fine_tune_jobs").glob("*.json")]


def everything_written(folder: Path) -> str:
    return "".join(path.read_text(encoding="utf-8", errors="replace") for path in folder.rglob("*") if path.is_file())


# The step as the tutorial shows it


def test_transcript_and_record(api, capsys):
    assert fine_tune.main([]) == 0
    assert capsys.readouterr().out == TRANSCRIPT
    written = record()
    assert written["job_id"] == "ftjob-0002"
    assert written["training_file"] == "file-0001"
    assert written["base_url"] == api.base_url
    assert written["hyperparameters"] == {}
    assert written["system_prompt"] == "You are a helpful assistant."
    job = api.jobs["ftjob-0002"]
    assert "n_epochs" not in str(next(request.body for request in api.requests if request.name.endswith("/jobs")))
    assert job["metadata"][fine_tune.TOKEN] == written["token"]


def test_same_command_again_reports_the_job(api, capsys):
    assert fine_tune.main([]) == 0
    capsys.readouterr()
    assert fine_tune.main([]) == 0
    out = capsys.readouterr().out
    assert "exists already" in out and "Job ID: ftjob-0002" in out
    assert (api.calls("POST /files"), api.calls("POST /fine_tuning/jobs")) == (1, 1)


def test_other_options_make_a_new_job_and_keep_the_old_record(api):
    assert fine_tune.main([]) == 0
    first = record()
    assert fine_tune.main(["--n-epochs", "4", "--suffix", "bot", "--seed", "5", "--batch-size", "2"]) == 0
    assert len(api.files) == 1, "the same bytes are not sent twice"
    assert earlier_records() == [first]
    body = api.requests[-1].body
    assert body["hyperparameters"] == {"n_epochs": 4, "batch_size": 2}
    assert (body["suffix"], body["seed"]) == ("bot", 5)


def test_options_of_an_earlier_job_bring_that_job_back(api, capsys):
    assert fine_tune.main([]) == 0
    first = record()
    assert fine_tune.main(["--n-epochs", "4"]) == 0
    second = record()
    assert fine_tune.main([]) == 0
    assert record() == first, "steps 3 to 5 go on with it"
    assert f"Job ID: {first['job_id']}" in capsys.readouterr().out
    assert len(api.jobs) == 2
    assert second in earlier_records()


def test_other_bytes_make_a_new_upload_and_job(api):
    assert fine_tune.main([]) == 0
    write_rows("training_data.jsonl", range(13))
    assert fine_tune.main([]) == 0
    assert (len(api.files), len(api.jobs)) == (2, 2)


@pytest.mark.parametrize("status", ["failed", "cancelled", "canceled", "FAILED", "Failed Validation"])
def test_a_dead_job_is_followed_by_a_new_one(api, status):
    assert fine_tune.main([]) == 0
    dead = record()["job_id"]
    api.jobs[dead]["status"] = status
    assert fine_tune.main([]) == 0
    assert record()["job_id"] != dead
    assert [earlier["job_id"] for earlier in earlier_records()] == [dead]
    assert len(api.files) == 1


def test_force_starts_anew(api):
    assert fine_tune.main([]) == 0
    assert fine_tune.main(["--force"]) == 0
    assert (len(api.files), len(api.jobs)) == (2, 2)


def test_force_does_not_take_an_old_upload_for_its_own_lost_one(api, no_sleep, capsys):
    assert fine_tune.main([]) == 0
    api.fault("POST /files", "drop before")
    assert fine_tune.main(["--force"]) == 4 and (len(api.files), len(api.jobs)) == (1, 1)
    assert fine_tune.main(["--force"]) == 0 and (len(api.files), len(api.jobs)) == (2, 2)


@pytest.mark.parametrize("status", [405, 501])
def test_a_server_that_only_lists_its_jobs_gets_no_second_one(api, no_sleep, capsys, status):
    assert fine_tune.main([]) == 0
    api.fault("GET /fine_tuning/jobs/*", str(status), times=9)
    assert fine_tune.main([]) == 0 and len(api.jobs) == 1
    assert "exists already" in capsys.readouterr().out


def test_metadata_of_the_user_is_never_dropped(api, capsys):
    api.metadata = "rejected"
    assert fine_tune.main(["--extra", '{"metadata": {"team": "a"}}']) == 2
    assert api.jobs == {} and "metadata" in capsys.readouterr().err


def test_a_file_the_server_has_no_more_is_sent_again(api):
    assert fine_tune.main([]) == 0
    api.files.clear()
    assert fine_tune.main(["--n-epochs", "2"]) == 0
    assert (api.calls("POST /files"), len(api.jobs)) == (2, 2)


@pytest.mark.parametrize("status", [404, 405, 501])
def test_a_server_that_only_lists_its_files_is_sent_none_twice(api, no_sleep, status):
    assert fine_tune.main([]) == 0
    api.fault("GET /files/*", str(status), times=9)
    assert fine_tune.main(["--n-epochs", "2"]) == 0
    assert (len(api.files), len(api.jobs)) == (1, 2)


def test_an_upload_s_name_is_one_that_every_server_keeps(api):
    shutil.copy("training_data.jsonl", 'my "großer"\n name.jsonl')
    assert fine_tune.main(['my "großer"\n name.jsonl']) == 0
    assert re.fullmatch(r"[\w.-]+\.jsonl", next(iter(api.files.values()))["filename"], re.ASCII)


def test_quiet_prints_the_id_alone(api, capsys):
    assert fine_tune.main(["--quiet"]) == 0
    assert capsys.readouterr().out == "ftjob-0002\n"


def test_validation_file_and_extra(api, capsys):
    write_rows("validation.jsonl", range(20, 32))
    extra = '{"trainingType": "GlobalStandard", "hyperparameters": {"lora": true}, "metadata": {"team": "a"}}'
    assert fine_tune.main(["--validation-file", "validation.jsonl", "--n-epochs", "2", "--extra", extra]) == 0
    body = api.requests[-1].body
    assert body["validation_file"] == record()["validation_file"] != record()["training_file"]
    assert body["trainingType"] == "GlobalStandard"
    assert body["hyperparameters"] == {"n_epochs": 2, "lora": True}
    assert set(body["metadata"]) == {"team", fine_tune.TOKEN}


def test_for_other_code(api):
    job_id = fine_tune.start_fine_tuning("training_data.jsonl", None, "bot")
    assert job_id == fine_tune.start_fine_tuning("training_data.jsonl", suffix="bot")
    tuner = fine_tune.FineTuner()
    assert tuner.create_job("training_data.jsonl", suffix="bot") == job_id
    assert tuner.monitor_progress().startswith("ft:gpt-4.1-mini-2025-04-14:")


# Before spending


def test_unfit_data_stops_before_anything_is_sent(api, capsys):
    Path("training_data.jsonl").write_text('{"messages": []}\n', encoding="utf-8")
    assert fine_tune.main([]) == 1
    assert "training_data.jsonl:1: error:" in capsys.readouterr().err
    assert api.requests == []


def test_dry_run_sends_nothing_and_tells_the_cost(api, capsys):
    api.models["gpt-4.1-mini-2025-04-14"]["shutdown_date"] = "2099-01-14"
    assert fine_tune.main(["--dry-run", "--model", "gpt-4.1-mini-2025-04-14", "--n-epochs", "3"]) == 0
    captured = capsys.readouterr()
    assert "12 examples" in captured.err and "3 epochs" in captured.err
    assert "stops on 2099-01-14" in captured.err
    assert {request.method for request in api.requests} == {"GET"}
    assert not Path("fine_tune_job.json").exists()


def test_max_cost(api, capsys, monkeypatch):
    import prepare_training_data

    monkeypatch.setattr(prepare_training_data, "training_price", lambda model: 5.0)
    assert fine_tune.main(["--max-cost", "0.000001", "--n-epochs", "50"]) == 2
    assert "above --max-cost" in capsys.readouterr().err
    assert api.calls("POST *") == 0


def test_a_copy_that_stands_alone_says_what_it_leaves_out(api, tmp_path):
    alone = tmp_path / "elsewhere" / "fine_tune.py"
    alone.parent.mkdir()
    shutil.copy(SCRIPT, alone)
    done = run_script([], script=alone)
    assert done.returncode == 0, done.stderr
    assert "not checked, no cost estimated" in done.stderr
    assert len(api.jobs) == 1


def files_here() -> dict:
    return {path: path.read_bytes() for path in Path(".").rglob("*") if path.is_file()}


@pytest.mark.parametrize("unanswered", [False, True])
def test_a_dry_run_changes_nothing_and_always_checks(api, no_sleep, capsys, unanswered):
    assert fine_tune.main([]) == 0
    if unanswered:
        api.fault("POST /fine_tuning/jobs", "drop before")
        assert fine_tune.main(["--seed", "1"]) == 4
    else:
        assert fine_tune.main(["--n-epochs", "2"]) == 0
    before, posts = files_here(), api.calls("POST *")
    capsys.readouterr()
    for argv in (["--n-epochs", "3"], []):
        assert fine_tune.main(["--dry-run", *argv]) == 0
        captured = capsys.readouterr()
        assert "Data:  12 examples" in captured.err and "Cost:" in captured.err
        assert captured.out == "Dry run: nothing was sent.\n"
    assert (files_here(), api.calls("POST *")) == (before, posts)


def test_one_epoch_is_not_epochs(api, capsys):
    assert fine_tune.main(["--dry-run", "--n-epochs", "1"]) == 0
    assert "for 1 epoch\n" in capsys.readouterr().err


# Exactly once


def play(api, match, kind, how, argv=()) -> list[int]:
    """Run with one fault, then run again as often as a patient reader would; return the exit codes."""
    api.fault(match, kind, **how)
    codes = []
    for _ in range(4):
        codes.append(fine_tune.main(list(argv)))
        if codes[-1] == 0:
            break
    return codes


def assert_exactly_once(api, codes):
    assert codes[-1] == 0, codes
    assert len(api.jobs) == 1
    assert len(api.files) == 1
    assert record()["job_id"] == next(iter(api.jobs))
    assert record()["unanswered"] == {}


REQUESTS = ["GET /models/*", "POST /files", "GET /files/*", "POST /fine_tuning/jobs"]


@pytest.mark.parametrize("kind", ["500 after", "drop after", "slow", "malformed", "html", "truncated"])
@pytest.mark.parametrize("match", ["POST /files", "POST /fine_tuning/jobs"])
def test_a_lost_answer_makes_no_second(api, no_sleep, match, kind):
    codes = play(api, match, kind, {"seconds": 1.0})
    assert_exactly_once(api, codes)
    assert codes == [0], "what was carried out is found in the same run"
    assert api.calls("POST /files") == api.calls("POST /fine_tuning/jobs") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "how"), ALL_FAULTS, ids=lambda value: str(value))
@pytest.mark.parametrize("match", REQUESTS)
@pytest.mark.parametrize("metadata", ["kept", "dropped", "rejected"])
def test_every_fault_at_every_request(api, no_sleep, capsys, match, kind, how, metadata):
    api.metadata = metadata
    codes = play(api, match, kind, how)
    assert_exactly_once(api, codes)
    assert set(codes) <= {0, 1, 2, 3, 4}
    assert_no_key(api, capsys)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "how"), ALL_FAULTS, ids=lambda value: str(value))
@pytest.mark.parametrize("match", ["GET /files", "GET /fine_tuning/jobs"])
def test_every_fault_while_looking_for_what_was_lost(api, no_sleep, match, kind, how):
    api.fault("POST" + match[3:], "drop after")
    assert_exactly_once(api, play(api, match, kind, how))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "how"), ALL_FAULTS, ids=lambda value: str(value))
@pytest.mark.parametrize("number", range(6))
def test_every_fault_at_every_request_with_two_files(api, no_sleep, kind, how, number):
    write_rows("validation.jsonl", range(20, 32))
    argv = ["--validation-file", "validation.jsonl", "--force"]
    codes = play(api, number, kind, how, argv)
    assert codes[-1] == 0, codes
    assert (len(api.files), len(api.jobs)) == (2, 1)
    assert record()["job_id"] in api.jobs


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "how"), ALL_FAULTS, ids=lambda value: str(value))
def test_every_fault_while_deleting_the_orphan(api, no_sleep, kind, how):
    api.fault("POST /fine_tuning/jobs", "403", times=9, code="training_not_available")
    api.fault("DELETE /files/*", kind, **how)
    codes = [fine_tune.main([]), fine_tune.main([])]
    assert codes[-1] == 2 and set(codes) <= {2, 4}
    assert api.jobs == {}
    assert api.files == {} or kind == "404", "a server that says the file is gone is believed"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "how"), ALL_FAULTS, ids=lambda value: str(value))
def test_every_fault_while_reporting_the_existing_job(api, no_sleep, kind, how):
    assert fine_tune.main([]) == 0
    codes = play(api, "GET /fine_tuning/jobs/*", kind, how)
    assert codes[-1] == 0
    assert len(api.jobs) == 1, "a job that the server lists is there, also where it says 404 for once"


def test_a_job_that_the_server_has_no_more_is_created_anew(api, capsys):
    assert fine_tune.main([]) == 0
    gone = record()["job_id"]
    api.jobs.clear()
    assert fine_tune.main([]) == 0
    assert f"Job {gone} is not on the server any more: creating a new one." in capsys.readouterr().err
    assert list(api.jobs) == [record()["job_id"]] != [gone]


@pytest.mark.parametrize("metadata", ["dropped", "rejected"])
def test_servers_without_metadata(api, no_sleep, metadata):
    api.metadata = metadata
    assert fine_tune.main(["--n-epochs", "2"]) == 0  # a job with the same file and model, which is not the lost one
    api.fault("POST /fine_tuning/jobs", "drop after", times=2 if metadata == "rejected" else 1)
    if metadata == "rejected":
        api.faults[-1].times = 0
        api.after = drop_second_create(api)
    assert fine_tune.main([]) == 0
    assert len(api.jobs) == 2
    assert record()["job_id"] == list(api.jobs)[-1]


@pytest.mark.parametrize("other", ["recorded", "long ago"])
def test_without_metadata_no_other_job_is_taken_for_the_lost_one(api, no_sleep, other):
    api.metadata = "dropped"
    assert fine_tune.main(["--n-epochs", "2"]) == 0
    first = record()["job_id"]
    if other == "long ago":
        api.jobs[first]["created_at"] -= 3600
        Path("fine_tune_job.json").write_text(json.dumps({**record(), "job_id": None}))  # forgotten, the upload is not
    api.fault("POST /fine_tuning/jobs", "drop before")
    assert fine_tune.main([]) == 4
    assert fine_tune.main([]) == 0
    assert record()["job_id"] != first and len(api.jobs) == 2


def drop_second_create(api):
    """The first create is refused for its metadata; the answer to the second one is lost."""

    def after(request):
        if request.name == "POST /fine_tuning/jobs":
            api.after = lambda request: None
            from fake_api import HTTPError

            raise HTTPError(500, "lost")

    return after


def test_a_request_that_never_arrived_is_sent_again_only_after_its_time(api):
    api.fault("POST /fine_tuning/jobs", "drop before")
    assert fine_tune.main([]) == 4
    sent = record()["unanswered"]["job_id"]
    assert fine_tune.main([]) == 0
    assert len(api.jobs) == 1
    assert time.time() - sent >= 0.4, "the server had the whole timeout to carry it out"


def test_an_answer_that_never_came_is_found_even_with_other_options(api, no_sleep, capsys):
    api.fault("POST /fine_tuning/jobs", "drop after")
    api.fault("GET /fine_tuning/jobs", "500 before", times=9)
    assert fine_tune.main([]) == 4
    api.faults.clear()
    assert fine_tune.main(["--n-epochs", "2"]) == 0
    lost = next(iter(api.jobs))
    assert lost in capsys.readouterr().err
    assert [earlier["job_id"] for earlier in earlier_records()] == [lost]


@pytest.mark.parametrize(("path", "posts"), [("/fine_tuning/jobs", 1), ("/files", 0)])
@pytest.mark.parametrize("status", ["404", "405", "501"])
def test_a_server_that_lists_nothing_gets_no_second_request_unless_forced(api, no_sleep, capsys, path, posts, status):
    api.fault(f"POST {path}", "drop after")
    api.fault(f"GET {path}", status, times=9)
    for _ in range(2):
        assert fine_tune.main([]) == 2
        assert capsys.readouterr().err.endswith(
            "look there yourself whether the request was carried out; to start anew: --force.\n"
        )
    assert api.calls(f"POST {path}") == 1 and len(api.jobs) == posts
    assert fine_tune.main(["--force"]) == 0
    assert fine_tune.main([]) == 0, "the folder is free again"
    assert len(api.jobs) == posts + 1


def test_each_attempt_renews_the_time_of_the_request(api, monkeypatch):
    """A kill in the second attempt: how long the request may still be on its way counts from then."""
    times = []
    monkeypatch.setattr(time, "sleep", lambda seconds: times.append(record()["unanswered"]["job_id"]))
    api.fault("POST /fine_tuning/jobs", "429")
    api.fault("POST /fine_tuning/jobs", "drop before")
    assert fine_tune.main([]) == 4
    assert record()["unanswered"]["job_id"] > times[0]


@pytest.mark.parametrize("body", [b"null", b'"ok"', b"[]", '{"id": "ä'.encode()[:-1]])
@pytest.mark.parametrize("number", range(4))
def test_an_answer_of_another_type_cannot_be_read(api, no_sleep, capsys, body, number):
    send, left = api.send, [number + 1]

    def send_once_something_else(http, status, content, *more, **how):
        left[0] -= 1
        send(http, status, content if left[0] else body, *more, **how)

    api.send = send_once_something_else
    codes = [fine_tune.main([])]
    if codes == [4]:
        assert "sent an answer that cannot be read" in capsys.readouterr().err
        codes.append(fine_tune.main([]))
    assert_exactly_once(api, codes)


def test_refused_connection_leaves_no_doubt(api, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")  # nothing listens on the discard port
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert fine_tune.main([]) == 4
    assert "is the local API running?" in capsys.readouterr().err
    assert not Path("fine_tune_job.json").exists() or record()["unanswered"] == {}


@pytest.mark.parametrize(
    ("argv", "match", "kind"),
    [
        (["--model", "nope"], "POST /nothing", "400"),
        (["--suffix", ""], "POST /fine_tuning/jobs", "400"),
        (["--force"], "POST /files", "413"),
    ],
)
def test_a_refused_job_costs_neither_the_earlier_one_nor_a_later_try(api, capsys, argv, match, kind):
    assert fine_tune.main([]) == 0
    first = record()
    api.fault(match, kind)
    assert fine_tune.main(argv) == 2
    assert earlier_records() == [first]
    assert fine_tune.main([]) == 0 and len(api.jobs) == 1
    assert record() == first, "the earlier command brings the earlier job back"
    api.add_model("nope")
    assert fine_tune.main(argv) == 0, "what was refused can be had later"
    assert len(api.jobs) == 2 and record()["job_id"] == list(api.jobs)[-1]
    assert len(api.files) == (2 if argv == ["--force"] else 1)


def test_one_server_under_two_names_is_one_server(api, monkeypatch):
    assert fine_tune.main([]) == 0
    monkeypatch.setenv("OPENAI_BASE_URL", api.base_url.replace("127.0.0.1", "localhost") + "/")
    assert fine_tune.main([]) == 0
    assert len(api.jobs) == 1
    assert not fine_tune.same_server("http://localhost:1/v1", "http://localhost:2/v1")
    assert not fine_tune.same_server("http://localhost/v1", "http://localhost.example/v1")


# Killed


KILLER = """
import os, runpy, signal, sys
left, when = int(sys.argv[1]), sys.argv[2]
real_replace = os.replace
def replace(*paths):
    global left
    left -= 1
    if left == 0 and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    real_replace(*paths)
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
sys.argv = sys.argv[3:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_script(argv, script=SCRIPT, prefix=(), **env):
    command = [sys.executable, *prefix, str(script), *argv]
    return subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", env={**os.environ, **env}, timeout=60
    )


def kill_at_request(api, number: int, argv=()) -> bool:
    """Run, and kill the process once the server has carried out request `number` (from 0); True if it came so far."""
    command = [sys.executable, str(SCRIPT), *argv]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    api.requests.clear()

    def after(request):
        if len(api.requests) == number + 1:
            process.kill()
            process.wait()

    api.after = after
    process.communicate(timeout=60)
    api.after = lambda request: None
    return process.returncode == -signal.SIGKILL


def assert_whole_files():
    for path in [Path("fine_tune_job.json"), *Path("fine_tune_jobs").glob("*")]:
        if path.exists():
            json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
@pytest.mark.parametrize(
    "number", [pytest.param(number, marks=() if number in (1, 3) else pytest.mark.slow) for number in range(4)]
)
@pytest.mark.parametrize("metadata", ["kept", pytest.param("dropped", marks=pytest.mark.slow)])
@pytest.mark.parametrize("argv", [[], pytest.param(["--force"], marks=pytest.mark.slow)])
def test_killed_after_a_request(api, number, metadata, argv):
    api.metadata = metadata
    assert kill_at_request(api, number, argv)
    assert_whole_files()
    assert fine_tune.main(argv) == 0
    assert_exactly_once(api, [0])


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
@pytest.mark.slow
def test_killed_after_a_request_of_a_second_job(api):
    """The flow that sets an old record aside: no id of either job is lost."""
    assert fine_tune.main([]) == 0
    first = record()["job_id"]
    for number in range(4):
        argv = ["--n-epochs", str(number + 2)]
        assert kill_at_request(api, number, argv) or number == 3
        assert_whole_files()
        assert fine_tune.main(argv) == 0
        assert len(api.jobs) == number + 2
    assert len(api.files) == 1
    recorded = {json.loads(path.read_text())["job_id"] for path in Path("fine_tune_jobs").glob("*.json")}
    assert first in recorded and recorded | {record()["job_id"]} == set(api.jobs)


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", range(1, 7))
@pytest.mark.parametrize("argv", [[], ["--force"]])
def test_killed_at_a_write(api, number, when, argv):
    done = run_script(argv, prefix=("-c", KILLER, str(number), when))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert_whole_files()
    assert fine_tune.main([] if (number, when) == (6, "after") else argv) == 0  # the id was printed: the order is done
    assert_exactly_once(api, [0])


def test_the_reader_of_our_output_may_go(api):
    command = f"'{sys.executable}' '{SCRIPT}' 2>&1 | head -1"
    subprocess.run(command, shell=True, stdout=subprocess.DEVNULL, timeout=60, check=True)
    assert_exactly_once(api, [0])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_our_output(api):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, str(SCRIPT)], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert_exactly_once(api, [0])


@pytest.mark.skipif(os.name == "nt", reason="needs SIGINT")
def test_interrupted(api):
    api.fault("POST /fine_tuning/jobs", "slow", seconds=5)
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT)], stderr=subprocess.PIPE, text=True, env={**os.environ, "FINE_TUNE_TIMEOUT": "20"}
    )
    deadline = time.monotonic() + 20
    while not api.calls("POST /fine_tuning/jobs") and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Interrupted" in err and "Traceback" not in err
    assert fine_tune.main([]) == 0
    assert_exactly_once(api, [0])


# Files on the server


def test_a_file_found_unfit(api, capsys):
    api.file_plan = ["uploaded", "error"]
    assert fine_tune.main([]) == 1
    assert "line 3 is not valid JSON" in capsys.readouterr().err
    assert fine_tune.main([]) == 1, "the same bytes are not sent again to be found unfit again"
    assert api.calls("POST /files") == 1 and api.jobs == {}


def test_the_key_in_the_details_of_an_unfit_file(api, monkeypatch, capsys):
    retrieve_file = api.retrieve_file
    api.retrieve_file = lambda *given: {**retrieve_file(*given), "status_details": f"refused for {api.key}"}
    api.file_plan = ["error"]
    assert fine_tune.main([]) == 1
    assert capsys.readouterr().err.endswith("refused for [key].\n")


@pytest.mark.parametrize("plan", [[None], ["uploaded", "pending", "Processed"], ["COMPLETED"], ["some new word"]])
def test_file_statuses_of_other_servers(api, no_sleep, plan):
    api.file_plan = plan
    assert fine_tune.main([]) == 0


def test_waiting_for_a_file_is_bounded(api, no_sleep, monkeypatch, capsys):
    monkeypatch.setattr(fine_tune, "FILE_WAIT", 0.3)
    api.file_plan = ["uploaded"]
    assert fine_tune.main([]) == 0
    assert "still calls the file 'uploaded'" in capsys.readouterr().err


# Errors in plain words


def assert_no_key(api, capsys):
    captured = capsys.readouterr()
    assert api.key not in captured.out + captured.err
    assert api.key not in everything_written(Path("."))
    assert "Traceback" not in captured.err


def test_training_not_available(api, capsys):
    api.fault("POST /fine_tuning/jobs", "403", code="training_not_available")
    assert fine_tune.main([]) == 2
    err = capsys.readouterr().err
    assert "self-serve fine-tuning" in err and ".env.example" in err
    assert api.files == {}, "the upload is of no use any more"
    assert fine_tune.main([]) == 0, "another server, or better times"
    assert len(api.jobs) == 1


def test_training_not_available_keeps_a_file_that_a_job_uses(api):
    assert fine_tune.main([]) == 0
    api.fault("POST /fine_tuning/jobs", "403", code="training_not_available")
    assert fine_tune.main(["--n-epochs", "2"]) == 2
    assert len(api.files) == 1


@pytest.mark.parametrize(
    ("match", "kind", "how", "words", "code"),
    [
        ("POST /files", "401", {}, "OPENAI_API_KEY", 2),
        ("POST /files", "413", {}, "larger than this server accepts", 2),
        ("POST /fine_tuning/jobs", "403", {"code": "other"}, "may not do that", 2),
        ("POST /fine_tuning/jobs", "429", {"code": "credit_balance_exhausted"}, "waiting does not help", 4),
        ("POST /fine_tuning/jobs", "429", {"retry_after": 3600}, "wait a little", 4),
        ("POST /fine_tuning/jobs", "400", {"message": "n_epochs must be below 51"}, "n_epochs must be below 51", 2),
    ],
)
def test_sentences(api, no_sleep, capsys, match, kind, how, words, code):
    api.echo_key = True
    api.fault(match, kind, **how)
    assert fine_tune.main([]) == code
    captured = capsys.readouterr()
    assert words in captured.err.splitlines()[-1]
    assert api.key not in captured.err + everything_written(Path("."))
    assert record()["unanswered"] == {}, "a refused request leaves no doubt"


def test_rate_limits_are_waited_for_as_told(api, no_sleep, capsys):
    api.fault("POST /fine_tuning/jobs", "429", retry_after=37)
    assert fine_tune.main([]) == 0
    assert 37 in no_sleep
    assert "waiting 37 s" in capsys.readouterr().err


def test_unknown_model(api, capsys):
    assert fine_tune.main(["--model", "nope"]) == 2
    err = capsys.readouterr().err
    assert "no such model" in err and "`nope` does not exist" in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["missing.jsonl"], "Cannot read missing.jsonl"),
        (["--extra", "[1]"], "--extra"),
        (["--n-epochs", "x"], "--n-epochs"),
        (["--n-epochs", "0"], "--n-epochs"),
        (["--batch-size", "-1"], "--batch-size"),
        (["--learning-rate-multiplier", "nan"], "--learning-rate-multiplier"),
        (["--learning-rate-multiplier", "inf"], "--learning-rate-multiplier"),
        (["--learning-rate-multiplier", "0"], "--learning-rate-multiplier"),
        (["--max-cost", "nan"], "--max-cost"),
        (["--extra", '{"lora_alpha": NaN}'], "--extra"),
        (["--extra", '{"lora_alpha": 1e999}'], "--extra"),
        (["--extra", '{"metadata": null}'], "--extra"),
        (["--extra", '{"model": "gpt-4.1-2025-04-14"}'], "options of their own"),
        (["--extra", '{"method": {"supervised": {"hyperparameters": {"n_epochs": 50}}}}'], "options of their own"),
        (["--extra", '{"name": "\\ud800"}'], "--extra"),
        (["--suffix", "\udcff"], "--suffix"),
        (["\udcff.jsonl"], "training_file"),
    ],
)
def test_usage(api, capsys, argv, words):
    try:
        code = fine_tune.main(argv)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert words in capsys.readouterr().err
    assert api.calls("POST *") == 0


def test_no_server_named(api, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "")
    monkeypatch.setenv("OPENAI_BASE_URL", "")
    monkeypatch.setattr("dotenv.load_dotenv", lambda: False)
    assert fine_tune.main([]) == 2
    assert ".env.example" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("OPENAI_API_KEY", "sk-abc\u2013def", "typographic dash"),
        ("OPENAI_API_KEY", "sk-abc\ndef", "typographic dash"),
        ("OPENAI_BASE_URL", "http://[::1", "no address such as http"),
        ("OPENAI_BASE_URL", "127.0.0.1:8321/v1", "no address such as http"),
        ("OPENAI_BASE_URL", "localhost:8321/v1", "no address such as http"),
        ("OPENAI_BASE_URL", "sk-test-3f9a1c77d0e24b58", "no address such as http"),
        ("OPENAI_BASE_URL", "https://user:password@host/v1", "no address such as http"),
        ("OPENAI_BASE_URL", "http://a..b/v1", "no address such as http"),
        ("SSL_CERT_FILE", "/nope.pem", "a value that cannot be used"),
        ("ALL_PROXY", "nope://user:password@host", "a value that cannot be used (ValueError)"),
        ("HTTP_PROXY", "proxy:3128x", "a value that cannot be used (InvalidURL)"),
    ],
)
def test_settings_of_no_use(api, monkeypatch, capsys, name, value, words):
    monkeypatch.setenv(name, value)
    assert fine_tune.main([]) == 2
    err = capsys.readouterr().err
    assert words in err and name.replace("ALL", "*").replace("HTTP_", "*_") in err and len(err.splitlines()) == 1
    assert value not in err.replace("http://127.0.0.1:8321/v1", "") and "password" not in err, (
        "it may be a secret in the wrong variable"
    )


@pytest.mark.parametrize("module", ["openai", "dotenv"])
def test_an_environment_that_is_not_activated(api, monkeypatch, capsys, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert fine_tune.main([]) == 2
    err = capsys.readouterr().err
    assert f"{module} is missing" in err and "python -m pip install -r requirements.txt" in err


def test_an_address_without_v1(api, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_BASE_URL", api.base_url.removesuffix("/v1") + "/api")
    assert fine_tune.main([]) == 2
    assert "ends in /v1" in capsys.readouterr().err
    monkeypatch.setenv("OPENAI_BASE_URL", api.base_url)
    api.fault("POST /files", "404")
    assert fine_tune.main([]) == 2
    assert "/v1 on most" not in capsys.readouterr().err


def test_a_key_that_is_no_secret_corrupts_no_sentence(api, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "local")
    api.check_key = False
    api.fault("POST /files", "400", message="ft:tiny:local::1 is no file")
    assert fine_tune.main([]) == 2
    assert "ft:tiny:local::1" in capsys.readouterr().err


def test_a_record_that_is_a_folder(api, capsys):
    Path("fine_tune_job.json").mkdir()
    assert fine_tune.main([]) == 2
    assert "fine_tune_job.json is not readable" in capsys.readouterr().err
    assert api.calls("POST *") == 0


def test_a_record_that_is_no_json(api, capsys):
    Path("fine_tune_job.json").write_text("{", encoding="utf-8")
    assert fine_tune.main([]) == 2
    assert "fine_tune_job.json" in capsys.readouterr().err
    assert api.calls("POST *") == 0


@pytest.mark.parametrize("keys", [["job_id"], ["token"], ["job_id", "token"], ["seed"]])
def test_records_of_another_hand_are_kept_and_not_used(api, keys):
    foreign = [{key: f"{key}-{number}" for key in keys} for number in range(2)]
    for number, fields in enumerate(foreign):
        Path("fine_tune_job.json").write_text(json.dumps(fields))
        assert fine_tune.main(["--seed", str(number)]) == 0
    assert all(fields in earlier_records() for fields in foreign)
    assert len(api.jobs) == 2


def test_a_folder_that_cannot_be_written(api, monkeypatch, capsys):
    def refuse(*paths):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    assert fine_tune.main([]) == 2
    assert "Cannot write fine_tune_job.json" in capsys.readouterr().err
    assert api.calls("POST *") == 0


def test_an_old_record_that_cannot_be_moved_away(api, capsys):
    assert fine_tune.main([]) == 0
    first = record()
    Path("fine_tune_jobs").write_text("a file where a folder should be")
    assert fine_tune.main(["--seed", "1"]) == 2
    assert "Cannot write fine_tune_job.json" in capsys.readouterr().err
    assert record() == first and len(api.jobs) == 1


def test_the_key_at_debug_logging(api):
    done = run_script([], OPENAI_LOG="debug", OPENAI_API_KEY=api.key + "\n")
    assert done.returncode == 0, done.stderr
    assert "HTTP" in done.stderr, "debug logging is on"
    assert api.key not in done.stdout + done.stderr + everything_written(Path("."))


def test_plain_http_to_another_machine_is_warned_of(api, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://example.invalid/v1")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert fine_tune.main([]) == 4
    assert capsys.readouterr().err.count("plain http") == 1


def test_help_imports_nothing_heavy():
    assert importlib.util.find_spec("openai")
    code = "import sys, fine_tune; sys.exit(any(name in sys.modules for name in ('openai', 'tiktoken')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent).returncode == 0
