"""Step 1 as people run it: what goes in, what is said, what is refused, what is written."""
# ruff: noqa: E501 (a case a line: tables of cases are read down, not across)

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import corpus
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prepare_training_data as step_1
from conftest import ROOT
from local_api import rules
from local_api.validation import judge_file

OWN_DATA = Path(__file__).parent / "data" / "own_data"
SOURCE = (ROOT / "prepare_training_data.py").read_text("utf-8")
KINDS = set(re.findall(r'(?:fault\(|warn\(|^    \()"([a-z-]+)"', SOURCE, re.MULTILINE)) | {
    *("invalid-json", "invalid-csv", "empty-question", "empty-answer"),
    *("no-user-message", "no-assistant-message"),
}
ANSWER = "This answer is long enough that nobody would call it a short one, number "


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FINE_TUNE_MODEL", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def run(capsys, *argv: str) -> tuple[int, str, str]:
    """Return the exit code, what went to stdout and what to stderr, sys.exit's sentence included."""
    code, sentence = 0, ""
    try:
        step_1.main(list(argv))
    except SystemExit as end:
        code, sentence = (end.code, "") if isinstance(end.code, int) else (1, f"{end.code}\n")
    out, err = capsys.readouterr()
    return code, out, err + sentence


def qa(number: int | str, **more) -> dict:
    return {"question": f"Question {number}?", "answer": f"{ANSWER}{number}", **more}


def chat(*turns: str | dict, **more) -> dict:
    """A row of user and assistant messages in turn; a dict stands for itself."""
    roles = ("user", "assistant")
    messages = [t if isinstance(t, dict) else {"role": roles[n % 2], "content": t} for n, t in enumerate(turns)]
    return {"messages": messages, **more}


def chat_row(number: int) -> dict:
    return chat(*qa(number).values())


def jsonl(path: str, records) -> str:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    Path(path).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def written(path: str = "training_data.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").split("\n") if line]


def table(path: str, header: str, delimiter: str = ",", rows: int = 12) -> str:
    file = io.StringIO()
    lines = csv.writer(file, delimiter=delimiter)
    lines.writerow(header.split(delimiter))
    lines.writerows([f"Question {n}?", f"{ANSWER}{n}, and so on; yes"] for n in range(rows))
    Path(path).write_text(file.getvalue(), encoding="utf-8", newline="")
    return path


# --- the tutorial's step ---


def test_the_default_run_makes_what_the_repository_holds(capsys):
    code, out, err = run(capsys)
    assert (code, err) == (0, "")
    assert Path("training_data.jsonl").read_bytes() == (ROOT / "training_data.jsonl").read_bytes()
    assert "System prompt    TechFlow's, of this tutorial" in out
    assert out.splitlines()[-1] == "Next: python fine_tune.py training_data.jsonl"
    assert "training_data.jsonl: already up to date" in run(capsys)[1]


def test_the_report_file_is_of_exactly_these_bytes(capsys):
    run(capsys, jsonl("in.jsonl", map(qa, range(60))), "--system", "You count.", "-o", "mine.jsonl")
    report = json.loads(Path("mine.report.json").read_text("utf-8"))
    assert report["sha256"] == hashlib.sha256(Path("mine.jsonl").read_bytes()).hexdigest()
    expected = {"examples": 60, "counted": "exact", "system_prompt": "You count."}
    assert expected.items() <= report.items()
    import tiktoken

    encode = tiktoken.get_encoding("o200k_base").encode
    tokens = sum(3 + sum(4 + len(encode(m["content"])) for m in row["messages"]) for row in written("mine.jsonl"))
    assert report["tokens"] == tokens


def test_the_count_for_another_tokenizer_is_called_approximate(capsys, monkeypatch):
    monkeypatch.setenv("FINE_TUNE_MODEL", "smollm2-135m-instruct")
    assert " (approximate)" in run(capsys, jsonl("in.jsonl", map(qa, range(60))))[1]


def test_without_a_vocabulary_counts_are_estimates(capsys, monkeypatch):
    def no_network(name):
        raise OSError("no such host")

    monkeypatch.setattr(step_1.tiktoken, "get_encoding", no_network)
    assert run(capsys, jsonl("in.jsonl", map(qa, range(60))))[0] == 0
    assert json.loads(Path("training_data.report.json").read_text("utf-8"))["counted"] == "estimated"


# --- every file of own_data, as it is and as twelve rows of its kind ---

ASK, SAY = "How do I borrow a bike?", "Sign up at the desk with a photo ID and scan the tag."
CHILDREN = {"role": "system", "content": "You answer children."}
TUTORIAL = {"role": "system", "content": step_1.SYSTEM_PROMPT}


@pytest.mark.parametrize(("name", "first", "said"), [
    ("1a_no_system_given.csv", [TUTORIAL, ASK, SAY], "tutorial-prompt"),
    ("1b_own_system_in_row.jsonl", [CHILDREN, ASK], ""),
    ("1c_system_beside_messages.jsonl", [CHILDREN, ASK], ""),
    ("2a_capitals.csv", [TUTORIAL, ASK, SAY], ""),
    ("2b_alpaca.json", [TUTORIAL, "Translate into German.\n\nGood morning"], ""),
    ("2c_sharegpt.jsonl", [TUTORIAL, ASK, SAY], ""),
    ("2d_other_names.csv", None, "found `Frage`, `Antwort`: say which they are: --columns question=NAME,answer=NAME"),
    ("3a_wrapped.json", [TUTORIAL, ASK, SAY], ""),
    ("3b_pretty_printed.jsonl", [TUTORIAL, ASK, SAY], ""),
    ("3c_semicolon.csv", [TUTORIAL, ASK, "Sign up at the desk, with a photo ID, and scan the tag."], ""),
    ("3d_semicolon_comma_in_first_line.csv", None, "`Hello, how are you`"),
    ("3e_tab.tsv", [TUTORIAL, ASK], ""),
    ("3f_whatsapp.txt", None, "no data with names: docs/your_data.md"),
    ("3g_parquet_head.parquet", None, "no data with names: docs/your_data.md"),
    ("4a_label_false.jsonl", None, "this is data for another method"),
    ("4b_context.jsonl", [TUTORIAL, "What does rule 7 say?"], "`context` is not in the training data"),
    ("4c_metadata.jsonl", [TUTORIAL, ASK, SAY], ""),
    ("5a_separators.jsonl", [TUTORIAL, "Question 1\n\n###\n\n"], ""),
    ("5b_dirt.csv", [TUTORIAL], ""),
])  # fmt: skip
def test_each_file_of_own_data(capsys, monkeypatch, name, first, said):
    monkeypatch.setattr(step_1, "MIN_EXAMPLES", 1)  # these are one to three rows
    code, out, err = run(capsys, str(OWN_DATA / name))
    assert said in err and "Traceback" not in err
    if first is None:
        assert code == 1 and not Path("training_data.jsonl").exists()
    elif first:
        messages = written()[0]["messages"]
        texts = [message if message["role"] == "system" else message["content"] for message in messages]
        assert code == 0 and texts[: len(first)] == first and messages[-1]["role"] == "assistant"
    if name == "4c_metadata.jsonl":
        assert "metadata (1 rows)" in out


