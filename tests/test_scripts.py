"""What holds for all five scripts: they can be read, stand alone, agree in what they share, and keep secrets."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from fake_api import FakeAPI

from conftest import ROOT

BUDGETS = {  # lines, docstrings and comments included
    "prepare_training_data": 400,  # it gets people's data in, whatever its form
    "fine_tune": 280,
    "check_fine_tune_status": 280,
    "use_fine_tuned_model": 200,
    "test_model": 380,
    "extras/report_page": 170,
    "extras/judge_answers": 140,
    "extras/plot_loss": 110,
    "extras/clean_up": 100,
    "extras/find_leaks": 80,
    "extras/find_dirt": 100,
}
SCRIPTS = tuple(BUDGETS)[:5]
CLIENTS = SCRIPTS[1:]  # those that talk to a server
PACKAGES = {"openai", "tiktoken", "dotenv"}
BLOCKS = (ast.For, ast.While, ast.If, ast.With, ast.Try)


def source(script: str) -> str:
    return (ROOT / f"{script}.py").read_text("utf-8")


def shared_block(script: str) -> str:
    found = re.search(r"# --- The same in the four scripts .+?---\n(.+?)\n+# --- End", source(script), re.DOTALL)
    assert found, "the block's marks"
    return found[1]


def depth(node: ast.AST, level: int = 0) -> int:
    """Return how deep blocks are nested in a function."""
    return max([level, *(depth(child, level + isinstance(child, BLOCKS)) for child in ast.iter_child_nodes(node))])


def in_a_process(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a copy of the script in a folder, whose modules come before all others."""
    (folder / f"{script}.py").write_text(source(script), encoding="utf-8")
    command, environment = [sys.executable, f"{script}.py"], {**os.environ, "PYTHONUTF8": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8")


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """Run a copy of a page that stands alone in a folder, in this process, which has imported its packages already."""

    def run(script: str, *arguments: str, folder: Path = tmp_path) -> int | str:
        """Return the exit code, or the sentence with which it ends."""
        copy = folder / Path(f"{script}.py").name
        copy.write_text(source(script), encoding="utf-8")
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [copy.name, *arguments])
        try:
            runpy.run_path(copy.name, run_name="__main__")
        except SystemExit as end:
            return end.code or 0
        return 0

    return run


# A page can be read


@pytest.mark.parametrize("script", BUDGETS)
def test_a_page_keeps_its_budget(script):
    text = source(script)
    lines = text.splitlines()
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    assert len(lines) <= BUDGETS[script]
    assert [line for line in lines if len(line) > 100] == []
    assert [f.name for f in functions if f.end_lineno - f.lineno >= 60] == []
    assert [f.name for f in functions if depth(f) > 4] == []
    assert len(re.findall(r"\badd(?:_argument)?\(\n? *\"", text)) <= 9, "arguments of the command line"


@pytest.mark.parametrize("script", BUDGETS)
def test_a_page_says_what_it_is_and_how_it_is_called(script):
    docstring = ast.get_docstring(ast.parse(source(script))) or ""
    assert f"python {script}.py" in docstring
    if script in SCRIPTS:
        assert re.match(r"Step \d: ", docstring)
        assert all(re.search(rf"^{word} +\S", docstring, re.MULTILINE) for word in ("Needs", "Leaves", "Omits"))


def test_the_shared_block_is_the_same_in_all_four_and_short():
    assert len({shared_block(script) for script in CLIENTS}) == 1
    assert len(shared_block(CLIENTS[0]).splitlines()) <= 30


# It stands alone


