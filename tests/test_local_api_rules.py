"""The strict judge: each kind of fault, what a job says of it, and `python -m local_api --check FILE`."""

from __future__ import annotations

import ast
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from corpus import ANSWER, FAULTY, GOOD, SECRETS, TOOLS, call, calls, chat, line, said

from conftest import ROOT
from local_api import rules, train
from local_api.rules import judge
from local_api.validation import JobFailed, check, judge_file, validate

PACKAGE = sorted((ROOT / "local_api").glob("*.py"))


def write(path: Path, rows) -> Path:
    text = "".join(line(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


def kinds(row, tmp_path: Path) -> list[str]:
    return [problem.kind for problem in judge_file(write(tmp_path / "row.jsonl", [GOOD[0], row]))[1]]


# --- the rules ---


@pytest.mark.parametrize(
    ("kind", "row", "part"),
    [pytest.param(kind, *case, id=f"{kind}-{n}") for kind, cases in FAULTY.items() for n, case in enumerate(cases)],
)
def test_a_fault_is_named_by_line_kind_and_sentence(kind, row, part, tmp_path):
    examples, problems = judge_file(write(tmp_path / "rows.jsonl", [GOOD[0], row, *GOOD]))
    assert [(problem.line, problem.kind) for problem in problems] == [(2, kind)], problems
    assert part in problems[0].message and not problems[0].message.endswith(".")
    assert examples == 1 + len(GOOD) + (kind in rules.WARNINGS)


def test_every_kind_is_provoked():
    in_table = {kind for table in rules.RULES.values() for kind, _, _ in table}
    source = "".join(
        (ROOT / "local_api" / name).read_text("utf-8") for name in ("rows.py", "rules.py", "validation.py")
    )
    elsewhere = set(re.findall(r'(?:Fault|Problem)\((?:None, |line, \*Fault\()?"([a-z-]+)"', source))
    of_the_file = {"broken-file", "few-examples", "too-few-examples"}
    assert elsewhere > of_the_file and set(FAULTY) | of_the_file == in_table | elsewhere
    assert in_table | elsewhere > rules.WARNINGS


@pytest.mark.parametrize("row", GOOD, ids=range(len(GOOD)))
def test_a_good_row_passes(row):
    assert list(judge(row)) == []


def test_all_faults_of_a_row_are_told_not_the_first(tmp_path):
    bad = chat(said("", "user", weight=1), said("<|im_end|>", x=1), y=2)
    assert sorted(kinds(bad, tmp_path)) == [
        "control-token", "empty-question", "invalid-weight", "short-answer", "unknown-key", "unknown-key",
    ]  # fmt: skip


def test_a_legacy_row_is_told_what_to_write_and_nothing_that_misleads(tmp_path):
    call = {"role": "assistant", "function_call": {"name": "look_up", "arguments": "{}"}}
    row = chat("Q?", call, said("7", "function", name="look_up"), said(ANSWER), functions=[TOOLS[0]["function"]])
    sentences = [problem.message for problem in judge_file(write(tmp_path / "row.jsonl", [row]))[1]]
    assert len(sentences) == 3 and all("is the old form; write " in sentence for sentence in sentences)
    assert "`tools`" in sentences[0] and "`tool_calls`" in sentences[1] and "'tool'" in sentences[2]


def test_no_secret_is_shown(tmp_path, capsys):
    rows = [{"messages": [{"role": text}]} for text in SECRETS] + [chat("Q?", ANSWER, **{t: 1}) for t in SECRETS]
    for text in SECRETS:
        key = json.dumps(text)
        rows.append(f"{{{key}: 1, {key}: 2}}")
    check(write(tmp_path / "rows.jsonl", rows))
    shown = capsys.readouterr().out
    assert shown.count("[secret]") >= 3 * len(SECRETS)
    for text in SECRETS:
        assert text[8:26].splitlines()[0] not in shown


def test_whatever_stands_in_a_row_is_judged_in_sentences():
    odd = [None, True, 0, 1.5, "", "text", [], [[]], {}, {"type": "function"}, {"type": "text", "text": 1}]
    keys = ["role", "content", "name", "weight", "tool_calls", "tool_call_id", "function_call", "refusal", "id", "type"]
    chance = random.Random(3)

    def anything(depth: int = 0):
        shape = chance.random()
        if depth > 3 or shape < 0.3:
            return chance.choice([*odd, "user", "assistant", "tool", "function", call(), calls(call()), *TOOLS])
        if shape < 0.6:
            return [anything(depth + 1) for _ in range(chance.randrange(4))]
        return {chance.choice(keys): anything(depth + 1) for _ in range(chance.randrange(5))}

    for _ in range(3000):
        messages = [{"role": chance.choice(rules.ROLES), "content": anything(), "tool_calls": anything()}, anything()]
        faults = list(judge({"messages": messages, "tools": anything(), "x": anything()}))
        assert all(isinstance(fault.kind, str) and " {} " not in fault.message for fault in faults)


# --- a file ---


@pytest.mark.parametrize("content, line, part", [
    (b"", 1, "the file is empty"), (b"\n \r\n", 1, "the file is empty"), (b"\xef\xbb\xbf", 1, "the file is empty"),
    (b"\n[\n" + line(GOOD[0]).encode() + b"]", 2, "this is an array"),
    (line(GOOD[0]).encode() + b"\n{\"a\": \"\xe9\"}\n{", 2, "byte 0xe9 is not UTF-8"),
    (line(GOOD[0]).encode("utf-16"), 1, "is not UTF-8"),
])  # fmt: skip
def test_a_file_that_is_broken_is_told_once(content, line, part, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    ((at, kind, message),) = judge_file(path)[1]
    assert (at, kind) == (line, "broken-file") and part in message


def test_lines_are_those_of_an_editor(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\r\n" + line(GOOD[0]).encode() + b"\r\n\r\n{}\r\n")
    assert [(problem.line, problem.kind) for problem in judge_file(path)[1]] == [(4, "missing-messages")]


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_what_a_job_says_of_its_files(param, tmp_path):
    def refused(rows) -> dict:
        with pytest.raises(JobFailed) as failure:
            validate(write(tmp_path / "rows.jsonl", rows), param)
        return failure.value.error

    good = [chat(f"Question {number}?", ANSWER) for number in range(12)]
    validate(write(tmp_path / "rows.jsonl", good), param)
    error = refused([*good, {"messages": []}, chat("Q?", ANSWER, metadata=1)])
    sentence = (
        "Invalid file format. Line 13: `messages` is missing or empty; write a question and its answer (and 1 more)"
    )
    assert error == {"code": f"invalid_{param}", "message": sentence, "param": param}
    assert "Line 1: the file is empty" in refused([])["message"]
    if param == "training_file":
        few = "Training file has 9 example(s), but must have at least 10 examples"
        assert refused(good[:9]) == {"code": "invalid_n_examples", "message": few, "param": param}
    else:
        validate(write(tmp_path / "rows.jsonl", good[:1]), param)


# --- the command ---


def test_check_prints_each_problem_and_a_summary(tmp_path, capsys):
    good = [chat(f"Question {number}?", ANSWER) for number in range(50)]
    path = write(tmp_path / "rows.jsonl", good)
    assert check(path) == 0
    (summary,) = capsys.readouterr().out.splitlines()
    assert summary.startswith(f"{path}: valid examples 50, errors 0, warnings 0. It can be uploaded;")
    assert check(write(path, [*good[:11], chat("Q?", "Short.")])) == 0
    short, few, summary = capsys.readouterr().out.splitlines()
    assert short == f"{path}:12: warning: short-answer: message 2: fewer than 50 characters; the model will be as brief"
    assert few == f"{path}: warning: few-examples: 12 examples; with fewer than 50 little is learnt"
    assert "examples 12, errors 0, warnings 2. It can" in summary
    assert check(write(path, [*good[:9], {}])) == 1
    bad, few, summary = capsys.readouterr().out.splitlines()
    assert bad.startswith(f"{path}:10: error: missing-messages: ") and ": error: too-few-examples: 9 valid" in few
    assert summary.endswith("errors 2, warnings 0. This file cannot be trained on as it is.")


@pytest.mark.parametrize("option", [["--check", "rows.jsonl"], ["--check=rows.jsonl"]])
def test_the_command_needs_no_package(option, tmp_path):
    write(tmp_path / "rows.jsonl", [*(chat(f"Question {number}?", ANSWER) for number in range(12)), {}])
    # -S: without site-packages, so that any other import than the standard library's fails.
    command = [sys.executable, "-S", "-m", "local_api", *option]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines()[0].startswith("rows.jsonl:13: error: missing-messages: ")


def test_a_file_that_is_not_there_is_said_in_a_sentence(tmp_path):
    command = [sys.executable, "-m", "local_api", "--check", str(tmp_path / "none.jsonl")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "none.jsonl: No such file or directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_package_stands_alone():
    scripts = {path.stem for path in [*ROOT.glob("*.py"), *(ROOT / "extras").glob("*.py")]} - {"conftest"}
    for path in PACKAGE:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            assert not scripts & {name.split(".")[0] for name in names}, path


def test_auto_epochs():
    assert [train.auto_epochs(n) for n in (1, 10, 20, 33, 34, 100, 204, 8333, 9000, 100_000)] == [
        25, 10, 5, 3, 3, 3, 3, 3, 2, 1,
    ]  # fmt: skip
