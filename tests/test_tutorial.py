"""The tutorial as a reader runs it: README's commands, in order, as processes, against the real local API."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from conftest import CACHE, ROOT, LocalAPI

sys.path.insert(0, str(ROOT / "examples"))
import run_tutorial

README = (ROOT / "README.md").read_text("utf-8")
LAB = README[README.index("## The lab") : README.index("## Your own dataset")]
OWN_DATASET = README[README.index("## Your own dataset") : README.index("## Where it runs")]


def commands_in(text: str) -> list[str]:
    """Return the commands of the bash blocks, without those that are marked as not run."""
    text = re.sub(r"<!-- not run by the tests: .+? -->\n```bash\n.+?\n```", "", text, flags=re.DOTALL)
    return [line for block in re.findall(r"```bash\n(.+?)\n```", text, re.DOTALL) for line in block.splitlines()]


def shown_after(command: str) -> list[str]:
    """Return the lines of output that README shows below a command, masked; [...] stands for what is left out."""
    found = re.search(rf"```bash\n{re.escape(command)}\n```\n+```text\n(.+?)\n```", LAB, re.DOTALL)
    return [masked(line) for line in found[1].splitlines() if line.strip("[.] ")] if found else []


def masked(text: str) -> str:
    """Return output without what differs from run to run or from model to model: ids, times, figures, folders."""
    text = text.replace("smollm2-135m-instruct", "tiny")
    text = re.sub(r"ft:tiny:[\w:.-]+", "MODEL", re.sub(r"(ftjob|file)-\w+", r"\1-ID", text))
    text = re.sub(r"\S*/examples/", "examples/", text)  # the tests call the scripts from another folder
    text = re.sub(r"[✓✗] (not )?met", "MET", re.sub(r"[▁▂▃▄▅▆▇█]+", "CURVE", text))
    text = re.sub(r"\d[\d,.:]*", "N", text).replace("N epochs", "N epoch").replace("N min)", "N s)")
    return re.sub(r"  +", "  ", text).strip()


def is_the_models(line: str, command: str) -> bool:
    """Tell whether a shown line depends on how well the model learns, and so has no counterpart in the tiny one's."""
    if "use_fine_tuned_model.py" in command:
        return not line.startswith(("Model:", "System prompt:", "Next:"))
    return "test_model.py" in command and bool(
        re.match(r"Verdict|Broken|Fixed|Unchanged|[a-z-]+-N |does not|cut at", line)
    )