def test_names_of_ones_own_are_given_with_columns(capsys):
    table("in.csv", "Frage;Antwort", ";")
    assert run(capsys, "in.csv")[0] == 1
    assert run(capsys, "in.csv", "--columns", "question=Frage,answer=ANTWORT")[0] == 0
    assert written()[0]["messages"][1]["content"] == "Question 0?"
    code, _, err = run(capsys, "in.csv", "--columns", "Frage")
    assert code == 1 and "--columns question=NAME,answer=NAME" in err


# --- a corpus of shapes ---

SOUND = ["Question 0?", f"{ANSWER}0"]
TURNS = [{"role": "user", "content": SOUND[0]}, {"role": "assistant", "content": SOUND[1]}]
LINES = [json.dumps(qa(n), ensure_ascii=False) for n in range(12)]
TEXT_SHAPES = {
    "array.json": "[" + ",".join(LINES) + "]",
    "array_pretty.json": json.dumps([qa(n) for n in range(12)], indent=2),
    "array_trailing_comma.json": "[" + ",\n".join(LINES) + ",]",
    "lines.jsonl": "\n".join(LINES),
    "lines_blank_between.jsonl": "\n\n\n".join(LINES) + "\n\n",
    "lines_crlf.jsonl": "\r\n".join(LINES) + "\r\n",
    "lines_cr.jsonl": "\r".join(LINES),
    "lines_comma.jsonl": ",\n".join(LINES) + ",\n",
    "lines_no_gap.jsonl": "".join(LINES),
    "pretty.jsonl": "\n".join(json.dumps(qa(n), indent=4) for n in range(12)),
    "named_txt.txt": "\n".join(LINES),
    "wrapped.json": '{"faqs": [' + ",".join(LINES) + "]}",
    "wrapped_data.json": '{\n "version": 1,\n "data": [\n' + ",\n".join(LINES) + "\n]\n}",
    "wrapped_then_more.json": '{"items": [' + ",".join(LINES) + '], "count": 12}',
    "blank_start.jsonl": "\n\n  \n" + "\n".join(LINES),
}
RECORD_SHAPES = {
    "prompt_completion": lambda n: {"prompt": f"Question {n}?", "completion": f"{ANSWER}{n}"},
    "prompt_completion_lists": lambda n: {
        "prompt": chat(f"Question {n}?")["messages"],
        "completion": [{"role": "assistant", "content": f"{ANSWER}{n}"}],
    },
    "capitals": lambda n: {"QUESTION": f"Question {n}?", " Answer ": f"{ANSWER}{n}"},
    "messages": lambda n: chat(f"Question {n}?", f"{ANSWER}{n}"),
    "conversations": lambda n: {
        "conversations": [{"from": "human", "value": f"Question {n}?"}, {"from": "gpt", "value": f"{ANSWER}{n}"}]
    },
    "from_ai": lambda n: {
        "conversations": [{"from": "user", "value": f"Question {n}?"}, {"from": "ai", "value": f"{ANSWER}{n}"}]
    },
    "from_model": lambda n: {
        "messages": [{"role": "User", "content": f"Question {n}?"}, {"role": "model", "content": f"{ANSWER}{n}"}]
    },
    "alpaca_no_input": lambda n: {"instruction": f"Question {n}?", "input": "", "output": f"{ANSWER}{n}"},
    "id_category": lambda n: qa(n, id=n, category="a"),
    "nulls": lambda n: chat(
        f"Question {n}?",
        {"role": "assistant", "content": f"{ANSWER}{n}", "refusal": None, "tool_calls": None},
        tools=None,
    ),
    "name": lambda n: chat({"role": "user", "content": f"Question {n}?", "timestamp": 7}, f"{ANSWER}{n}"),
    "both_system_kinds": lambda n: qa(n, system=""),
}
TABLES = {"comma.csv": ("question,answer", ","), "semicolon.csv": ("Question;Answer", ";"), "tab.csv": ("question\tanswer", "\t"),
          "tab.tsv": ("QUESTION\tANSWER", "\t"), "named.txt": ("question,answer", ",")}  # fmt: skip


def texts_of(row: dict) -> list[str]:
    return [message["content"] for message in row["messages"] if message["role"] != "system"]


