"""Step 1: what it reads, every fault that it finds, what it writes and what it tells."""
# ruff: noqa: E501 (a case a line: tables of cases are read down, not across)

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prepare_training_data as step_1

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "prepare_training_data.py"
ANSWER = "This answer is long enough that nobody would call it a short one, number "


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FINE_TUNE_MODEL", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def qa(number: int | str, **more) -> dict:
    return {"question": f"Question {number}?", "answer": ANSWER + str(number), **more}


def chat(*turns: str | dict, **more) -> dict:
    """An example of user and assistant messages in turn; a dict stands for itself."""
    roles = ("user", "assistant")
    messages = [t if isinstance(t, dict) else {"role": roles[n % 2], "content": t} for n, t in enumerate(turns)]
    return {"messages": messages, **more}


def jsonl(path: str, records) -> str:
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    Path(path).write_text("".join(line + "\n" for line in lines), encoding="utf-8", errors="surrogatepass")
    return path


def run(capsys, *argv: str) -> tuple[int, str, str]:
    try:
        code = step_1.main(list(argv))
    except SystemExit as usage:  # argparse
        code = usage.code
    out, err = capsys.readouterr()
    return code, out, err


def written(path: str = "training_data.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


def report_of(capsys, *argv: str) -> dict:
    return json.loads(run(capsys, *argv, "--json")[1])


# --- the tutorial's step ---


def test_without_arguments_it_makes_the_tutorials_training_file(capsys):
    code, out, err = run(capsys)
    records = json.loads((ROOT / "examples/techflow_support/qa_pairs.json").read_text(encoding="utf-8"))
    assert (code, len(written())) == (0, len(records)), err
    assert all(row["messages"][0] == {"role": "system", "content": step_1.SYSTEM_PROMPT} for row in written())
    assert all(set(row) == {"messages"} for row in written())
    assert out.splitlines()[-1] == "Next: python fine_tune.py"
    assert re.search(rf"^Records +{len(records)}: {len(records)} valid, 0 invalid$", out, re.MULTILINE)
    assert "test_cases.json (compared" in out


def test_the_repository_holds_what_it_makes(capsys):
    run(capsys)
    assert Path("training_data.jsonl").read_bytes() == (ROOT / "training_data.jsonl").read_bytes()


def test_help_needs_neither_tiktoken_nor_the_sdk():
    code = (
        "import sys, prepare_training_data\n"
        "try: prepare_training_data.main(['--help'])\n"
        "except SystemExit: print({'tiktoken', 'openai', 'dotenv', 'requests'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("set()\n"), done.stdout + done.stderr


# --- inputs ---


def test_every_format_of_the_same_records_gives_the_same_file(capsys):
    records = [qa(n, id=n, category="a") for n in range(20)] + [qa('with "quotes", commas\nand a new line, 日本語 🎉')]
    table = io.StringIO()
    writer = csv.DictWriter(table, ["question", "answer", "id", "category"])
    writer.writeheader()
    writer.writerows(records)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    inputs = {
        "array.json": json.dumps(records).encode(),
        "pretty.json": b"\xef\xbb\xbf" + json.dumps(records, indent=4, ensure_ascii=False).encode(),
        "lines.jsonl": lines.encode(),
        "crlf.jsonl": b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode() + b"\r\n\r\n",
        "table.csv": table.getvalue().encode(),
        "bom.csv": b"\xef\xbb\xbf" + table.getvalue().encode(),
        "other_names.json": lines.replace('"question"', '"prompt"').replace('"answer"', '"completion"').encode(),
    }
    for name, data in inputs.items():
        Path(name).write_bytes(data)
        code, _, err = run(capsys, name, "-o", name + ".out", "--system", "")
        assert code == 0, (name, err)
        assert written(name + ".out") == [chat(r["question"], r["answer"]) for r in records], name
        output = Path(name + ".out").read_bytes()
        assert not output.startswith(b"\xef\xbb\xbf") and b"\r" not in output and b"\n\n" not in output
        assert "日本語 🎉".encode() in output


def test_several_files_are_one_dataset_in_the_order_given(capsys):
    jsonl("b.jsonl", [qa(n) for n in range(6)])
    Path("a.json").write_text(json.dumps([qa(n) for n in range(3, 12)]))
    code, out, err = run(capsys, "b.jsonl", "a.json")
    assert code == 0
    assert [row["messages"][1]["content"] for row in written()] == [f"Question {n}?" for n in range(12)]
    assert "a.json:1: warning: duplicate: the same as b.jsonl:4; left out" in err
    assert re.search(r"^Left out +3 exact duplicates$", out, re.MULTILINE)


def test_the_system_prompt_stands_in_front_only_where_none_is(capsys):
    own, developer = {"role": "system", "content": "Own."}, {"role": "developer", "content": "Old."}
    records = [qa(n) for n in range(10)] + [chat(own, *chat("Hi?", ANSWER)["messages"])]
    records += [chat(developer, *chat("Hello?", ANSWER)["messages"])]
    run(capsys, jsonl("in.jsonl", records), "--system", "Given.")
    first = [row["messages"][0] for row in written()]
    assert first == [{"role": "system", "content": "Given."}] * 10 + [own, {"role": "system", "content": "Old."}]
    run(capsys, jsonl("in.jsonl", records[:10]), "--system", "")
    assert {row["messages"][0]["role"] for row in written()} == {"user"}


def test_lines_are_those_where_records_begin(capsys):
    good = json.dumps([qa(n) for n in range(12)], indent=2)[1:-2]
    Path("a.json").write_text('[\n\n  {"question": "a"},' + good + ',\n {"answer":\n "b"}, 7]')
    Path("b.csv").write_text(
        "question,answer\nWhy?,\n" + 'A?,"two\nlines, which is a long answer, and so no warning here"\n\nB?,""\n'
    )
    err = run(capsys, "a.json", "b.csv")[2]
    lines = Path("a.json").read_text().splitlines()
    b = next(n for n, line in enumerate(lines, 1) if '{"answer"' in line)
    found = re.findall(r"^(\S+): error: (\S+):", err, re.MULTILINE)
    assert found == [
        ("a.json:3", "unknown-shape"), (f"a.json:{b}", "unknown-shape"), (f"a.json:{b + 1}", "not-an-object"),
        ("b.csv:2", "empty-answer"), ("b.csv:6", "empty-answer"),
    ]  # fmt: skip


def test_other_columns_are_ignored_and_that_is_said_once(capsys):
    out = run(capsys, jsonl("in.jsonl", [qa(n, id=n, category="a", source="web", tags=[1]) for n in range(12)]))[1]
    assert re.search(r"^Ignored columns +'source', 'tags'$", out, re.MULTILINE)
    assert set(written()[0]) == {"messages"}
    rows = [*(qa(n, prompt="Half of another shape.") for n in range(6)), *map(qa, range(6, 12))]
    assert report_of(capsys, jsonl("in.jsonl", rows))["ignored_columns"] == ["prompt"]


# --- every kind of fault ---

TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": '{"q": 1}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}


def with_calls(call: dict) -> dict:
    return chat("Q?", {"role": "assistant", "tool_calls": [call]}, tools=TOOLS)


def faulty() -> dict[str, list[tuple]]:
    """For each kind: records that have it, and a part of the sentence that each brings."""
    assistant = {"role": "assistant", "content": ANSWER}
    return {
        "invalid-json": [
            ('{"question": "a", "answer": }', "Expecting value at column 29"),
            ('{"question": "a"} {"x": 1}', "More text after the object"),
            ("[" * 100_000 + "]" * 100_000, "too deeply"),
            (json.dumps(chat("Q?", ANSWER, tools=[float("inf")])), "not finite"),
            (json.dumps(chat("Q?", ANSWER, id=1, tools=[])).replace("[]", "[1e999]"), "not finite"),
            ('{"question": "a", "answer": ' + "1" * 5000 + "}", "") if sys.version_info >= (3, 11) else ("{", ""),
        ],
        "duplicate-key": [('{"question": "a", "question": "b", "answer": "c"}', "'question' stands twice"),
                          ('{"messages": [{"role": "user", "role": "user", "content": "a"}]}', "'role'")],
        "not-an-object": [("7", "must be an object"), ('"text"', "must be an object"), ("[1]", "must be an object")],
        "unknown-shape": [({}, "no keys"), ({"Question": "a", "Answer": "b"}, "'Answer', 'Question'"), ({"question": "a"}, "")],
        "ambiguous-shape": [(qa(1, prompt="a", completion="b"), "question and answer as well as prompt and completion"),
                            (qa(1, messages=[]), "messages as well as question and answer")],
        "missing-messages": [({"messages": []}, "missing or empty"), ({"messages": "Hi"}, ""), ({"messages": None}, "")],
        "unknown-key": [(chat("Q?", ANSWER, metadata={}), "'metadata' beside"), (chat("Q?", ANSWER, functions=[]), "'functions'"),
                        (chat("Q?", assistant | {"function_call": {}}), "message 2: the API rejects 'function_call' here"),
                        (chat("Q?", assistant | {"refusal": None}), "'refusal'")],
        "no-user-message": [(chat(assistant), "no user message")],
        "no-assistant-message": [(chat("Q?"), "nothing to learn")],
        "nothing-trained": [(chat("Q?", assistant | {"weight": 0}), "every answer has weight 0")],
        "last-not-assistant": [(chat("Q?", ANSWER, "Thanks!"), "teaches nothing")],
        "invalid-tools": [(chat("Q?", ANSWER, tools={}), "`tools` must be a list"), (chat("Q?", ANSWER, tools=[{}]), ""),
                          (chat("Q?", ANSWER, tools=TOOLS, parallel_tool_calls="yes"), "true or false")],
        "unknown-function": [(with_calls(CALL | {"function": {"name": "other", "arguments": "{}"}}), "'other' is called"),
                             (chat("Q?", CALLING), "'look_up'")],
        "orphan-tool-result": [(chat("Q?", CALLING, {"role": "tool", "tool_call_id": "c2", "content": "1"}, tools=TOOLS), "'c2'"),
                               (chat("Q?", {"role": "tool", "content": "1"}, {"role": "assistant", "content": ANSWER}), "'None'"),
                               (chat("Q?", {"role": "tool", "tool_call_id": "c1", "content": "1"}, CALLING, tools=TOOLS), "'c1'")],
        "invalid-message": [(chat("Q?", ANSWER) | {"messages": ["Hi", assistant]}, "message 1: a message must be an object")],
        "missing-role": [(chat({"content": "Q?"}, ANSWER), "message 1: `role` is missing")],
        "unknown-role": [(chat({"role": "bot", "content": "Q?"}, ANSWER), "'bot' is unknown"),
                         (chat({"role": [1], "content": "Q?"}, ANSWER), "")],
        "missing-content": [(chat({"role": "user"}, ANSWER), "message 1: `content` is missing"), (qa(1) | {"answer": None}, "")],
        "invalid-content": [(qa(1) | {"answer": 7}, "must be text"), (chat([], ANSWER), ""),
                            (chat("Q?", {"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}), ""),
                            (chat([{"type": "input_audio"}], ANSWER), ""), (chat([{"type": "image_url"}], ANSWER), ""),
                            (chat([{"type": "image_url", "image_url": None}], ANSWER), ""),
                            (chat("Q?", CALLING, {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "1"}]},
                                  tools=TOOLS), "must be text")],
        "empty-question": [(qa(1) | {"question": " \n"}, "user's message is empty")],
        "empty-answer": [(qa(1) | {"answer": ""}, "empty-answer: message 2: the answer is empty"), (qa(1) | {"answer": " \t"}, "")],
        "short-answer": [(qa("x") | {"answer": "Yes."}, "fewer than 50 characters")],
        "invalid-name": [(chat({"role": "user", "content": "Q?", "name": 1}, ANSWER), "`name` must be a text")],
        "invalid-weight": [(chat("Q?", assistant | {"weight": weight}), "must be 0") for weight in (0.5, 2, -1, True, None, "1", 1.0)]
        + [(chat({"role": "user", "content": "Q?", "weight": 0}, ANSWER), "only an answer")],
        "invalid-tool-call": [(with_calls({"id": "c1"}), "each call needs an id"), (with_calls(CALL | {"id": 1}), ""),
                              (chat("Q?", assistant | {"tool_calls": []}, tools=TOOLS), ""),
                              (chat("Q?", assistant | {"tool_calls": "calls"}, tools=TOOLS), ""),
                              (chat("Q?", assistant | {"tool_calls": None}, tools=TOOLS), "")],
        "invalid-arguments": [(with_calls(CALL | {"function": {"name": "look_up", "arguments": arguments}}), "must be JSON")
                              for arguments in ("{", {"q": 1}, None, {}, [1], 5, True)],
        "control-token": [(qa(1) | {"answer": ANSWER + token}, f"holds '{token}'")
                          for token in ("<|endoftext|>", "<|fim_suffix|>", "<|im_start|>", "<|endofprompt|>")],
        "lone-surrogate": [('{"question": "a\\ud83d", "answer": "' + ANSWER + '"}', "half of a character")],
        "blank-run": [(qa(1) | {"answer": ANSWER + blank * 1_000_001 + end}, "100,000 blanks")
                      for blank, end in ((" ", ""), (" ", "x"), ("\t", "x"), ("\n", ""), ("\u00a0", "x"))],
        "too-many-tokens": [(qa(1) | {"answer": "word " * 70_000}, "reads the first 65,536")],
        "secret": [(qa(1) | {"answer": f"{ANSWER} key: {text} end"}, f"holds {name}") for name, text in SECRETS]
        + [(chat([{"type": "image_url", "image_url": {"url": f"https://x/a.png?c={SECRETS[3][1]}%2F"}}], ANSWER), "an AWS")],
    }  # fmt: skip


LETTERS = (
    "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", k=100)) + "9"
)
SECRETS = [
    ("an API key", "sk-" + LETTERS[:48]), ("an API key", "sk-proj-" + LETTERS[:30] + "_-" + LETTERS[30:60]),
    ("an API key", "sk-ant-api03-" + LETTERS[:60]), ("an AWS access key", "AKIA" + "QWERTYUIOP123456"),
    ("a GitHub token", "ghp_" + LETTERS[:36]), ("a GitHub token", "github_pat_" + LETTERS[:22] + "_" + LETTERS[:59]),
    ("a GitLab token", "glpat-" + LETTERS[:20]), ("a Google API key", "AIza" + LETTERS[:35]),
    ("a Hugging Face token", "hf_" + LETTERS[:34]), ("a Slack token", "xoxb-123456789012-" + LETTERS[:24]),
    ("a Stripe key", "sk_live_" + LETTERS[:24]), ("a Stripe key", "rk_test_" + LETTERS[:24]),
    ("an npm token", "npm_" + LETTERS[:36]), ("a PyPI token", "pypi-" + LETTERS[:80]),
    ("a JSON Web Token", f"eyJ{LETTERS[:20]}.eyJ{LETTERS[:40]}.{LETTERS[:43]}"),
    ("a private key", "-----BEGIN OPENSSH PRIVATE KEY-----\n" + LETTERS), ("a private key", "-----BEGIN PRIVATE KEY-----"),
    ("a private key", "-----BEGIN PGP PRIVATE KEY BLOCK-----"),
]  # fmt: skip
# Found otherwise than by one row of JSON Lines; each has a test of its own below.
ELSEWHERE = {
    "broken-file", "invalid-csv", "duplicate", "conflicting-answer", "differing-system", "held-out", "validation-overlap",
    "few-examples", "too-few-examples", "file-too-large",
}  # fmt: skip


def test_every_kind_is_provoked_here_and_documented():
    documented = re.findall(
        r"^#### `([a-z-]+)`", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    source = SCRIPT.read_text(encoding="utf-8")
    named = re.findall(r'(?:[fF]ault\(|^ {8}\(|: \[\()"([a-z-]+)", ', source, re.MULTILINE)
    assert set(faulty()) | ELSEWHERE == set(named)
    assert set(documented) == set(named)
    assert len(documented) == len(set(documented)) and set(documented) >= step_1.WARNINGS | step_1.BLOCKING


@pytest.mark.parametrize(
    ("kind", "record", "part"),
    [pytest.param(kind, *case, id=f"{kind}-{n}") for kind, cases in faulty().items() for n, case in enumerate(cases)],
)
def test_a_fault_is_found_named_and_left_out(capsys, kind, record, part):
    code, out, err = run(capsys, jsonl("in.jsonl", [qa("first"), record, *map(qa, range(60))]))
    level = "warning" if kind in step_1.WARNINGS else "error"
    lines = [line for line in err.splitlines() if line.startswith(f"in.jsonl:2: {level}: {kind}: ")]
    assert len(lines) == 1 and part in lines[0], err
    assert code == 0 and len(written()) == 61 + (level == "warning")
    assert ("errors 0" in out) == (level == "warning")
    assert not [line for line in err.splitlines() if not line.startswith("in.jsonl:2: ")], err
    assert run(capsys, "--check")[0] == 0  # what was written can be uploaded
    if level == "error":
        before = Path("training_data.jsonl").read_bytes()
        code, out, _ = run(capsys, "in.jsonl", "--strict", "-o", "strict.jsonl")
        assert code == 1 and "Nothing was written" in out and not Path("strict.jsonl").exists()
        assert Path("training_data.jsonl").read_bytes() == before


def test_all_faults_of_a_row_are_told_not_the_first(capsys):
    bad = chat(
        {"role": "user", "content": "", "weight": 1}, {"role": "assistant", "content": "<|im_end|>", "x": 1}, y=2
    )
    err = run(capsys, jsonl("in.jsonl", [bad, *map(qa, range(60))]))[2]
    kinds = set(re.findall(r"^in.jsonl:1: error: (\S+):", err, re.MULTILINE))
    assert kinds == {"empty-question", "invalid-weight", "control-token", "unknown-key"}
    assert "'x' here" in err and "'y' beside" in err


def test_the_report_never_shows_a_secret(capsys):
    rows = [qa(1) | {"answer": text} for _, text in SECRETS] + [{"messages": [{"role": text}]} for _, text in SECRETS]
    rows += [{text: 1} for _, text in SECRETS] + ['{"' + text.replace("\n", "") + '": 1' for _, text in SECRETS]
    rows += [
        chat("Q?", ANSWER, tools=[{"type": "function", "function": {"name": "f", "description": t}}])
        for _, t in SECRETS
    ]
    columns = {text: 1 for _, text in SECRETS}
    jsonl("in.jsonl", [*rows, qa(60, **columns), *map(qa, range(60))])
    assert report_of(capsys, "in.jsonl")["ignored_columns"] == ["[secret]"]
    for argv in (["in.jsonl"], ["in.jsonl", "--json"], ["in.jsonl", "--check"]):
        _code, out, err = run(capsys, *argv)
        for _, text in SECRETS:
            assert text[8:26].splitlines()[0] not in out + err
    assert len(written()) == 61


def test_what_looks_like_a_secret_but_is_none_passes(capsys):
    harmless = [
        "task-oriented-and-very-long-word",
        "disk-a1b2c3d4e5f6a7b8c9d0e1f2",
        "sk-learn-is-a-nice-library-to-use",
        "AKIA",
        "SHA_KIA",
    ]
    rows = [qa(n) | {"answer": f"{ANSWER} {text}"} for n, text in enumerate(harmless)]
    assert "secret" not in run(capsys, jsonl("in.jsonl", [*rows, *map(qa, range(60))]))[2]


def test_valid_rows_of_every_shape_pass(capsys):
    picture = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    rows = [
        chat("Q?", CALLING, {"role": "tool", "tool_call_id": "c1", "content": ""}, {"role": "assistant", "content": ANSWER}, tools=TOOLS),
        chat("Call it.", {"role": "assistant", "tool_calls": [CALL]}, tools=TOOLS, parallel_tool_calls=False),
        chat([{"type": "text", "text": "What is this?"}, picture], ANSWER),
        chat([picture], ANSWER + "2"),
        chat({"role": "user", "content": "Q?", "name": "Ann"}, ANSWER, "And?", ANSWER),
        chat("Q2?", {"role": "assistant", "content": ANSWER, "weight": 0}, "Again?", {"role": "assistant", "content": ANSWER, "weight": 1}),
        chat("Q3?", {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}),
        chat("Unlike <|this|>, < | and <| |>", ANSWER),
    ]  # fmt: skip
    code, _, err = run(capsys, jsonl("in.jsonl", [*rows, *map(qa, range(60))]))
    assert code == 0 and "error" not in err and len(written()) == 68
    assert written()[0]["tools"] == TOOLS and written()[1]["parallel_tool_calls"] is False
    assert run(capsys, "--check")[0] == 0


# --- faults between rows, and of the file ---


def test_duplicates_conflicts_and_differing_system_messages(capsys):
    rows = [qa(n) for n in range(60)]
    rows += [
        qa(3),
        {"question": "ＱUESTION  4?", "answer": ANSWER.upper() + " 4"},
        qa(5) | {"answer": ANSWER + "other"},
    ]
    rows += [
        chat(
            {"role": "system", "content": "Other."},
            {"role": "user", "content": "Question 6?"},
            {"role": "assistant", "content": ANSWER},
        )
    ]
    code, _, err = run(capsys, jsonl("in.jsonl", [*rows, qa(5) | {"answer": ANSWER + "other"}, rows[-1]]))
    assert err.splitlines() == [
        "in.jsonl:61: warning: duplicate: the same as in.jsonl:4; left out",
        "in.jsonl:62: warning: duplicate: the same as in.jsonl:5 but for case, white space or Unicode form; keep one",
        "in.jsonl:63: warning: conflicting-answer: the prompt of in.jsonl:6 with another answer; keep the better one",
        "in.jsonl:64: warning: differing-system: another system message than in.jsonl:1; this is told once",
        "in.jsonl:65: warning: duplicate: the same as in.jsonl:63; left out",
        "in.jsonl:66: warning: duplicate: the same as in.jsonl:64; left out",
    ]
    assert code == 0 and len(written()) == 63


def test_check_counts_duplicates_and_keeps_them(capsys):
    code, out, err = run(capsys, "--check", jsonl("in.jsonl", [chat("Q?", ANSWER)] * 12))
    assert code == 0 and re.search(r"^Examples +12$", out, re.MULTILINE) and err.count("; delete one") == 11


def test_a_multi_turn_prompt_is_all_that_comes_before_the_last_answer(capsys):
    rows = [chat("Hi", ANSWER, f"Question {n}?", ANSWER) for n in range(30)] + [
        chat("Hi", ANSWER, "Question 1?", ANSWER + "b")
    ]
    err = run(capsys, jsonl("in.jsonl", rows))[2]
    assert (
        err.count("conflicting-answer") == 1
        and "in.jsonl:31: warning: conflicting-answer: the prompt of in.jsonl:2 " in err
    )


def test_held_out_cases_in_the_training_data_are_named(capsys):
    cases = [{"id": "a-1", "question": "question 7 ?"}, {"id": "a-2", "question": "Not there?"},
             {"id": "a-3", "question": "And then?", "history": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
             {"id": "a-4", "question": "And then?", "history": [{"role": "user", "content": "Other"}]}]  # fmt: skip
    rows = [qa(n) for n in range(60)] + [
        chat("Hi", "Hello", "And then?", ANSWER),
        chat("Question 7?", ANSWER, "So?", ANSWER),
    ]
    jsonl("in.jsonl", rows)
    Path("test_cases.json").write_text(json.dumps({"system": "", "cases": cases}))  # beside the input: found unasked
    Path("plain.json").write_text(json.dumps(cases))
    jsonl("lines.jsonl", cases)
    for argv, name in (
        ([], "test_cases.json"),
        (["--held-out", "plain.json"], "plain.json"),
        (["--held-out", "lines.jsonl"], "lines.jsonl"),
    ):
        err = run(capsys, "in.jsonl", *argv)[2]
        held_out = re.findall(r"^in.jsonl:(\d+): warning: held-out: test case (\S+) of (\S+);", err, re.MULTILINE)
        assert held_out == [("8", "a-1", name), ("61", "a-3", name), ("62", "a-1", name)]
    for bad in ("[1]", '[{"answer": "x"}]', '{"answer": "x"}', "{", "7", "[" * 100_000):
        Path("bad.json").write_text(bad)
        code, _, err = run(capsys, "in.jsonl", "--held-out", "bad.json")
        assert code == 2 and "bad.json" in err and "Traceback" not in err
        Path("test_cases.json").write_text(bad)  # nobody named this one
        code, out, err = run(capsys, "in.jsonl")
        assert code == 0 and err.startswith("warning: test_cases.json does not hold") and err.count("test_cases") == 1
        assert "compared" not in out


def test_a_case_that_is_the_beginning_of_a_longer_conversation_is_held_out(capsys):
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    case = {"id": "a", "question": "And\u2028then?", "history": history}
    talk = chat("Hi", "Hello", "And\u2028then?", ANSWER, "So?", ANSWER)
    jsonl("in.jsonl", [*map(qa, range(60)), talk, chat("Hi", "Hey", "And\u2028then?", ANSWER)])
    for cases in ([case], [case, {"question": "Not there?"}]):
        err = run(capsys, "in.jsonl", "--held-out", jsonl("cases.jsonl", cases))[2]
        assert re.findall(r"^in.jsonl:(.+held-out: .+);", err, re.MULTILINE) == [
            "61: warning: held-out: test case a of cases.jsonl"
        ]


def test_validation_rows_that_stand_in_training(capsys):
    jsonl("train.jsonl", [chat(f"Question {n}?", ANSWER) for n in range(60)])
    told = chat({"role": "system", "content": "S"}, {"role": "user", "content": "QUESTION 9?"}, ANSWER + "b")
    told["messages"][2]["role"] = "assistant"
    jsonl("val.jsonl", [chat("New?", ANSWER), told, chat("x", "")])
    code, out, err = run(capsys, "--check", "train.jsonl", "--validation-output", "val.jsonl")
    assert "val.jsonl:2: warning: validation-overlap: the same prompt as train.jsonl:10 in training" in err
    assert "val.jsonl:3: error: empty-answer" in err and code == 1
    assert re.search(r"^Examples +60$", out, re.MULTILINE) and "for validation 2 others" in out


@pytest.mark.parametrize(
    ("valid", "kind", "code"),
    [(9, "too-few-examples", 1), (10, "few-examples", 0), (49, "few-examples", 0), (50, None, 0)],
)
def test_too_few_examples(capsys, valid, kind, code):
    found, _, err = run(capsys, jsonl("in.jsonl", [chat("", "")] + [qa(n) for n in range(valid)]))
    assert found == code and Path("training_data.jsonl").exists() == (code == 0)
    assert (f"training_data.jsonl: {'error' if code else 'warning'}: {kind}: {valid} " in err) == bool(kind)


def test_a_file_that_is_too_large_says_the_way_out(capsys, monkeypatch):
    monkeypatch.setattr(step_1, "MAX_FILE_BYTES", 10_000)
    code, _, err = run(capsys, jsonl("in.jsonl", map(qa, range(60))))
    assert code == 1 and "training_data.jsonl: error: file-too-large: " in err and "upload_file_chunked" in err
    assert not Path("training_data.jsonl").exists()
    assert run(capsys, "--check", jsonl("in.jsonl", [chat("Q?", ANSWER * 200)] * 10))[0] == 1


@pytest.mark.parametrize(
    ("text", "line"),
    [("{rows}", 61), ("{rows},]", 61), ("{rows}] x", 61), ('{rows},\n{"question": "a" "b"}]', 62), ("{rows},\n\n}", 63),
     ("{rows},\n" + "[" * 100_000, 62), ('{rows},\n"open', 62), ("{rows}\n{{}}]", 62)],
)  # fmt: skip
def test_a_json_array_that_breaks_off_writes_nothing(capsys, text, line):
    rows = "[" + ",\n".join(json.dumps(qa(n)) for n in range(61))
    Path("in.json").write_text(text.replace("{rows}", rows).replace("{{}}", "{}"))
    code, out, err = run(capsys, "in.json")
    assert code == 1 and f"in.json:{line}: error: broken-file: " in err, err
    assert not Path("training_data.jsonl").exists() and "Nothing was written" in out


@pytest.mark.parametrize("name", ["in.jsonl", "in.json", "in.csv"])
@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf", b" \n\n", b"\n" * 300_000])
def test_an_empty_file_is_called_empty(capsys, name, data):
    Path(name).write_bytes(data)
    for argv in ([name], ["--check", name]):
        code, _, err = run(capsys, *argv)
        assert code == 1 and f"{name}: error: broken-file: the file is empty; see whether it was saved" in err
    jsonl("good.jsonl", map(qa, range(60)))
    assert run(capsys, "good.jsonl", name)[0] == 1 and not Path("training_data.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "start", "end"),
    [("in.jsonl", "", ""), ("in.json", "[", "0]"), ("in.csv", "question,answer\n", "Why?,")],
)
def test_many_blank_lines_before_the_first_record(capsys, name, start, end):
    rows = [f"Question {n}?,{ANSWER}{n}\n".replace(", number", "") for n in range(12)]
    if name != "in.csv":
        rows = [json.dumps(qa(n)) + ",\n" * (name == "in.json") + "\n" * (name == "in.jsonl") for n in range(12)]
    Path(name).write_text("\ufeff" + "\n" * 300_000 + start + "".join(rows) + (end or "{}"), encoding="utf-8")
    line = 300_000 + start.count("\n") + 12 + 1
    assert re.match(rf"{name}:{line}: error: ", run(capsys, name)[2]) and len(written()) == 12


def test_faults_of_csv(capsys):
    rows = "".join(f'"Question {n}?","{ANSWER}{n}"\n' for n in range(60))
    Path("a.csv").write_text('question,answer\na,b,c\nd\n"e"f,g\n' + rows + '"open, and so on\n')
    err = run(capsys, "a.csv")[2]
    assert re.findall(r"^a.csv:(\d+): error: (\S+):", err, re.MULTILINE) == [
        (str(n), "invalid-csv") for n in (2, 3, 4, 65)
    ]
    assert "3 fields where the header has 2" in err and len(written()) == 60
    for header in ("question,answer,answer", "Frage;Antwort", "question\tanswer"):
        Path("b.csv").write_text(header + "\na,b,c\n" + rows)
        code, _, err = run(capsys, "b.csv")
        assert code == 1 and "b.csv:1: error: broken-file: each column needs a name of its own, and commas" in err


def test_check_judges_as_the_upload_does(capsys):
    rows = (
        [chat(f"Q{n}?", ANSWER, id=1) for n in range(3)]
        + [qa(1)]
        + [chat({"role": "developer", "content": "x"}, ANSWER)]
    )
    jsonl("in.jsonl", rows)
    code, _, err = run(capsys, "--check", "in.jsonl")
    assert code == 1
    for part in ("1: error: unknown-key: the API rejects 'id'", "4: error: missing-messages",
                 "5: error: unknown-role: message 1: the role 'developer' is unknown"):  # fmt: skip
        assert f"in.jsonl:{part}" in err
    Path("array.json").write_text(json.dumps([qa(n) for n in range(20)]))
    code, _, err = run(capsys, "--check", "array.json")
    assert code == 1 and "array.json:1: error: broken-file: this is an array, the upload takes JSON Lines" in err
    assert sorted(path.name for path in Path().iterdir()) == ["array.json", "in.jsonl"]


# --- usage ---


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["missing.jsonl"], "missing.jsonl: No such file or directory."),
        (["--check"], "training_data.jsonl: No such file"),
        (["."], "Is a directory"),
        (["in.jsonl", "-o", "in.jsonl"], "in.jsonl is read or written already"),
        (["in.jsonl", "-o", "./link.jsonl"], "link.jsonl is read or written already"),
        (["in.jsonl", "--rejected", "training_data.jsonl"], "training_data.jsonl is read or written already"),
        (["in.jsonl", "--held-out", "cases.json", "-o", "cases.json"], "cases.json is read or written"),
        (["in.jsonl", "-o", "no/such/folder/x.jsonl"], "its folder is missing or read-only"),
        (["in.jsonl", "-o", "."], "is a folder"),
        (["in.jsonl", "-o", os.devnull], "is a folder, a device or a pipe; name a file."),
        (["in.jsonl", "--rejected", os.devnull], "is a folder, a device or a pipe; name a file."),
        (["in.jsonl", "--check", "-o", "x.jsonl"], "--check writes nothing"),
        (["in.jsonl", "--validation-output", "v.jsonl"], "--validation-output needs --validation-split"),
        (["in.jsonl", "--held-out", "missing.json"], "missing.json: No such file"),
        (["in.jsonl", "--validation-split", "1.5"], "1.5 is not between 0 and 1"),
        (["in.jsonl", "--validation-split", "nan"], "not between 0 and 1"),
        (["latin1.jsonl"], "latin1.jsonl:13: byte 0xe9 is not UTF-8"),
        (["utf16.jsonl"], "utf16.jsonl:1: byte 0xff is not UTF-8"),
        (["latin1.json"], "latin1.json:25: byte 0xe9 is not UTF-8"),
        (["latin1.csv"], "latin1.csv:2: byte 0xe9 is not UTF-8"),
    ],
)
def test_a_mistake_gets_one_sentence_and_exit_code_2(capsys, argv, part):
    jsonl("in.jsonl", map(qa, range(12)))
    Path("link.jsonl").symlink_to("in.jsonl")
    Path("cases.json").write_text("[]")
    Path("latin1.jsonl").write_bytes(Path("in.jsonl").read_bytes() + b'{"question": "Caf\xe9?", "answer": "x"}\n')
    Path("utf16.jsonl").write_bytes(Path("in.jsonl").read_text().encode("utf-16"))
    Path("latin1.json").write_bytes(
        b"[\n" + b",\n\n".join(json.dumps(qa(n)).encode() for n in range(12)) + b',\n"\xe9"]'
    )
    Path("latin1.csv").write_bytes(b"question,answer\nCaf\xe9?,x\n")
    code, _out, err = run(capsys, *argv)
    assert code == 2 and part in err and "Traceback" not in err, err
    if not any("usage" in line for line in err.splitlines()):
        assert len(err.splitlines()) == 1
    assert not [path for path in Path().iterdir() if path.name.startswith(("training", ".", "x"))]