def run_step(command: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    _, script, *arguments = shlex.split(command)
    command_line = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(command_line, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8")


def test_make_tutorial_runs_the_commands_of_the_readme():
    commands = iter(commands_in(LAB))
    assert all(step in commands for step in run_tutorial.STEPS), (
        "a step of make tutorial is not in the lab, or not there"
    )


def follow(commands: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Run README's commands as a reader does, in a folder with its examples, and compare what they print."""
    shutil.copytree(ROOT / "examples", folder / "examples")
    for command in commands:
        # One epoch is enough here: the tiny model is to show the way, not to learn.
        done = run_step(command + " --n-epochs 1" * ("fine_tune.py" in command.split()), folder, environment)
        assert done.returncode == 0, (command, done.stdout + done.stderr)
        printed = [masked(line) for line in (done.stderr + done.stdout).splitlines()]
        missing = [line for line in shown_after(command) if line not in printed and not is_the_models(line, command)]
        assert missing == [], (command, printed)


@pytest.mark.timeout(600)
def test_the_lab_s_commands_in_order_do_what_the_readme_shows(tiny_api, tmp_path):
    follow(commands_in(LAB), tmp_path, {**tiny_api.environment("smollm2-135m-instruct"), "PYTHONUTF8": "1"})
    assert (tmp_path / "training_data.jsonl").read_bytes() == (ROOT / "training_data.jsonl").read_bytes()
    for name in ("test_results.json", "round_2_results.json"):
        results = json.loads((tmp_path / name).read_text("utf-8"))
        assert results["summary"] and len(results["results"]) >= 30
        assert {"question", "expected", "generated", "base_generated"} <= results["results"][0].keys()


@pytest.mark.slow  # the same five steps, with other data
@pytest.mark.timeout(600)
def test_the_commands_for_an_own_dataset_work(tiny_api, tmp_path):
    follow(commands_in(OWN_DATASET), tmp_path, {**tiny_api.environment("smollm2-135m-instruct"), "PYTHONUTF8": "1"})
    assert json.loads((tmp_path / "bicycles_results.json").read_text("utf-8"))["summary"]["cases"] == 8


def test_the_tutorial_leads_to_no_other_server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-mine")
    monkeypatch.setenv("https_proxy", "http://proxy.example")
    environment = run_tutorial.own_environment("http://127.0.0.1:1/v1")
    assert environment["OPENAI_API_KEY"] == "local" and environment["OPENAI_BASE_URL"] == "http://127.0.0.1:1/v1"
    assert "OPENAI_ORG_ID" not in environment and "https_proxy" not in environment
    assert environment["PYTHON_DOTENV_DISABLED"] == "1"


def start_tutorial(folder: Path) -> subprocess.Popen[str]:
    """Start the runner as `make tutorial` does, but in a folder of the test's own."""
    code = (
        "import run_tutorial as r, pathlib\n"
        f"r.WORK = pathlib.Path({str(folder)!r}); r.DATA = r.WORK / 'local_api'\n"
        "raise SystemExit(r.main())"
    )
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT / "examples", stdout=pipe, stderr=pipe, text=True)


def processes_of(folder: Path) -> list[list[str]]:
    """Return the command lines of servers and trainers that work in the folder."""
    commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [command for command in commands if "-m" in command and any(str(folder) in part for part in command[3:])]


# Each moment and each signal once, by the way of the next test; each with each in make test-all.
INTERRUPTIONS = [("no output yet", "SIGHUP"), ("Local API started", "SIGTERM")]
INTERRUPTIONS += [
    pytest.param(moment, fault, marks=[pytest.mark.slow, pytest.mark.exhaustive])
    for moment in ("no output yet", "Local API started", "Status: ")
    for fault in ("SIGINT", "SIGTERM", "SIGHUP")
    if (moment, fault) not in (*INTERRUPTIONS, ("Status: ", "SIGINT"))
]


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
@pytest.mark.parametrize(("moment", "fault"), INTERRUPTIONS)
def test_interrupted_the_tutorial_leaves_no_process_behind(moment, fault, base_model, tmp_path):
    process = start_tutorial(tmp_path)
    assert process.stdout is not None
    if moment == "no output yet":
        deadline = time.monotonic() + 20
        while not processes_of(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.01)
    else:
        assert any(line.startswith(moment) for line in process.stdout)
    process.send_signal(getattr(signal, fault))
    _, stderr = process.communicate(timeout=40)
    assert process.returncode == 130 and "Traceback" not in stderr, stderr
    assert processes_of(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
def test_the_next_run_does_not_train_what_an_interrupted_one_left(base_model, tmp_path):
    for seen in ("Status: ", "Cancelled ftjob-"):
        process = start_tutorial(tmp_path)
        assert process.stdout is not None
        assert any(line.startswith(seen) for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=40)
        assert process.returncode == 130 and "Traceback" not in stderr, stderr
        assert processes_of(tmp_path) == []


def test_the_real_base_model_answers_and_is_fine_tuned(base_model, tmp_path):
    """SmolLM2 itself, for a few steps: the one test that shows the weights are real and arrive whole."""
    from openai import OpenAI

    server = LocalAPI(tmp_path / "data", "smollm2-135m-instruct")
    try:
        client = OpenAI(api_key="local", base_url=server.base_url)

        def answer(model: str, question: str) -> str:
            messages = [{"role": "user", "content": question}]
            reply = client.chat.completions.create(model=model, messages=messages, max_tokens=40, temperature=0)
            return reply.choices[0].message.content

        assert "Paris" in answer("smollm2-135m-instruct", "What is the capital of France?")
        rows = sorted((ROOT / "training_data.jsonl").read_bytes().splitlines(keepends=True), key=len)[:10]
        file = client.files.create(file=("training_data.jsonl", b"".join(rows)), purpose="fine-tune")
        hyperparameters = {"n_epochs": 2, "batch_size": 2}
        job = client.fine_tuning.jobs.create(
            model="smollm2-135m-instruct",
            training_file=file.id,
            method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        )
        deadline = time.monotonic() + 200
        while job.status not in ("succeeded", "failed") and time.monotonic() < deadline:
            time.sleep(0.5)
            job = client.fine_tuning.jobs.retrieve(job.id)
        assert job.status == "succeeded", job
        events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
        losses = [event.data["train_loss"] for event in reversed(events) if event.type == "metrics"]
        assert len(losses) == 10 and sum(losses[5:]) < 0.9 * sum(losses[:5]), "the second epoch has the same rows"
        assert job.fine_tuned_model.startswith("ft:smollm2-135m-instruct:local::")
        assert answer(job.fine_tuned_model, "How do I change my photo?")
    finally:
        server.stop()
    assert (CACHE / "base_models" / "smollm2-135m-instruct").is_dir()