@pytest.mark.parametrize("name", TEXT_SHAPES)
def test_a_file_s_form_does_not_matter(capsys, name):
    Path(name).write_bytes(TEXT_SHAPES[name].encode())
    code, _, err = run(capsys, name, "--system", "")
    assert code == 0 and [texts_of(row) for row in written()] == [texts_of(chat(*qa(n).values())) for n in range(12)], (
        err
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_an_encoding_with_a_mark_is_read(capsys, encoding):
    text = "\n".join(LINES[:-1]) + '\n{"question": "日本語 🎉 ü?", "answer": "' + ANSWER + '"}'
    bom = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    Path("in.jsonl").write_bytes((bom + text).encode(encoding))
    assert run(capsys, "in.jsonl", "--system", "")[0] == 0
    assert texts_of(written()[-1])[0] == "日本語 🎉 ü?"
    assert not Path("training_data.jsonl").read_bytes().startswith(b"\xef\xbb\xbf")


@pytest.mark.parametrize("name", RECORD_SHAPES)
def test_a_record_s_shape_does_not_matter(capsys, name):
    jsonl("in.jsonl", [RECORD_SHAPES[name](n) for n in range(12)])
    code, _, err = run(capsys, "in.jsonl", "--system", "")
    assert code == 0 and written()[0] == {"messages": TURNS} and len(written()) == 12, err


@pytest.mark.parametrize("name", TABLES)
def test_a_table_s_delimiter_is_that_of_its_header(capsys, name):
    code, _, err = run(capsys, table(name, *TABLES[name]), "--system", "")
    assert code == 0 and texts_of(written()[0]) == ["Question 0?", f"{ANSWER}0, and so on; yes"], err


def test_a_blank_behind_the_delimiter_is_no_part_of_the_text(capsys):
    Path("in.csv").write_text(
        "question, answer\n" + "".join(f'"Q {n}?", "{ANSWER}, {n}"\n' for n in range(12)), "utf-8"
    )
    assert run(capsys, "in.csv", "--system", "")[0] == 0
    assert texts_of(written()[2]) == ["Q 2?", f"{ANSWER}, 2"]


def test_a_table_as_spreadsheets_write_it(capsys):
    rows = [f'"Question {n}?";"{ANSWER}{n};\r\nand ""so"" on";;' for n in range(12)]
    text = "\r\n".join(["Question;Answer;;", *rows, ";;;", ""])
    Path("in.csv").write_bytes(text.encode("utf-8-sig"))
    code, _, err = run(capsys, "in.csv", "--system", "")
    assert code == 0 and texts_of(written()[0])[1] == f'{ANSWER}0;\nand "so" on' and len(written()) == 12, err


@pytest.mark.parametrize("history", [
    [["First?", "One."], ["Second?", "Two."]],
    chat("First?", "One.", "Second?", "Two.")["messages"],
])  # fmt: skip
def test_a_history_becomes_earlier_turns(capsys, history):
    jsonl("in.jsonl", [qa(n, history=history) for n in range(12)])
    assert run(capsys, "in.jsonl", "--system", "")[0] == 0
    assert texts_of(written()[0]) == ["First?", "One.", "Second?", "Two.", *SOUND]


def test_alpaca_s_input_stands_below_the_instruction(capsys):
    jsonl(
        "in.jsonl", [{"instruction": "Translate.", "input": f"Word {n}", "output": f"{ANSWER}{n}"} for n in range(12)]
    )
    run(capsys, "in.jsonl", "--system", "")
    assert texts_of(written()[3]) == ["Translate.\n\nWord 3", f"{ANSWER}3"]


def test_an_instruction_that_is_null_is_no_word(capsys):
    rows = [{"instruction": None, "input": f"Word {n}", "output": f"{ANSWER}{n}"} for n in range(12)]
    run(capsys, jsonl("in.jsonl", rows), "--system", "")
    assert texts_of(written()[3]) == ["Word 3", f"{ANSWER}3"]


def test_several_files_are_one_dataset(capsys):
    jsonl("a.jsonl", [qa(n) for n in range(6)])
    table("b.csv", "question,answer")
    assert run(capsys, "a.jsonl", "b.csv")[0] == 0
    assert len(written()) == 18


# --- the system prompt: which one, and whose ---


@pytest.mark.parametrize(("rows", "argv", "line", "prompt"), [
    ([qa(n) for n in range(60)], ["--system", "You count."], "You count. (60 rows)", "You count."),
    ([qa(n) for n in range(60)], [], "TechFlow's, of this tutorial", step_1.SYSTEM_PROMPT),
    ([qa(n, system="Own.") for n in range(60)], [], "Own. (60 rows)", "Own."),
    ([qa(n) for n in range(60)], ["--system", ""], "none (60 rows)", ""),
])  # fmt: skip
def test_the_report_says_whose_system_prompt_went_in(capsys, rows, argv, line, prompt):
    _, out, err = run(capsys, jsonl("in.jsonl", rows), *argv)
    assert re.search(rf"^System prompt +.*{re.escape(line)}", out, re.MULTILINE)
    assert ("tutorial-prompt" in err) == ("TechFlow" in line)
    assert json.loads(Path("training_data.report.json").read_text("utf-8"))["system_prompt"] == prompt


def test_a_prompt_of_one_s_own_for_techflow_is_one_s_own(capsys):
    _, out, err = run(capsys, jsonl("in.jsonl", map(qa, range(60))), "--system", "You are TechFlow's\npirate.")
    assert "System prompt    You are TechFlow's pirate. (60 rows)" in out and "tutorial-prompt" not in err


def test_a_record_s_system_beside_a_system_message_is_said_to_be_left_out(capsys):
    rows = [{**chat(CHILDREN, *qa(n).values()), "system": "Another."} for n in range(12)]
    for row in rows:  # chat() counts turns by place
        row["messages"][1]["role"], row["messages"][2]["role"] = "user", "assistant"
    assert "Left out         system (12 rows)" in run(capsys, jsonl("in.jsonl", rows))[1]
    assert written()[0]["messages"][0] == CHILDREN


def test_an_edited_prompt_is_the_reader_s_own(capsys, monkeypatch):
    monkeypatch.setattr(step_1, "SYSTEM_PROMPT", "You are Larkfield's desk.")
    _, out, err = run(capsys, jsonl("in.jsonl", map(qa, range(60))))
    assert "You are Larkfield's desk. (60 rows)" in out and "tutorial-prompt" not in err


# --- faults of rows ---

USER, ASSISTANT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": ANSWER}
LETTERS = "aB3" * 40
FAULTS = [
    ("not-an-object", "7"),
    ("unknown-shape", {"frage": "a"}),
    ("unknown-shape", {"prompt": "a", "chosen": "b", "rejected": "c"}),
    ("unknown-shape", {"input": {}, "preferred_output": [], "non_preferred_output": []}),
    ("unknown-shape", {"contents": [{"role": "user", "parts": [{"text": "a"}]}]}),
    ("unknown-shape", {"tag": "hi", "patterns": ["a"], "responses": ["b"]}),
    ("unknown-shape", {"message_id": "1", "parent_id": None, "text": "a", "role": "prompter"}),
    ("unknown-shape", {"subject": "a", "body": "b", "status": "open"}),
    ("unknown-shape", {"title": "a", "mapping": {}}),
    ("unknown-shape", {"role": "user", "content": "a"}),
    ("unknown-shape", {"question": "a", "Question": "b", "answer": "c"}),
    ("missing-messages", {"messages": []}),
    ("missing-messages", {"messages": "Hi"}),
    ("invalid-content", chat("Q?", {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}, ANSWER)),
    ("unknown-role", chat({"content": "Q?"}, ASSISTANT)),
    ("unknown-role", {"messages": ["Q?", ASSISTANT]}),
    ("unknown-role", chat({"role": "bot", "content": "Q?"}, ASSISTANT)),
    ("invalid-content", chat({"role": "user"}, ASSISTANT)),
    ("invalid-content", qa("x") | {"answer": None}),
    ("invalid-content", qa("x") | {"answer": 7}),
    ("empty-question", qa("x") | {"question": " \n"}),
    ("empty-answer", qa("x") | {"answer": ""}),
    ("no-user-message", {"messages": [ASSISTANT]}),
    ("no-assistant-message", {"messages": [USER]}),
    ("control-token", qa("x") | {"answer": ANSWER + "<|endoftext|>"}),
    ("control-token", qa("x") | {"answer": ANSWER + "<|fim_suffix|>"}),
    ("blank-run", qa("x") | {"answer": ANSWER + " " * 1_000_001}),
    ("lone-surrogate", '{"question": "a\\ud83d", "answer": "' + ANSWER + '"}'),
    ("too-many-tokens", qa("x") | {"answer": "word " * 70_000}),
    *(("secret", qa("x") | {"answer": f"{ANSWER} key: {key} end"}) for key in (
        "sk-" + LETTERS[:48], "sk-proj-" + LETTERS[:40], "AKIA" + "QWERTYUIOP123456", "ghp_" + LETTERS[:36], "github_pat_" + LETTERS[:60],
        "hf_" + LETTERS[:34], "-----BEGIN RSA PRIVATE KEY-----")),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "record"), FAULTS)
