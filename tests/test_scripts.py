"""What holds for all five scripts: they stand alone, start fast, agree in what they share, and keep secrets."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

SCRIPTS = ("prepare_training_data", "fine_tune", "check_fine_tune_status", "use_fine_tuned_model", "test_model")
CLIENTS = SCRIPTS[1:]  # those that talk to a server
PACKAGES = {"openai", "tiktoken", "dotenv"}


def source(script: str) -> str:
    return (ROOT / f"{script}.py").read_text("utf-8")


def shared_part(script: str) -> str:
    """Return the part that stands in all four clients, as code: comments and layout do not count."""
    text = source(script)
    start, end = text.index("# --- identical in the four scripts"), text.index("# --- end of the identical part ---")
    return ast.dump(ast.parse(text[start:end]))


def test_what_four_scripts_share_is_the_same_in_all_four():
    assert len({shared_part(script) for script in CLIENTS}) == 1


def test_the_error_class_of_step_1_is_that_of_the_others():
    def step_error(script: str) -> str:
        classes = [node for node in ast.parse(source(script)).body if isinstance(node, ast.ClassDef)]
        return ast.dump(next(node for node in classes if node.name == "StepError"))

    assert step_error("prepare_training_data") == step_error("fine_tune")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_needs_the_three_packages_and_nothing_more(script):
    imported = set()
    for node in ast.walk(ast.parse(source(script))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) - {"__future__"} <= PACKAGES | set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_fast_says_how_to_use_it_and_imports_no_package(script):
    code = (
        f"import sys, {script} as s\n"
        "try: s.main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        f"assert not {PACKAGES!r} & set(sys.modules), sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"python {script}.py" in source(script).split('"""')[1], "the docstring shows how to call it"
    assert done.stdout.startswith("usage: ")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_copy_of_a_script_alone_in_a_folder_starts(script, tmp_path):
    (tmp_path / f"{script}.py").write_text(source(script), encoding="utf-8")
    done = subprocess.run([sys.executable, f"{script}.py", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_flag_is_a_usage_error(script):
    done = subprocess.run([sys.executable, f"{script}.py", "--no-such"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.parametrize("script", CLIENTS)
def test_without_key_and_server_both_ways_out_are_named(script, tmp_path):
    (tmp_path / "training_data.jsonl").write_bytes((ROOT / "training_data.jsonl").read_bytes())
    arguments = {"fine_tune": [], "check_fine_tune_status": ["ftjob-1"], "use_fine_tuned_model": ["ft:a", "Hello?"]}
    done = subprocess.run(
        [sys.executable, str(ROOT / f"{script}.py"), *arguments.get(script, ["ft:a", "--base-model", "a"])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 2, done.stderr
    assert ".env.example" in done.stderr and "OPENAI_API_KEY" in done.stderr and "Traceback" not in done.stderr


def test_requirements_name_what_the_scripts_import():
    named = {
        re.split(r"[<>=]", line)[0]
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line[:1].isalpha()
    }
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