def test_json_is_one_document(capsys):
    code, out, err = run(
        capsys, jsonl("in.jsonl", [*map(qa, range(60)), "{", qa(0)]), "--json", "--rejected", "no.jsonl"
    )
    document = json.loads(out)
    assert code == 0 and err == ""
    assert [(p["line"], p["level"], p["kind"]) for p in document["problems"]] == [
        (61, "error", "invalid-json"),
        (62, "warning", "duplicate"),
    ]
    assert document["records"] == 62 and document["invalid"] == 1 and document["duplicates"] == 1
    assert document["examples"] == 60 and document["epochs"] == 3
    assert document["billed_tokens"] == 3 * document["tokens"]
    assert document["written"] == {"training_data.jsonl": "written", "no.jsonl": "written"}


def test_rejected_rows_are_kept_with_their_origin_and_reasons(capsys):
    deep = '{"question": "a", "answer": "b", "x": ' + "[" * 900 + "]" * 900 + "}"
    bad = ['{"question": ', qa(1) | {"answer": ""}, {"a": "\udc80"}, deep, chat("Q?", ANSWER, tools=[[[]]])]
    jsonl("in.jsonl", [*map(qa, range(12))])
    with open("in.jsonl", "a") as file:
        file.write("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in bad))
    assert run(capsys, "in.jsonl", "--rejected", "no.jsonl")[0] == 0
    rejected = written("no.jsonl")
    assert [row["line"] for row in rejected if row["line"] != 16] == [13, 14, 15, 17]
    assert rejected[0]["record"] == '{"question":' and rejected[0]["errors"][0].startswith("invalid-json: ")
    assert rejected[1] == {"file": "in.jsonl", "line": 14, "record": bad[1],
                           "errors": ["empty-answer: message 2: the answer is empty; write one or delete the row"]}  # fmt: skip


# --- writing ---


def test_an_old_output_is_kept_and_an_equal_one_left_alone(capsys):
    Path("training_data.jsonl").write_text("edited by hand\n")
    os.chmod("training_data.jsonl", 0o640)
    jsonl("in.jsonl", map(qa, range(60)))
    out = run(capsys, "in.jsonl")[1]
    assert "training_data.jsonl: written; the one that stood there is kept as training_data.jsonl.bak\n" in out
    assert Path("training_data.jsonl.bak").read_text() == "edited by hand\n"
    assert Path("training_data.jsonl").stat().st_mode & 0o777 == 0o640
    before = Path("training_data.jsonl").stat()
    code, out, _ = run(capsys, "in.jsonl")
    after = Path("training_data.jsonl").stat()
    assert code == 0 and "training_data.jsonl: already up to date" in out
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    run(capsys, jsonl("in.jsonl", map(qa, range(61))))
    assert len(written("training_data.jsonl.bak1")) == 60 and len(written()) == 61
    assert sorted(path.name for path in Path().iterdir()) == [
        "in.jsonl", "training_data.jsonl", "training_data.jsonl.bak", "training_data.jsonl.bak1",
    ]  # fmt: skip


def test_an_output_that_is_a_link_stays_one(capsys):
    Path("real").mkdir()
    Path("real/data.jsonl").write_text("old")
    Path("training_data.jsonl").symlink_to("real/data.jsonl")
    run(capsys, jsonl("in.jsonl", map(qa, range(60))))
    assert Path("training_data.jsonl").is_symlink() and len(written("real/data.jsonl")) == 60


def test_a_file_system_without_links_gets_a_copy(capsys, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    Path("training_data.jsonl").write_text("old")
    run(capsys, jsonl("in.jsonl", map(qa, range(60))))
    assert Path("training_data.jsonl.bak").read_text() == "old" and len(written()) == 60


KILL_AT = """
import os, signal, sys
import prepare_training_data
left, events = int(sys.argv[1]), ("open", "os.rename", "os.link", "os.remove", "os.chmod", "shutil.copymode")
def hook(event, args):
    global left
    if event in events and os.getcwd() in os.path.realpath(str(args[0])):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
sys.exit(prepare_training_data.main(["in.jsonl", "--rejected", "no.jsonl"]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="pipe")
def test_a_pipe_is_read_and_not_written(capsys):
    os.mkfifo("pipe")
    code, _, err = run(capsys, jsonl("in.jsonl", map(qa, range(60))), "-o", "pipe")
    assert (code, err) == (2, "pipe is a folder, a device or a pipe; name a file.\n")
    threading.Thread(target=Path("pipe").write_bytes, args=[b'{"question": "Caf\xe9?", "answer": "x"}\n']).start()
    code, _, err = run(capsys, "pipe", "-o", "out.jsonl")
    assert (code, err) == (2, "pipe: byte 0xe9 is not UTF-8; save the file as UTF-8.\n")


@pytest.mark.skipif(sys.platform == "win32", reason="resource")
def test_a_disk_fault_is_told_and_leaves_nothing(capsys):
    import resource  # a limit on a file's size faults where a full disk does

    jsonl("in.jsonl", map(qa, range(60)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        code, _, err = run(capsys, "in.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, err) == (2, "Reading or writing failed: File too large.\n")
    assert [path.name for path in Path().iterdir()] == ["in.jsonl"]


def test_stderr_may_be_closed(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert step_1.main([jsonl("in.jsonl", map(qa, range(1000)))]) == 0


def test_an_address_that_is_none_gets_one_sentence(capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://[::1")
    code, _, err = run(capsys, jsonl("in.jsonl", map(qa, range(60))))
    assert (code, err) == (2, "OPENAI_BASE_URL is no address such as http://127.0.0.1:8321/v1.\n")


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_kill_at_any_step_leaves_the_old_file_or_the_new_one(capsys):
    jsonl("in.jsonl", ["{", *map(qa, range(60))])
    run(capsys, "in.jsonl", "-o", "new.jsonl")
    old, new = b'{"old": 1}\n', Path("new.jsonl").read_bytes()
    for step in range(40):
        for leftover in Path().glob("training_data.jsonl*"):
            leftover.unlink()
        Path("training_data.jsonl").write_bytes(old)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", KILL_AT, str(step)], env=environment, capture_output=True)
        found = Path("training_data.jsonl").read_bytes()
        assert found in (old, new)
        assert found == old or Path("training_data.jsonl.bak").read_bytes() == old
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert found == new and 6 <= step < 40


def test_interrupted_it_leaves_everything_as_it_was(capsys, monkeypatch):
    Path("training_data.jsonl").write_text("old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(step_1, "judged_whole", interrupt)
    code, _, err = run(capsys, jsonl("in.jsonl", map(qa, range(60))))
    assert code == 130 and "no file is half written" in err
    assert sorted(path.name for path in Path().iterdir()) == ["in.jsonl", "training_data.jsonl"]


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
def test_a_reader_that_goes_keeps_neither_the_files_nor_the_exit_code_away():
    jsonl("in.jsonl", [*map(qa, range(12)), *({"question": n, "answer": ANSWER} for n in range(3000))])
    for more, code in (("-o out.jsonl", 0), ("--strict -o none.jsonl", 1)):
        command = f"{{ '{sys.executable}' '{SCRIPT}' in.jsonl {more}; echo $? >code; }} 2>&1 | head -1"
        subprocess.run(command, shell=True, stdout=subprocess.DEVNULL, timeout=60)
        assert Path("code").read_text() == f"{code}\n"
    assert len(Path("out.jsonl").read_text().splitlines()) == 12


@pytest.mark.parametrize("value", ["[" * 100_000, "1" * 5_000])
def test_a_repeated_key_beside_what_cannot_be_read(capsys, value):
    jsonl("in.jsonl", [*map(qa, range(60)), '{"x": {"a": 1, "a": 1}, "y": ' + value + "}"])
    code, _, err = run(capsys, "in.jsonl", "--check")
    assert code == 1 and "in.jsonl:61: error: invalid-json: Nested too deeply" in err


def test_secrets_are_looked_for_in_linear_time():
    assert step_1.secrets_in("-sk-" * 250_000) == ""  # or it would not end before the test's time is up


def test_long_rows_are_judged_few_at_a_time(monkeypatch):
    sizes = []
    preparator = step_1.TrainingDataPreparator()
    judge_block = preparator.judge_block
    monkeypatch.setattr(
        preparator, "judge_block", lambda rows, check: sizes.append(len(rows)) or judge_block(rows, check)
    )
    preparator.prepare_data([qa(n, answer=f"{n} " + "word " * 20_000) for n in range(60)], check=True)
    assert max(sizes) <= 10 and sizes[-1] <= 4


def test_a_closed_pipe_is_no_fault():
    jsonl("in.jsonl", map(qa, range(60)))
    command = f"{sys.executable} {SCRIPT} in.jsonl --json | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout == "{" and "Traceback" not in done.stderr


def test_save_to_jsonl_writes_whole_or_not_at_all():
    assert step_1.save_to_jsonl([chat("é", "ü")], "out.jsonl") == "written"
    assert step_1.save_to_jsonl([chat("é", "ü")], "out.jsonl") == "already up to date"
    assert Path("out.jsonl").read_bytes() == json.dumps(chat("é", "ü"), ensure_ascii=False).encode() + b"\n"

    def breaks_off():
        yield chat("a", "b")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        step_1.save_to_jsonl(breaks_off(), "out.jsonl")
    assert written("out.jsonl") == [chat("é", "ü")] and len(list(Path().iterdir())) == 1


# --- the validation split ---


def split(capsys, numbers, fraction="0.3") -> tuple[set, set]:
    jsonl("in.jsonl", [qa(n) for n in numbers])
    assert run(capsys, "in.jsonl", "--validation-split", fraction)[0] == 0
    return tuple(
        {row["messages"][1]["content"] for row in written(name)}
        for name in ("training_data.jsonl", "validation_data.jsonl")
    )


def test_the_split_is_stable_and_disjoint(capsys):
    training, validation = split(capsys, range(200))
    assert not training & validation and len(training | validation) == 200 and 40 < len(validation) < 80
    more_training, more_validation = split(capsys, random.Random(2).sample(range(400), 400))
    assert training <= more_training and validation <= more_validation  # no old row has moved
    _, fewer = split(capsys, range(200), "0.1")
    assert fewer < validation  # a smaller share is a part of the larger one


def test_rows_with_the_same_prompt_stay_on_one_side(capsys):
    rows = [qa(n) | {"answer": f"{ANSWER}{n}{more}"} for n in range(60) for more in "ab"]
    rows += [{"question": f" QUESTION  {n}? ", "answer": ANSWER} for n in range(60)]
    run(capsys, jsonl("in.jsonl", rows), "--validation-split", "0.5")
    plain = [
        {r["messages"][1]["content"].lower().replace(" ", "") for r in written(f)}
        for f in ("training_data.jsonl", "validation_data.jsonl")
    ]
    assert not plain[0] & plain[1] and len(written()) + len(written("validation_data.jsonl")) == 180
    code, out, _ = run(capsys, "--check", "--validation-output", "validation_data.jsonl")
    assert code == 0 and "validation-overlap" not in out


def test_a_split_without_validation_rows_writes_nothing(capsys):
    code, _, err = run(capsys, jsonl("in.jsonl", map(qa, range(20))), "--validation-split", "0.0001")
    assert (
        code == 1
        and "no prompt falls into a validation split of 0.0001" in err
        and not Path("training_data.jsonl").exists()
    )


def test_the_next_command_names_the_files(capsys):
    jsonl("in.jsonl", map(qa, range(100)))
    out = run(capsys, "in.jsonl", "-o", "mine.jsonl", "--validation-split", "0.2", "--validation-output", "v.jsonl")[1]
    assert out.splitlines()[-1] == "Next: python fine_tune.py mine.jsonl --validation-file v.jsonl"


# --- counting ---

COOKBOOK_MESSAGES = [  # openai/openai-cookbook, How_to_count_tokens_with_tiktoken.ipynb
    {"role": "system", "content": "You are a helpful, pattern-following assistant that translates corporate jargon into plain English."},
    {"role": "system", "name": "example_user", "content": "New synergies will help drive top-line growth."},
    {"role": "system", "name": "example_assistant", "content": "Things working well together will increase revenue."},
    {"role": "system", "name": "example_user", "content": "Let's circle back when we have more bandwidth to touch base on opportunities for increased leverage."},
    {"role": "system", "name": "example_assistant", "content": "Let's talk later when we're less busy about how to do better."},
    {"role": "user", "content": "This late pivot means we don't have time to boil the ocean for the client deliverable."},
]  # fmt: skip
COOKBOOK_TOOLS = {
    "messages": [
        {"role": "system", "content": "You are a helpful assistant that can answer to questions about the weather."},
        {"role": "user", "content": "What's the weather like in San Francisco?"},
    ],
    "tools": [{"type": "function", "function": {
        "name": "get_current_weather", "description": "Get the current weather in a given location",
        "parameters": {"type": "object", "required": ["location"], "properties": {
            "location": {"type": "string", "description": "The city and state, e.g. San Francisco, CA"},
            "unit": {"type": "string", "description": "The unit of temperature to return", "enum": ["celsius", "fahrenheit"]},
        }},
    }}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "messages", "tools"), [("gpt-4", 129, 105), ("gpt-4o", 124, 101), ("gpt-4.1-mini-2025-04-14", 124, 101)]
)
def test_counts_equal_the_published_ones(model, messages, tools):
    preparator = step_1.TrainingDataPreparator(model)
    assert preparator.count_tokens(COOKBOOK_MESSAGES) == messages
    assert preparator.count_tokens({"messages": COOKBOOK_MESSAGES}) == messages
    assert preparator.count_tokens(COOKBOOK_TOOLS) == tools
    assert preparator.count_tokens("tiktoken is great!") == 6
    assert preparator.count_tokens([]) == step_1.PRIMING_TOKENS


@pytest.mark.parametrize(
    ("model", "encoding", "counted"),
    [("ft:gpt-4.1-mini-2025-04-14:acme::abc", "o200k_base", "exact"), ("ft:gpt-3.5-turbo-0125:acme::abc", "cl100k_base", "exact"),
     ("smollm2-135m-instruct", "o200k_base", "approximate"), ("ft:smollm2-135m-instruct:local::abc", "o200k_base", "approximate")],
)  # fmt: skip
def test_the_encoding_is_the_models(capsys, model, encoding, counted):
    jsonl("in.jsonl", map(qa, range(60)))
    document = report_of(capsys, "in.jsonl", "--model", model)
    assert (document["encoding"], document["counted"]) == (encoding, counted)
    assert ("approximate: tiktoken does not know" in run(capsys, "in.jsonl", "--model", model)[1]) == (
        counted == "approximate"
    )


def test_counts_are_those_of_a_plain_loop(capsys):
    import tiktoken

    rows = json.loads((ROOT / "examples/education/qa_pairs.json").read_text(encoding="utf-8"))
    run(
        capsys,
        str(ROOT / "examples/education/qa_pairs.json"),
        "--system",
        "Explain.",
        "--held-out",
        str(ROOT / "examples/education/test_cases.json"),
    )
    count = tiktoken.get_encoding("o200k_base").encode
    tokens = [sum(4 + len(count(m["content"])) for m in row["messages"]) + 3 for row in written()]
    trained = sum(len(count(m["content"])) for row in written() for m in row["messages"] if m["role"] == "assistant")
    document = report_of(capsys, "--check")
    assert (document["tokens"], document["trained_tokens"], document["examples"]) == (sum(tokens), trained, len(rows))
    ordered = sorted(tokens)
    assert document["tokens_per_example"]["min"] == ordered[0] and document["tokens_per_example"]["max"] == ordered[-1]
    assert document["tokens_per_example"]["median"] == ordered[(len(ordered) - 1) // 2]


@given(texts=st.lists(st.text(max_size=30) | st.sampled_from(["", " ", "a<|endoftext|>b", "<|", "<|fim_prefix|>"])))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_texts_that_are_encoded_together_count_as_they_do_alone(texts):
    counter = step_1.TokenCounter("gpt-4o")
    counts = counter.count_each(texts)
    assert counts == {text: counter.count(text) for text in counts}
    assert {text for text in texts if "<|endoftext|>" not in text} == counts.keys()


def test_every_role_is_one_token():
    import tiktoken

    for encoding in ("o200k_base", "cl100k_base"):
        assert [len(tiktoken.get_encoding(encoding).encode(role)) for role in step_1.ROLES] == [1, 1, 1, 1]


def test_only_trained_messages_count_as_trained():
    rows = [
        chat(
            "Q?",
            {"role": "assistant", "content": "one two three", "weight": 0},
            "R?",
            {"role": "assistant", "content": ANSWER},
        )
    ]
    jsonl("in.jsonl", rows * 12)
    report = step_1.check_training_file("in.jsonl", "gpt-4o")
    assert report.trained_tokens == 12 * step_1.TrainingDataPreparator("gpt-4o").count_tokens(ANSWER)


@pytest.mark.parametrize(
    ("examples", "epochs"),
    [
        (0, 25),
        (1, 25),
        (4, 25),
        (10, 10),
        (20, 5),
        (33, 3),
        (34, 3),
        (50, 3),
        (8333, 3),
        (8334, 2),
        (25_000, 1),
        (90_000, 1),
    ],
)
def test_the_epochs_that_auto_chooses(examples, epochs):
    assert step_1.auto_epochs(examples) == epochs


@pytest.mark.parametrize(
    ("base_url", "model", "price"),
    [(None, "gpt-4.1-mini-2025-04-14", 5.0), (None, "gpt-4.1-mini", 5.0), (None, "gpt-4.1", 25.0), ("", "ft:gpt-4o-mini-2024-07-18:a::b", 3.0),
     ("https://api.openai.com/v1/", "gpt-4o", 25.0), (None, "gpt-4", None), (None, "gpt-4.1-nano-2025-04-14", None), (None, "llama-3", None),
     ("http://127.0.0.1:8321/v1", "smollm2-135m-instruct", 0.0), ("http://localhost:1", "gpt-4.1-mini", 0.0), ("http://[::1]:1", "x", 0.0),
     ("https://acme.openai.azure.com/openai/v1", "gpt-4.1-mini", None), (None, "smollm2-135m-instruct", 0.0),
     ("", "ft:smollm2-135m-instruct:local::abc", 0.0), ("https://api.openai.com/v1", "smollm2-135m-instruct", None)],
)  # fmt: skip
def test_the_price_is_known_or_not_invented(monkeypatch, capsys, base_url, model, price):
    if base_url is not None:
        monkeypatch.setenv("OPENAI_BASE_URL", base_url)
    assert step_1.training_price(model) == price
    out = run(capsys, jsonl("in.jsonl", map(qa, range(60))), "--model", model)[1]
    priced = f"per 1M tokens, as of {step_1.PRICES_DATE}); the local API trains for free"
    said = {None: f"no price known for {model}", 0.0: "free"}.get(price, priced)
    assert said in re.search(r"^Estimated cost +(.*)$", out, re.MULTILINE)[1]
    document = report_of(capsys, "in.jsonl", "--model", model)
    assert document["estimated_cost"] == (
        None if price is None else pytest.approx(document["tokens"] * 3 * price / 1e6)
    )


@pytest.mark.parametrize("network", ["none", "silent"])
def test_without_a_vocabulary_counts_are_estimates_and_nothing_hangs(tmp_path, network):
    jsonl("in.jsonl", [qa("1 é"), *map(qa, range(60))])
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        environment = os.environ | {"TIKTOKEN_CACHE_DIR": str(tmp_path / "empty"), "PYTHONPATH": str(ROOT)}
        port = silent.getsockname()[1] if network == "silent" else 1
        environment["HTTPS_PROXY"] = environment["https_proxy"] = f"http://127.0.0.1:{port}"
        code = "import prepare_training_data as p, sys; p.LOADING_SECONDS = 3; sys.exit(p.main(['in.jsonl']))"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, encoding="utf-8"
        )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("warning: the vocabulary of o200k_base ") and "estimates (bytes / 4)" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    estimate = sum(3 + sum(4 + -(-len(m["content"].encode()) // 4) for m in row["messages"]) for row in written())
    assert f"Tokens           {estimate:,} (o200k_base, estimated: bytes / 4)" in done.stdout


def test_a_relative_cache_folder_is_one_of_the_repository(tmp_path):
    environment = os.environ | {
        "TIKTOKEN_CACHE_DIR": os.path.relpath(os.environ["TIKTOKEN_CACHE_DIR"], ROOT),
        "PYTHONPATH": str(ROOT),
    }
    jsonl("in.jsonl", map(qa, range(60)))
    done = subprocess.run([sys.executable, str(SCRIPT), "in.jsonl"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and "(o200k_base)" in done.stdout


# --- for other code ---


def test_the_class_is_the_same_implementation():
    preparator = step_1.TrainingDataPreparator("gpt-4o", system="Be kind.")
    example = preparator.format_qa_pair("Q?", ANSWER)
    assert example == chat({"role": "system", "content": "Be kind."}, *chat("Q?", ANSWER)["messages"])
    assert preparator.validate_example(example) == []
    (problem,) = preparator.validate_example(preparator.format_qa_pair("Q?", ""))
    assert (problem.level, problem.kind) == ("error", "empty-answer")
    report = preparator.prepare_data([qa(n) for n in range(60)], "out.jsonl")
    assert report.written == {"out.jsonl": "written"} and report.system_prompt == "Be kind." and report.errors == 0
    assert written("out.jsonl")[0] == preparator.format_qa_pair("Question 0?", ANSWER + "0")
    assert preparator.prepare_data(Path("out.jsonl"), check=True).examples == 60


def test_validate_training_data_names_positions():
    problems = step_1.validate_training_data([chat("a", ANSWER)] * 2 + [chat("b", "")] + [7])
    assert [(p.line, p.kind) for p in problems] == [
        (2, "duplicate"),
        (3, "empty-answer"),
        (4, "not-an-object"),
        (None, "too-few-examples"),
    ]
    assert (
        str(problems[1])
        == "examples:3: error: empty-answer: message 2: the answer is empty; write one or delete the row"
    )


def test_check_training_file_reports_what_a_job_needs_to_know():
    system = {"role": "system", "content": "S"}
    jsonl(
        "in.jsonl",
        [
            chat(system, {"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": ANSWER})
            for n in range(60)
        ],
    )
    report = step_1.check_training_file("in.jsonl", "gpt-4.1-mini-2025-04-14")
    assert report.problems == [] and report.system_prompt == "S" and report.epochs == 3
    assert report.cost(2) == pytest.approx(report.estimated_cost * 2 / 3)
    with open("in.jsonl", "a") as file:
        file.write(json.dumps(chat("Other?", ANSWER)) + "\n")
    assert step_1.check_training_file("in.jsonl").system_prompt is None
    with pytest.raises(step_1.StepError) as error:
        step_1.check_training_file("missing.jsonl")
    assert error.value.exit_code == 2


# --- whatever comes ---

QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.text(max_size=8) | st.sampled_from(["user", "assistant", "system", "tool", "function"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["question", "answer", "messages", "role", "content", "weight", "tools", "tool_calls", "function", "type", "id",
                                       "name", "arguments", "tool_call_id", "image_url", "text", "prompt", "completion", "x", "parameters", "properties",
                                       "enum"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
message_like = st.fixed_dictionaries({}, optional={
    "role": st.sampled_from(["user", "assistant", "system", "tool", "developer", "x"]), "content": json_values | st.text(max_size=80),
    "weight": st.sampled_from([0, 1, 2, None]), "name": st.text(max_size=3), "tool_calls": json_values, "tool_call_id": json_values, "x": json_values,
})  # fmt: skip
csv_text = st.text(st.characters(exclude_characters="\0"), max_size=60)  # Python 3.10 writes no NUL
record_like = (
    st.fixed_dictionaries({"question": st.text(max_size=60), "answer": st.text(max_size=90)})
    | st.fixed_dictionaries(
        {"messages": st.lists(message_like, max_size=4)}, optional={"tools": json_values, "id": json_values}
    )
    | json_values
)
GOOD = [qa(n) for n in range(12)]


def holds_for(capsys, name: str, data: bytes):
    """No traceback, every line number exists, what is written passes --check, a second run changes nothing."""
    for leftover in Path().iterdir():
        leftover.unlink()
    Path(name).write_bytes(data)
    code, _out, err = run(capsys, name, "--rejected", "no.jsonl")
    assert code in (0, 1, 2), err
    lines = data.count(b"\n") + 1
    numbers = [int(number) for number in re.findall(rf"^{re.escape(name)}:(\d+): ", err, re.MULTILINE)]
    assert all(1 <= number <= lines for number in numbers), err
    if code == 2:
        assert len(err.splitlines()) == 1 and not Path("training_data.jsonl").exists()
        return
    assert Path("training_data.jsonl").exists() == (code == 0)
    if code == 0:
        assert run(capsys, "--check")[0] == 0
        first = Path("training_data.jsonl").read_bytes()
        again = run(capsys, "training_data.jsonl", "-o", "again.jsonl")
        assert again[0] == 0 and Path("again.jsonl").read_bytes() == first, (first, again[2])
        assert "already up to date" in run(capsys, name)[1]
    assert not list(Path().glob("*.bak*")) and not list(Path().glob(".*"))


@QUICK
@given(data=st.binary(max_size=200), good=st.booleans(), name=st.sampled_from(["in.json", "in.jsonl", "in.csv"]))
def test_arbitrary_bytes(capsys, data, good, name):
    start = "".join(json.dumps(row) + "\n" for row in GOOD).encode() if good else b""
    holds_for(capsys, name, start + data)


@QUICK
@given(
    records=st.lists(record_like, max_size=6),
    shape=st.sampled_from(["lines", "array", "pretty"]),
    ascii_only=st.booleans(),
)
def test_arbitrary_records(capsys, records, shape, ascii_only):
    rows = [*GOOD, *records]
    if shape == "lines":
        text = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    else:
        text = json.dumps(rows, ensure_ascii=ascii_only, indent=1 if shape == "pretty" else None)
    holds_for(capsys, "in.json", text.encode("utf-8", "replace"))


@QUICK
@given(rows=st.lists(st.tuples(csv_text, csv_text), max_size=5))
def test_arbitrary_csv(capsys, rows):
    table = io.StringIO()
    csv.writer(table).writerows([("question", "answer"), *((r["question"], r["answer"]) for r in GOOD), *rows])
    holds_for(capsys, "in.csv", table.getvalue().encode("utf-8", "replace"))


@settings(deadline=None, max_examples=300)
@given(
    value=st.lists(json_values, max_size=5),
    indent=st.sampled_from([None, 0, 3]),
    size=st.integers(1, 40),
    ascii_only=st.booleans(),
)
def test_a_json_array_in_chunks_of_any_size_reads_as_json_does(value, indent, size, ascii_only):
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_1, "CHUNK_CHARS", size)
        found = list(step_1.read_json_array(io.StringIO(text)))
    assert repr([element for _, element in found]) == repr(json.loads(text))
    lines = text.splitlines() or [""]
    assert all(1 <= line <= len(lines) for line, _ in found)


@QUICK
@given(
    records=st.lists(st.tuples(st.text(max_size=10), st.text(min_size=50, max_size=60)), min_size=20, max_size=40),
    more=st.lists(st.text(max_size=10), max_size=10),
    share=st.floats(0.2, 0.6),
)
def test_any_split_is_disjoint_and_moves_no_row(records, more, share):
    preparator = step_1.TrainingDataPreparator("gpt-4o", system="")

    def sides(rows) -> list[set]:
        named = [{"question": question, "answer": answer} for question, answer in rows]
        for leftover in Path().glob("*.jsonl*"):
            leftover.unlink()
        preparator.prepare_data(named, "t.jsonl", validation_split=share, validation_output="v.jsonl")
        return [
            {r["messages"][0]["content"] for r in written(f)} if Path(f).exists() else set()
            for f in ("t.jsonl", "v.jsonl")
        ]

    training, validation = sides(records)
    assert not training & validation
    larger = sides([*records, *((question, "x" * 50) for question in more)])
    if training and larger[0]:
        assert training <= larger[0] and validation <= larger[1]


def test_a_long_element_takes_time_in_proportion(monkeypatch):
    text = json.dumps([[qa(n) for n in range(3000)], qa(1)])
    lengths = []

    class Counting(json.JSONDecoder):
        def raw_decode(self, text, start=0):
            lengths.append(len(text) - start)
            return super().raw_decode(text, start)

    monkeypatch.setattr(step_1, "DECODER", Counting())
    monkeypatch.setattr(step_1, "CHUNK_CHARS", 500)
    found = [value for _, value in step_1.read_json_array(io.StringIO(text))]
    assert len(found) == 2 and len(found[0]) == 3000 and sum(lengths) < 5 * len(text)


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminal")
def test_a_terminal_shows_progress_and_a_pipe_does_not():
    import pty

    jsonl("in.jsonl", [qa(n) for n in range(2500)])
    master, terminal = pty.openpty()
    done = subprocess.run([sys.executable, str(SCRIPT), "in.jsonl"], stderr=terminal, stdout=subprocess.PIPE, text=True)
    os.close(terminal)
    shown = os.read(master, 10_000).decode()
    os.close(master)
    assert done.returncode == 0 and "1,000 records" in shown and "2,000 records" in shown
    assert (
        "1,000 records"
        not in subprocess.run([sys.executable, str(SCRIPT), "in.jsonl"], capture_output=True, text=True).stderr
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["lines", "array"])
def test_memory_does_not_grow_with_the_file(form):
    choose = random.Random(3)
    words = [choose.choice("abcdefghijklmnop") * choose.randint(1, 9) for _ in range(5000)]
    with open("big.json", "w", encoding="utf-8") as file:
        for number in range(300_000):
            row = json.dumps(
                qa(f"{number} {' '.join(choose.choices(words, k=8))}") | {"answer": f"{ANSWER} {number} 🎉"}
            )
            file.write(
                ("[" if number == 0 else ",\n" if form == "array" else "\n") * (form == "array" or number > 0) + row
            )
        file.write("]" if form == "array" else "\n")
    script = [sys.executable, str(ROOT / "prepare_training_data.py"), "big.json"]
    # A process of its own starts it and asks for its children's peak: this one has had others, and larger ones.
    code = (
        "import resource, subprocess, sys\n"
        f"done = subprocess.run({script!r}, stdout=subprocess.DEVNULL)\n"
        "print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("0 "), done.stderr[-500:]
    assert float(done.stdout.split()[1]) < 250


def test_threads_of_other_code_may_count_at_the_same_time():
    preparator = step_1.TrainingDataPreparator("gpt-4o")
    counts: list[int] = []
    threads = [
        threading.Thread(target=lambda: counts.append(preparator.count_tokens(COOKBOOK_MESSAGES))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [124] * 8