def test_a_faulty_row_is_named_and_left_out(capsys, kind, record):
    code, out, err = run(capsys, jsonl("in.jsonl", [*map(qa, range(60)), record]), "--system", "")
    assert code == 0 and len(written()) == 60
    assert re.search(rf"^in\.jsonl:61: error: {kind}: .{{10,}}$", err, re.MULTILINE), err
    assert re.search(r"^Records +61: 60 valid, 1 invalid$", out, re.MULTILINE)
    assert LETTERS[:30] not in err  # no secret is repeated


@pytest.mark.parametrize("text", [
    "task-oriented-dialogue-systems-2", "a<b and b>c", "R&D", "AT&T; x", "none of these", "ghost_of_a_long_function_name_that_is_no_key",
    "München, Ça va, â bon", "<|", "if x < a: pass", "sk-4711-blau-gross-2024", "/signup_confirmation_page_v2", "umsatz_chf_quartal_2024",
    "SLOVAKIA-2024-CUSTOMS-FORM.pdf", "Your PRIVATE KEY stays here - we never see it.", "hf_hub_download_file_v2_2024",
    "test_weight_decay_is_applied_to_every_group", "sk-loading_spinner_container_wrapper",
])  # fmt: skip
def test_what_is_near_a_fault_is_none(capsys, text):
    _, _, err = run(
        capsys, jsonl("in.jsonl", [*map(qa, range(60)), qa("x") | {"answer": f"{ANSWER} {text}"}]), "--system", ""
    )
    assert err == ""


def test_rows_with_tools_go_through_unseen_and_that_is_said(capsys):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    row = chat(
        "Q?",
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "1"},
        tools=[{"type": "function", "function": {"name": "f"}}],
    )
    row["messages"].append(ASSISTANT)
    _, _, err = run(capsys, jsonl("in.jsonl", [*map(qa, range(60)), row]), "--system", "")
    assert "in.jsonl:61: warning: not-looked-into: " in err and "python -m local_api --check FILE" in err
    del row["messages"][1]["content"]  # null counts as absent
    assert written()[-1] == row


def test_the_report_knows_the_system_prompt_of_rows_with_tools(capsys):
    tools = [{"type": "function", "function": {"name": "f"}}]
    rows = [chat(f"Question {n}?", f"{ANSWER}{n}", tools=tools) for n in range(60)]
    code, _, err = run(capsys, jsonl("in.jsonl", rows), "--system", "S", "--hold-out", "0.2")
    assert code == 0 and len(written()) == 48 and "conflicting" not in err and "duplicate" not in err
    assert len(written("training_data_test_cases.jsonl")) == 12
    assert json.loads(Path("training_data.report.json").read_text("utf-8"))["system_prompt"] == "S"


def test_no_list_inside_of_a_record_is_taken_for_the_records(capsys):
    tags = [{"name": "bikes"}]
    jsonl("in.jsonl", [{"tags": tags, **qa(n)} for n in range(12)])
    assert run(capsys, "in.jsonl", "--system", "")[0] == 0
    assert len(written()) == 12
    Path("in.json").write_text(json.dumps({"a": [qa(n) for n in range(12)], "b": tags}), "utf-8")
    code, _, err = run(capsys, "in.json")
    assert code == 1 and "found `a`, `b`: say which they are" in err


@pytest.mark.parametrize("history", [[["First?"]], [["First?", "One.", 3]], "First? One."])
def test_a_history_of_another_form_is_told(capsys, history):
    jsonl("in.jsonl", [*map(qa, range(12)), qa("x", history=history)])
    code, _, err = run(capsys, "in.jsonl", "--system", "")
    assert code == 0 and re.search("unknown-role|`history` is not in the training data", err)


