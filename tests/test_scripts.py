"""What holds for all five scripts: they can be read, stand alone, agree in what they share, and keep secrets."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

BUDGETS = {  # lines, docstrings and comments included
    "prepare_training_data": 480,  # it gets people's data in, whatever its form
    "fine_tune": 280,
    "check_fine_tune_status": 280,
    "use_fine_tuned_model": 200,
    "test_model": 380,
    "extras/report_page": 170,
    "extras/judge_answers": 140,
    "extras/plot_loss": 110,
    "extras/clean_up": 100,
    "extras/find_leaks": 80,
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


def alone(script: str, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a copy of the script that stands alone in a folder."""
    (folder / f"{script}.py").write_text(source(script), encoding="utf-8")
    return subprocess.run(
        [sys.executable, f"{script}.py", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONUTF8": "1", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


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


def test_each_script_alone_in_a_folder_does_its_step(tiny_api, tmp_path):
    """Each in a folder of its own, with the state files of the step before and nothing else."""
    environment = tiny_api.environment("tiny")
    folders = {script: tmp_path / script for script in SCRIPTS}
    for folder in folders.values():
        folder.mkdir()

    def step(script: str, *arguments: str, files: tuple[Path, ...] = ()) -> str:
        for file in files:
            (folders[script] / file.name).write_bytes(file.read_bytes())
        done = alone(script, folders[script], *arguments, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    prepared, ordered = folders["prepare_training_data"], folders["fine_tune"]
    rows = [f"What is {n} and {n}?,It is {2 * n} if you add them both up.\n" for n in range(12)]
    (prepared / "faq.csv").write_text("question,answer\n" + "".join(rows))
    step("prepare_training_data", "faq.csv", "--system", "You add.")
    files = (prepared / "training_data.jsonl", prepared / "training_data.report.json")
    step("fine_tune", "--n-epochs", "1", files=files)
    record = ordered / "fine_tune_job.json"
    assert json.loads(record.read_text("utf-8"))["system_prompt"] == "You add."
    assert "succeeded" in step("check_fine_tune_status", "--wait", files=(record,))
    record = folders["check_fine_tune_status"] / record.name
    step("use_fine_tuned_model", "What is 3 and 3?", files=(record,))
    cases = folders["test_model"] / "cases.json"
    cases.write_text('{"cases": [{"id": "a", "question": "What is 2 and 2?", "checks": {"contains": ["4"]}}]}')
    step("test_model", "--cases", "cases.json", files=(record,))
    assert json.loads((folders["test_model"] / "test_results.json").read_text("utf-8"))["results"]


# The command line


@pytest.mark.parametrize("script", BUDGETS)
def test_help_and_unknown_flags(script):
    command = [sys.executable, f"{script}.py"]
    done = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr
    done = subprocess.run([*command, "--no-such"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.parametrize("script", CLIENTS)
def test_without_key_and_server_both_ways_out_are_named(script, tmp_path):
    (tmp_path / "training_data.jsonl").write_bytes((ROOT / "training_data.jsonl").read_bytes())
    arguments = {"fine_tune": [], "check_fine_tune_status": ["ftjob-1"], "use_fine_tuned_model": ["ft:a", "Hello?"]}
    done = alone(script, tmp_path, *arguments.get(script, ["ft:a", "--base-model", "a"]))
    assert done.returncode == 1, done.stderr
    assert ".env.example" in done.stderr and "OPENAI_API_KEY" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_missing_package_is_named_with_its_cure(script, tmp_path):
    for package in PACKAGES:
        (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError(name={package!r})")
    done = alone(script, tmp_path)
    assert done.returncode == 1 and "pip install -r requirements.txt" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("script", CLIENTS)
@pytest.mark.parametrize("module", ["argparse", "openai"])  # the first import, and the longest
def test_ctrl_c_during_the_imports_is_no_traceback(script, module, tmp_path):
    (tmp_path / f"{module}.py").write_text("raise KeyboardInterrupt")
    done = alone(script, tmp_path)
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