@pytest.mark.parametrize("script", BUDGETS)
def test_a_page_needs_the_three_packages_and_no_other_script(script):
    imported = set()
    for node in ast.walk(ast.parse(source(script))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported - set(sys.stdlib_module_names) - {"__future__"} <= PACKAGES


def test_the_local_api_imports_no_script():
    imports = rf"^\s*(from|import) ({'|'.join(SCRIPTS)}|extras)\b"
    for path in (ROOT / "local_api").glob("*.py"):
        assert not re.search(imports, path.read_text("utf-8"), re.MULTILINE), path


def test_each_script_alone_in_a_folder_does_its_step(alone, monkeypatch, capsys, tmp_path):
    """Each in a folder of its own, with the state files of the step before and nothing else."""
    folders = {script: tmp_path / script for script in SCRIPTS}
    for folder in folders.values():
        folder.mkdir()

    def step(script: str, *arguments: str, files: tuple[Path, ...] = ()) -> str:
        for file in files:
            (folders[script] / file.name).write_bytes(file.read_bytes())
        assert alone(script, *arguments, folder=folders[script]) == 0
        return "".join(capsys.readouterr())

    prepared, ordered = folders["prepare_training_data"], folders["fine_tune"]
    rows = [f"What is {n} and {n}?,It is {2 * n} if you add them both up.\n" for n in range(12)]
    (prepared / "faq.csv").write_text("question,answer\n" + "".join(rows))
    step("prepare_training_data", "faq.csv", "--system", "You add.")
    files = (prepared / "training_data.jsonl", prepared / "training_data.report.json")
    with FakeAPI() as api:
        for name, value in api.env().items():
            monkeypatch.setenv(name, value)
        step("fine_tune", "--n-epochs", "1", files=files)
        record = ordered / "fine_tune_job.json"
        assert json.loads(record.read_text("utf-8"))["system_prompt"] == "You add."
        model = api.finish(next(iter(api.jobs)))["fine_tuned_model"]
        assert "succeeded" in step("check_fine_tune_status", "--wait", files=(record,))
        record = folders["check_fine_tune_status"] / record.name
        assert model in step("use_fine_tuned_model", "What is 3 and 3?", files=(record,))
        cases = folders["test_model"] / "cases.json"
        cases.write_text('{"cases": [{"id": "a", "question": "What is 2 and 2?", "checks": {"contains": ["4"]}}]}')
        step("test_model", "--cases", "cases.json", files=(record,))
        assert json.loads((folders["test_model"] / "test_results.json").read_text("utf-8"))["summary"]["model"] == model
        assert {request.body["messages"][0]["content"] for request in api.requests if "chat" in request.path} == {
            "You add."
        }


# The command line


@pytest.mark.parametrize("script", BUDGETS)
def test_help_and_unknown_flags(script, alone, capsys):
    assert alone(script, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: {script.split('/')[-1]}.py ")
    assert alone(script, "--no-such") == 2


@pytest.mark.parametrize("script", CLIENTS)
def test_without_key_and_server_both_ways_out_are_named(script, alone, tmp_path):
    (tmp_path / "training_data.jsonl").write_bytes((ROOT / "training_data.jsonl").read_bytes())
    arguments = {"fine_tune": [], "check_fine_tune_status": ["ftjob-1"], "use_fine_tuned_model": ["ft:a", "Hello?"]}
    sentence = alone(script, *arguments.get(script, ["ft:a", "--base-model", "a"]))
    assert isinstance(sentence, str) and ".env.example" in sentence and "OPENAI_API_KEY" in sentence


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_missing_package_is_named_with_its_cure(script, tmp_path):
    for package in PACKAGES:
        (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError(name={package!r})")
    done = in_a_process(script, tmp_path)
    assert done.returncode == 1 and "pip install -r requirements.txt" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("module", ["argparse", "dotenv"])  # the first import, and the last
def test_ctrl_c_during_the_imports_is_no_traceback(script, module, tmp_path):
    (tmp_path / f"{module}.py").write_text("raise KeyboardInterrupt")
    done = in_a_process(script, tmp_path)
    assert done.returncode == 130 and done.stderr == ""


# The project


def test_requirements_name_what_the_scripts_import():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    named = {re.split(r"[<>=]", line)[0] for line in lines if line[:1].isalpha()}
    assert named == {"openai", "tiktoken", "python-dotenv"}


def test_no_secret_and_no_machine_stands_in_the_project():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = tracked.stdout.split() or [str(path.relative_to(ROOT)) for path in ROOT.glob("*.py")]
    here = Path.home().as_posix()
    for name in names:
        path = ROOT / name
        if path.is_file() and path.suffix in {".py", ".md", ".txt", ".json", ".jsonl", ".toml", ".example", ""}:
            text = path.read_text("utf-8")
            assert here + "/" not in text or here == "/", name
            assert not re.search(r"sk-[A-Za-z0-9]{40,}", text), name
    assert ".env" in (ROOT / ".gitignore").read_text().split()