def test_ratings_in_a_table_are_data_for_another_method(capsys):
    lines = [f'Question {n}?,"{ANSWER}{n}",false' for n in range(12)]
    Path("in.csv").write_text("\n".join(["prompt,completion,label", *lines]), "utf-8")
    code, _, err = run(capsys, "in.csv")
    assert code == 1 and "this is data for another method" in err


def test_the_same_fault_in_many_rows_is_told_once(capsys):
    jsonl("in.jsonl", [{"frage": n} for n in range(9783)])
    code, _, err = run(capsys, "in.jsonl")
    assert code == 1 and "(9,783 rows: lines 1, 2, 3, ...)" in err and len(err.splitlines()) <= 3
    assert len(run(capsys, "in.jsonl", "--all")[2].splitlines()) >= 9783


def test_what_is_left_out_is_counted(capsys):
    rows = [qa(n, source="web", tags=[1]) for n in range(12)] + [
        chat("Q?", USER | {"role": "assistant", "content": ANSWER, "refusal": None})
    ]
    out = run(capsys, jsonl("in.jsonl", rows))[1]
    for part in ("source (12 rows)", "tags (12 rows)", "refusal of messages (1 rows)"):
        assert f"Left out         {part}\n" in out


def test_text_that_no_shape_takes_up_is_a_warning_that_names_the_loss(capsys):
    rows = [qa(n, input=f"passage {n}", background="" if n else "b", document="d", functions=[1]) for n in range(60)]
    _, _, err = run(capsys, jsonl("in.jsonl", rows), "--system", "")
    for part in ("`input` is not in the training data: 60 rows;", "`background` is not in the training data: 1 rows;"):
        assert f"training_data.jsonl: warning: not-in-training: {part}" in err
    assert "`document` is not in" in err and "`functions` into `tools`" in err


def test_rows_are_compared(capsys):
    rows = [
        *map(qa, range(60)),
        qa(0),
        qa(1) | {"question": " QUESTION 1? "},
        qa(2) | {"answer": ANSWER + "other"},
        qa(3, system="Own."),
    ]
    code, _, err = run(capsys, jsonl("in.jsonl", rows), "--system", "S")
    assert code == 0 and len(written()) == 63 and ":62:" not in err and ":64:" not in err
    for part in (
        "61: warning: duplicate: the same as in.jsonl:1: left out",
        "63: warning: conflicting-answer: in.jsonl:3",
    ):
        assert part in err


# --- faults of files ---


@pytest.mark.parametrize(("name", "data", "sentence"), [
    ("a.jsonl", b"", "is empty, or no data with names"),
    ("a.csv", b"\xef\xbb\xbf \n\n", "is empty, or no data with names"),
    ("a.jsonl", b'{"question": "a"\n', "a.jsonl:2: error: invalid-json: Expecting"),
    ("a.jsonl", b'{"question": "a", "answer": "b"}\n\n{"question": "a}\n', "a.jsonl:3: error: invalid-json: "),
    ("a.json", b'[{"question": "a", "answer": "b"},\n{"question": "c"', "a.json:2: error: invalid-json: "),
    ("a.jsonl", b"[" * 100_000 + b"{" * 100_000, "a.jsonl:1: error: invalid-json: "),
    ("a.json", b'{"faqs": [\n{"question": "a", "answer": "b"}\n{"question": "c"}]}', "a.json:3: error: invalid-json: "),
    ("a.csv", b'question,answer\nA?,"one"\nB?,"open\nC?,fine\n', "a.csv:3: error: invalid-csv: "),
    ("a.csv", b'question,answer\nA?,"open\nB?,fine\nC?,"closed"\n', "a.csv:2: error: invalid-csv: "),
    ("a.csv", b"question,answer\nCaf\xe9?,x\n", "a.csv:2: this is no UTF-8: save it so"),
    ("a.xlsx", b"PK\x03\x04" + b"\0" * 50, "no data with names: docs/your_data.md says"),
    ("a.parquet", b"PAR1" + b"\xff" * 50, "no data with names: docs/your_data.md says"),
    ("a.md", b"# FAQ\n\n## How?\n\nSo.\n", "no data with names: docs/your_data.md says"),
    ("a.md", b"| question | answer |\n|---|---|\n", "no data with names: docs/your_data.md says"),
    ("a.txt", "\u200e[02.03.26, 10:00:12] Ada: Hi\n".encode(), "no data with names: docs/your_data.md says"),
    ("a.txt", b"3/2/26, 10:00 - Ada: Hi\n", "no data with names: docs/your_data.md says"),
    ("a.txt", b"#separator:tab\n#html:true\na\tb\n", "no data with names: docs/your_data.md says"),
    ("a.yml", b"- question: a\n  answer: b\n", "no data with names: docs/your_data.md says"),
    ("a.html", b"<!doctype html>", "no data with names: docs/your_data.md says"),
    ("missing.jsonl", None, "missing.jsonl: No such file"),
])  # fmt: skip
def test_a_file_that_cannot_be_read_ends_in_one_sentence(capsys, name, data, sentence):
    if data is not None:
        Path(name).write_bytes(data)
    code, out, err = run(capsys, name)
    assert code == 1 and sentence in err and len(err.splitlines()) == 1 and out == ""
    assert [path.name for path in Path().iterdir()] == ([name] if data is not None else [])


@pytest.mark.parametrize("record", [{"rows": [[{"question": "a"}]]}, {"tips": ["use [{x}] here"]}])
def test_what_looks_like_a_list_of_records_and_is_none_is_an_unknown_shape(capsys, record):
    Path("in.json").write_text(json.dumps(record), encoding="utf-8")
    code, _, err = run(capsys, "in.json")
    assert code == 1 and f"unknown-shape: found `{next(iter(record))}`: say which they are" in err


def test_a_row_with_too_many_fields_is_an_error_of_its_own(capsys):
    text = table("in.csv", "question,answer", rows=60)
    Path(text).write_text(Path(text).read_text("utf-8") + "Why?,because, as I said\nHow?\n", encoding="utf-8")
    code, _, err = run(capsys, "in.csv")
    assert code == 0 and "in.csv:62: error: invalid-csv: " in err and "in.csv:63: error: empty-answer" in err


@pytest.mark.parametrize("record", [record for _, record in FAULTS] + [make(0) for make in RECORD_SHAPES.values()])
def test_the_strict_judge_accepts_what_step_1_writes(capsys, record):
    run(capsys, jsonl("in.jsonl", [*map(qa, range(1, 12)), record]), "--system", "S")
    faults = [fault.kind for row in written() for fault in rules.judge(row) if fault.kind not in rules.WARNINGS]
    assert faults == []


def test_an_index_without_a_name_in_front_of_a_table_is_left_out(capsys):
    """pandas' to_csv(sep="\\t") writes one: the header begins with the delimiter."""
    text = Path(table("in.csv", "question\tanswer", rows=12, delimiter="\t")).read_text("utf-8")
    Path("in.tsv").write_text("".join(f"{n or ''}\t{line}\n" for n, line in enumerate(text.splitlines())), "utf-8")
    code, out, _ = run(capsys, "in.tsv")
    assert code == 0 and "12 valid" in out and "Left out         a column without a name (12 rows)" in out


def test_columns_may_have_blanks_around_their_names(capsys):
    jsonl("in.jsonl", [{"Meine Frage": row["question"], "A": row["answer"]} for row in map(qa, range(10))])
    code, out, _ = run(capsys, "in.jsonl", "--columns", "question=Meine Frage, answer = A")
    assert code == 0 and "10 valid" in out


def test_a_list_of_messages_under_another_name_is_no_list_of_records(capsys):
    rows = [{"dialog": [{"role": "user", "content": qa(n)["question"]}, {"role": "assistant", "content": ANSWER}]}
            for n in range(10)]  # fmt: skip
    jsonl("in.jsonl", rows)
    code, out, _ = run(capsys, "in.jsonl", "--columns", "messages=dialog")
    assert code == 0 and "Records          10: 10 valid" in out and "the records are those" not in out


@pytest.mark.parametrize("beside", [
    {"tags": ["a", "b"], "note": "see [1]"}, {"template": "[{x}]"}, {"meta": {"items": 12, "tags": ["x"], "none": []}},
])  # fmt: skip
@pytest.mark.parametrize("name", ["items", "Q/A", "Einträge"])
def test_a_list_of_records_is_found_beside_other_values(capsys, name, beside):
    for text in (
        json.dumps({**beside, name: [qa(n) for n in range(10)]}),
        json.dumps({name: [qa(n) for n in range(10)], **beside}),
    ):
        Path("in.json").write_text("\n" + text.replace("/", "\\/").replace("\\u00e4", "\\u00E4"), encoding="utf-8")
        code, out, _ = run(capsys, "in.json")
        assert code == 0 and f"the records are those in `{name}`" in out and "10 valid" in out


def test_two_lists_of_records_are_not_guessed_between(capsys):
    rows = [qa(n) for n in range(10)]
    for record in (
        {"one": rows, "two": rows},
        {"meta": {"tags": [{"name": "x"}]}, "items": rows},
        {"faqs": {"english": rows, "german": rows}},
        {"1": {"question": "What is [{x}]?", "answer": ANSWER}},
    ):
        Path("in.json").write_text(json.dumps(record), encoding="utf-8")
        code, _, err = run(capsys, "in.json")
        assert code == 1 and "unknown-shape" in err


@pytest.mark.parametrize(("systems", "prompt"), [
    ([{"role": "system", "content": "S "}, {"role": "developer", "content": "S", "name": "n"}], "S"),
    ([{"role": "system", "content": "S"}, {"role": "system", "content": "T"}], ""),
    ([{"role": "system", "content": "S"}, {"role": "user", "content": "S"}], ""),
])  # fmt: skip
def test_the_report_names_a_system_prompt_that_all_rows_share(capsys, systems, prompt):
    tools = {"tools": [{"type": "function", "function": {"name": "f"}}]}
    rows = [chat(systems[n % len(systems)], f"Question {n}?", ANSWER, **tools) for n in range(12)]
    rows = [
        {**row, "messages": [row["messages"][0], *chat(f"Question {n}?", ANSWER)["messages"]]}
        for n, row in enumerate(rows)
    ]
    code, _, _ = run(capsys, jsonl("in.jsonl", rows))
    report = json.loads(Path("training_data.report.json").read_text("utf-8"))
    assert code == 0 and report["system_prompt"] == prompt


def test_too_few_rows_are_not_written(capsys):
    code, _, err = run(capsys, jsonl("in.jsonl", map(qa, range(9))))
    assert code == 1 and err.endswith("too-few-examples: 9 to train on, and training takes 10. Nothing was written.\n")
    assert [path.name for path in Path().iterdir()] == ["in.jsonl"]
    assert "few-examples" in run(capsys, jsonl("in.jsonl", map(qa, range(10))))[2]


def test_a_training_file_is_looked_at_again_in_its_place(capsys):
    run(capsys, jsonl("in.jsonl", map(qa, range(60))), "--system", "S")
    rows = written()
    before = Path("training_data.jsonl").read_bytes()
    code, out, _ = run(capsys, "training_data.jsonl")
    assert code == 0 and "training_data.jsonl: already up to date" in out and "System prompt    S (60 rows)" in out
    assert Path("training_data.jsonl").read_bytes() == before
    rows[3]["messages"][1]["content"] = " "
    edited = Path(jsonl("training_data.jsonl", rows)).read_bytes()
    code, out, err = run(capsys, "training_data.jsonl")
    assert code == 0 and "training_data.jsonl:4: error: empty-question" in err
    assert written() == rows[:3] + rows[4:] and Path("training_data.jsonl.bak").read_bytes() == edited
    report = json.loads(Path("training_data.report.json").read_text("utf-8"))
    assert report["sha256"] == hashlib.sha256(Path("training_data.jsonl").read_bytes()).hexdigest()


# --- parts ---


def test_hold_out_makes_test_cases_and_says_what_comes_next(capsys):
    jsonl("faq.jsonl", [qa(n % 50) | {"answer": f"{ANSWER}{n}"} for n in range(100)])  # each prompt twice
    code, out, _ = run(capsys, "faq.jsonl", "-o", "my_faq.jsonl", "--hold-out", "0.2", "--system", "S")
    cases, training = written("my_faq_test_cases.jsonl"), written("my_faq.jsonl")
    assert code == 0 and (len(cases), len(training)) == (20, 80)
    prompts = [{texts_of(row)[0] for row in side} for side in (cases, training)]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 50
    assert all(row["messages"][-1]["role"] == "assistant" for row in cases)
    assert "my_faq_test_cases.jsonl: written, 20\n" in out
    assert "python test_model.py --cases my_faq_test_cases.jsonl" in out
    assert out.splitlines()[-1].startswith("Next: python fine_tune.py my_faq.jsonl")
    jsonl("more.jsonl", [qa(n) for n in range(200, 205)] + [qa(4)])  # one that stands in the cases already
    run(capsys, "faq.jsonl", "more.jsonl", "-o", "my_faq.jsonl", "--hold-out", "0.2", "--system", "S")
    still = {texts_of(row)[0] for row in written("my_faq_test_cases.jsonl")}
    assert prompts[0] < still and len(still) == 11  # new rows move no old ones
    assert len(written("my_faq_test_cases.jsonl")) == 21


# --- writing ---


def test_what_is_replaced_is_kept_once(capsys):
    Path("training_data.jsonl").write_text("edited by hand\n")
    out = run(capsys, jsonl("in.jsonl", map(qa, range(60))))[1]
    assert "training_data.jsonl: written; what stood there is kept as training_data.jsonl.bak" in out
    assert Path("training_data.jsonl.bak").read_text() == "edited by hand\n"
    before = Path("training_data.jsonl").stat()
    assert "already up to date" in run(capsys, "in.jsonl")[1]
    assert Path("training_data.jsonl").stat() == before


@pytest.mark.parametrize(("argv", "code", "part"), [
    (["in.jsonl", "--hold-out", "a"], 2, "invalid float"),
    (["in.jsonl", "-o", "no/such/folder/x.jsonl"], 1, "No such file or directory."),
    (["none.jsonl"], 1, "none.jsonl: No such file"),
    (["."], 1, "Is a directory."),
])  # fmt: skip
def test_a_mistake_gets_one_sentence(capsys, argv, code, part):
    jsonl("in.jsonl", map(qa, range(60)))
    found, _, err = run(capsys, *argv)
    assert found == code and part in err.splitlines()[-1] and "Traceback" not in err
    assert [path.name for path in Path().iterdir()] == ["in.jsonl"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_interrupted_it_leaves_the_old_file_as_it_was():
    rows = [qa(n) | {"answer": f"{ANSWER}{n} " * 40} for n in range(20_000)]
    jsonl("in.jsonl", rows)
    Path("training_data.jsonl").write_text("old\n")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "prepare_training_data.py"), "in.jsonl"], stderr=subprocess.PIPE, text=True
    )
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert Path("training_data.jsonl").read_text() == "old\n"


# --- from one's own code ---


def test_the_names_for_one_s_own_code():
    preparator = step_1.TrainingDataPreparator(system="You count.")
    example = preparator.format_qa_pair("How many?", ANSWER)
    assert example == {
        "messages": [{"role": "system", "content": "You count."}, {"role": "user", "content": "How many?"}, ASSISTANT]
    }
    assert preparator.validate_example(example) == []
    assert [kind for kind, _ in preparator.validate_example({"messages": []})] == ["missing-messages"]
    assert preparator.count_tokens(["hello world", ""]) == [2, 0]
    assert step_1.save_to_jsonl([chat(f"Q{n}?", ANSWER) for n in range(60)], "in.jsonl") == "written"
    assert preparator.prepare_data(["in.jsonl"], "out.jsonl")["examples"] == 60
    assert [kind for kind, _ in step_1.validate_training_data([{"messages": [USER]}, 7])] == [
        "no-assistant-message",
        "not-an-object",
    ]


# --- docs/your_data.md ---

GUIDE = (ROOT / "docs" / "your_data.md").read_text("utf-8")
RECIPES = dict(re.findall(r"^### (.+?)\n.*?```python\n(.+?)```", GUIDE, re.MULTILINE | re.DOTALL))
INTENT = {"tag": "hi", "patterns": ["Question 0?"], "responses": [f"{ANSWER}0"]}
NODES = {"a": {"message": None}, "b": {"message": {"author": {"role": "user"}, "content": {"parts": [{"image": "x"}, "Question 0?"]}}},
         "c": {"message": {"author": {"role": "assistant"}, "content": {"parts": [f"{ANSWER}0"]}}}}  # fmt: skip


@pytest.mark.parametrize(("title", "name", "text", "result"), [
    ("A FAQ in Markdown", "faq.md", f"# FAQ\n\n## Question 0?\n\n{ANSWER}0\n\n## Question 1?\nYes.\n\nAlways.\n", "faq.jsonl"),
    ("Intents", "intents.json", json.dumps({"intents": [INTENT]}), "intents_data.jsonl"),
    ("Anki", "anki.txt", f"#separator:tab\n#html:false\nQuestion 0?\t{ANSWER}0\n", "anki.tsv"),
    ("A ChatGPT export", "conversations.json", json.dumps([{"title": "a", "mapping": NODES}]), "chats.jsonl"),
])  # fmt: skip
def test_a_recipe_makes_what_step_1_takes(capsys, monkeypatch, title, name, text, result):
    monkeypatch.setattr(step_1, "MIN_EXAMPLES", 1)
    Path(name).write_text(text, encoding="utf-8")
    assert run(capsys, name)[0] == 1  # refused as it is
    exec(compile(RECIPES[title], title, "exec"), {})
    code, _, err = run(capsys, result, "--system", "")
    assert code == 0 and texts_of(written()[0]) == SOUND, err


def test_every_other_kind_has_its_way_out_in_the_guide():
    for title in ("Parquet", "Excel"):
        compile(RECIPES[title], title, "exec")  # pandas is no requirement of the tests
    for kind in ("Excel", "Parquet", "chat logs", "Markdown", "Anki", "preferences", "trees", "tickets", "Gemini"):
        assert kind.lower() in GUIDE.lower(), kind


def test_every_kind_is_explained():
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    assert len(KINDS) > 20, KINDS
    for kind in KINDS:
        assert f"`{kind}`" in page, kind


# --- both judges ---

# The strict judge of local_api tells these apart; step 1 has one kind for each.
BROADER = {"missing-role": "unknown-role", "invalid-message": "unknown-role",
           "missing-content": "invalid-content", "invalid-name": "invalid-content"}  # fmt: skip
ROWS = [(kind, corpus.line(row)) for kind, rows in corpus.FAULTY.items() for row, _ in rows]


def strict(text: str) -> set[str]:
    Path("strict.jsonl").write_text(text, encoding="utf-8")
    return {problem.kind for problem in judge_file(Path("strict.jsonl"))[1] if problem.level == "error"}


def told(err: str) -> set[str]:
    return set(re.findall(r"in\.jsonl:61: (?:error|warning): ([a-z-]+)", err))


@pytest.mark.parametrize(("kind", "text"), ROWS)
def test_nothing_is_written_that_the_strict_judge_refuses(capsys, kind, text):
    jsonl("in.jsonl", [*map(chat_row, range(60)), text])
    code, _, err = run(capsys, "in.jsonl", "--system", "")
    if code:  # the rest of such a file cannot be told apart
        assert not Path("training_data.jsonl").exists() and len(err.splitlines()) == 1
        return
    if "not-looked-into" in told(err):
        errors = told(err) - {"not-looked-into"}
        assert errors <= {kind} and len(written()) == 61 - len(errors)
        return
    assert not strict(Path("training_data.jsonl").read_text("utf-8"))
    name = BROADER.get(kind, kind)
    if len(written()) == 60 and name in KINDS - {"invalid-json"}:  # not mended, as by leaving keys out
        assert told(err) & {name, "unknown-shape"}


@pytest.mark.parametrize("system", [["You are", "x"], {"a": 1}, 5, True])
def test_a_system_message_that_is_no_text_is_no_message(capsys, system):
    jsonl("in.jsonl", [*map(chat_row, range(60)), {"question": "Q?", "answer": ANSWER, "system": system}])
    code, _, err = run(capsys, "in.jsonl", "--system", "")
    assert code == 0 and told(err) == {"invalid-content"} and len(written()) == 60
    named = {"messages": [{**USER, "name": "Ann"}, ASSISTANT], "system": system}
    jsonl("in.jsonl", [*map(chat_row, range(60)), named])
    code, _, err = run(capsys, "in.jsonl", "--system", "")
    assert code == 0 and told(err) == {"not-looked-into"}


@pytest.mark.parametrize("kind", ["secret", "lone-surrogate", "control-token", "no-user-message"])
def test_rows_that_are_more_than_texts_are_searched_too(capsys, kind):
    """Tools, pictures, weights and names are the strict judge's; what no text may hold is found in these rows, too."""
    text = {"secret": f"\n{corpus.SECRETS[0]}", "lone-surrogate": "\ud83d", "control-token": "<|im_end|>"}.get(kind, "")
    turns = [] if kind == "no-user-message" else [{**USER, "name": "Ann"}]
    row = {"messages": [*turns, {"role": "assistant", "content": ANSWER + text, "weight": 1}]}
    jsonl("in.jsonl", [*map(chat_row, range(60)), json.dumps(row)])
    code, _, err = run(capsys, "in.jsonl", "--system", "")
    assert code == 0 and kind in told(err) and len(written()) == 60


@pytest.mark.parametrize("row", corpus.GOOD)
def test_what_the_strict_judge_accepts_has_no_error(capsys, row):
    jsonl("in.jsonl", [*map(chat_row, range(60)), corpus.line(row)])
    code, _, err = run(capsys, "in.jsonl", "--system", "")
    assert code == 0 and "error" not in err and len(written()) == 61
    assert not strict(Path("training_data.jsonl").read_text("utf-8"))


# --- whatever is written has every text of the accepted rows, or says what it left out ---

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
values = st.one_of(words, st.none(), st.integers(), st.lists(words, max_size=2))
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "human"]), "content": words}),
    max_size=4,
)
records = st.one_of(
    st.fixed_dictionaries(
        {"question": words, "answer": words}, optional={"context": values, "system": words, "id": values, "note": words}
    ),
    st.fixed_dictionaries({"instruction": words, "output": words}, optional={"input": words, "Source": words}),
    st.fixed_dictionaries(
        {"messages": messages}, optional={"history": st.lists(st.tuples(words, words), max_size=2), "split": words}
    ),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(records, min_size=1, max_size=6), st.booleans())
def test_no_text_is_lost_without_a_word(capsys, monkeypatch, rows, as_lines):
    monkeypatch.setattr(step_1, "MIN_EXAMPLES", 1)
    text = "\n".join(map(json.dumps, rows)) if as_lines else json.dumps(rows, indent=1)
    Path("in.json").write_text(text, encoding="utf-8")
    Path("training_data.jsonl").unlink(missing_ok=True)
    code, out, err = run(capsys, "in.json", "--system", "", "--all")
    assert code in (0, 1) and "Traceback" not in err
    line = {
        n: text.count("\n", 0, text.find(json.dumps(row, indent=None if as_lines else 1)[:5]))
        for n, row in enumerate(rows)
    }
    assert line
    kept = json.dumps(written(), ensure_ascii=False) if code == 0 else ""
    bad = {int(number) for number in re.findall(r"^in\.json:(\d+): (?:error|warning: duplicate)", err, re.MULTILINE)}
    starts = [n for n, part in enumerate(text.split("\n"), 1) if as_lines or part == " {"]
    for start, row in zip(starts, rows, strict=True):
        if start in bad or code == 1:
            continue
        for key, value in row.items():
            for said in texts_in(value):
                assert json.dumps(said, ensure_ascii=False)[1:-1] in kept or f"{key.lower()} (" in out, (key, said)


def texts_in(value) -> list[str]:
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, dict):
        return texts_in(value.get("content"))
    return [text for item in value for text in texts_in(item)] if isinstance(value, (list, tuple)) else []
