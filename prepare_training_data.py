"""Step 1: make a training file of your questions and answers, and find its faults.

A fine-tuning API takes almost any file, and fails the job later with one terse line. This step
names each fault by file and line, says what training will cost, and writes what is sound.

Needs   JSON, JSON Lines or a table with a header (CSV, TSV). A record has one of these shapes:
            question, answer | prompt, completion | instruction, input, output (Alpaca)
            messages or conversations: lists of role and content, or from and value (ShareGPT)
        and may have a `system` message and a `history` of its own (docs/your_data.md).
Leaves  training_data.jsonl: one {"messages": [...]} a line; what it replaces is kept as .bak
        training_data.report.json: what was found in exactly these bytes; step 2 reads it
Omits   preference data (DPO); the inside of tool calls and images, which are passed on.

    python prepare_training_data.py                                # the tutorial's data
    python prepare_training_data.py my_faq.csv --system "You are ..." --hold-out 0.2
    python prepare_training_data.py --check training_data.jsonl    # judge it as an upload is
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

try:
    import tiktoken
    from dotenv import load_dotenv
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is missing: activate .venv, or pip install -r requirements.txt")

# --- What you edit. The model learns to answer under this message; ask it under the same one. ---
SYSTEM_PROMPT = (
    "You are the support assistant of TechFlow, a project and workflow tool for teams. You help "
    "customers with their account, billing, features and bugs. Be friendly, accurate and brief."
)
HERE = Path(__file__).resolve().parent
DEFAULT_INPUT = "examples/techflow_support/qa_pairs.json"
DEFAULT_OUTPUT, DEFAULT_MODEL = "training_data.jsonl", "gpt-4.1-mini-2025-04-14"
# USD per 1M training tokens, as last published: https://developers.openai.com/api/docs/pricing
PRICES_DATE = "2026-07"
PRICES = {"gpt-4.1-2025-04-14": 25.00, "gpt-4.1-mini-2025-04-14": 5.00}
PRICES |= {"gpt-4o-2024-08-06": 25.00, "gpt-4o-mini-2024-07-18": 3.00}
# https://developers.openai.com/api/docs/guides/supervised-fine-tuning
MIN_EXAMPLES, ADVISED_EXAMPLES = 10, 50
TOKEN_LIMIT, LOCAL_TOKEN_LIMIT = 65_536, 8_192  # of one example; the second for the local API
SHORT_ANSWER = 50  # characters


class Row:
    """A record on its way from a file to the training file; line 0: the file as a whole."""

    def __init__(self, file: str, line: int, record: Any = None):
        self.file, self.line, self.record = file, line, record
        self.example: dict = {}  # {"messages": [...]}: what is written
        self.texts: list[str] = []  # what each of its messages says
        self.system: str | None = None  # the first of them, if it is a system message
        self.prompt, self.tokens = "", 0  # the prompt in the form in which rows are compared
        self.left_out: list[str] = []  # keys that are not written
        self.faults: list[tuple[str, str]] = []  # (kind, sentence with the cure)

    def fault(self, kind: str, sentence: str) -> None:
        self.faults.append((kind, sentence))

    def is_sound(self) -> bool:
        return all(kind in WARNINGS for kind, _ in self.faults)


# --- Reading: from a file to its records ---

OTHER_FILES = {  # how they begin, and the way out; docs/your_data.md has recipes
    rb"PAR1": "this is Parquet: turn it into JSON Lines with pandas",
    rb"PK\x03\x04|\xd0\xcf\x11\xe0": "this is a workbook: save the sheet as CSV UTF-8",
    rb"\[?\d{1,4}[./-]\d\d?[./-]\d{2,4},? ": "this is a chat log: make a table of it",
    rb"#separator:": "this is an Anki export: put a header in place of its # lines",
    rb"#+ |[-*>] |\||\*\*|---|Q:|<|%PDF": "this is Markdown or another text: make a table of it",
}
# {"faqs": [...]}: an object with one list of records, after what is short
WRAPPED = re.compile(
    r'\s*{(?:\s*"\w+"\s*:\s*(?:"[^"]*"|[\w.]+)\s*,)*'
    r'\s*"(?!messages|conversations|prompt|completion|history|tools)\w+"\s*:\s*\[\s*(?={)'
)


def read(path: str, check: bool) -> Iterator[tuple[int, Any]]:
    """Yield (line, record) of a file; with `check`, it has to be as an upload is."""
    data = Path(path).read_bytes()
    for beginning, sentence in OTHER_FILES.items():
        if re.match(rb"[\s\xef\xbb\xbf\xe2\x80\x8e]*(?:" + beginning + rb")", data):
            sys.exit(f"{path}: {sentence} (docs/your_data.md).")
    is_utf_16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = data.decode("utf-16" if is_utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        sys.exit(f"{path}:{line}: this is not UTF-8: save it so (in Excel: CSV UTF-8).")
    if "\n" not in text:
        text = text.replace("\r", "\n")  # the line ends of old Macs
    start = re.search(r"\S", text)
    if not start:
        sys.exit(f"{path}: the file is empty: was it saved?")
    if check and start[0] != "{":
        sys.exit(f"{path}: an upload is JSON Lines: run this without --check to make it.")
    return read_json(path, text, check) if start[0] in "[{" else read_table(path, text)


def read_json(path: str, text: str, check: bool) -> Iterator[tuple[int, Any]]:
    """Go from object to object: of a list, one a line, or printed over many lines."""
    line, end, next_record, decoder = 1, 0, re.compile(r"[^\s,\[\]}]"), json.JSONDecoder()
    wrapped = None if check else WRAPPED.match(text)
    if wrapped:
        line, end = wrapped[0].count("\n") + 1, wrapped.end()
        print(f"{path}: the records are those in: {' '.join(wrapped[0].split())}", file=sys.stderr)
    while found := next_record.search(text, end):
        gap = text[end : found.start()]
        line += gap.count("\n")
        if wrapped and "]" in gap:
            return print(f"{path}:{line}: left out: {text[found.start() :][:60]}", file=sys.stderr)
        try:
            record, end = decoder.raw_decode(text, found.start())
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", line)
            sys.exit(f"{path}:{line}: error: invalid-json: {error}: mend it there, and run again.")
        lines = text.count("\n", found.start(), end)
        if check and (lines or gap.strip()):
            sys.exit(f"{path}:{line}: an upload has one record a line: run this without --check.")
        yield line, record
        line += lines


def read_table(path: str, text: str) -> Iterator[tuple[int, Any]]:
    """Go through a table: the delimiter is the one that its header shows."""
    header = text.lstrip().split("\n", 1)[0]
    delimiter = next((mark for mark in "\t;" if mark in header), ",")
    csv.field_size_limit(2**31 - 1)  # an answer may be longer than the module's 128 KB
    names: list[str] = []
    line, rows = 1, csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for fields in rows:
            if names and any(fields[len(names) :]):
                yield line, fields  # there are more of them than in the header
            elif names and any(map(str.strip, fields)):
                yield line, dict(zip(names, fields + [""] * len(names), strict=False))
            names, line = names or fields, rows.line_num + 1
    except csv.Error as error:
        cure = "close the quote that opens there; a quote inside a text is written twice"
        sys.exit(f"{path}:{line}: error: invalid-csv: {error}: {cure}.")


# --- Shapes: from a record to the messages of an example ---

SHAPES: list[tuple[str, ...]] = [("messages",), ("conversations",)]  # keys of a list of messages
SHAPES += [("question", "answer"), ("prompt", "completion"), ("instruction", "output")]  # of texts
ROLES = {"human": "user", "gpt": "assistant", "ai": "assistant", "model": "assistant"}
ROLES |= {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system"}
OTHER_NAMES = {"from": "role", "value": "content", "questions": "question", "answers": "answer"}
TOOL_KEYS = ("tools", "parallel_tool_calls")
MESSAGE_KEYS = ("role", "content", "name", "weight", "tool_calls", "tool_call_id")
CONTEXT = ("context", "input", "passage", "document", "documents", "background", "history")
OTHER_DATA = {  # a key of data that is something else, and the way out
    "chosen": "this is data for another method (DPO): keep the chosen answers",
    "preferred_output": "this is data for another method (DPO): keep the preferred answers",
    "label": "this is data for another method (KTO): keep the good rows, without `label`",
    "contents": "these are Gemini's `contents`: write them as `messages`",
    "patterns": "these are intents: write a row for each pattern",
    "intent": "these are intents: write the text as question and the intent as answer",
    "parent_id": "this is a tree of messages: write each way through it as `messages`",
    "mapping": "this is a ChatGPT export: write its conversations as `messages`",
    "subject": "these are tickets: write the request as question and the reply as answer",
    "role": "these are single messages: put those of a conversation into a list, `messages`",
}


def turns(asked: Any, answered: Any) -> list:
    """Return the messages of a question and its answer: texts, or lists of messages already."""
    question = asked if isinstance(asked, list) else [{"role": "user", "content": asked}]
    answer = [{"role": "assistant", "content": answered}]
    return question + (answered if isinstance(answered, list) else answer)


def to_example(row: Row, columns: dict[str, str], system: dict | None, check: bool) -> None:
    """Set row.example to what row.record stands for, or tell why it stands for nothing."""
    if isinstance(row.record, list):
        return row.fault("invalid-csv", "more fields than the header has: put the text in quotes")
    if not isinstance(row.record, dict):
        return row.fault("not-an-object", 'a record is {"question": "...", "answer": "..."}')
    names = [key.strip().lower() for key in row.record]
    names = [columns.get(name) or OTHER_NAMES.get(name, name) for name in names]
    record = dict(zip(names, row.record.values(), strict=True))
    shapes = [shape for shape in SHAPES if record.keys() >= {*shape}]
    is_kto = str(record.get("label")).lower() in ("true", "false")
    for name in names if is_kto or not shapes else ():
        if name in OTHER_DATA:
            return row.fault("unknown-shape", f"{OTHER_DATA[name]} (docs/your_data.md)")
    if not shapes:
        cure = "say which they are: --columns question=NAME,answer=NAME (docs/your_data.md)"
        return row.fault("unknown-shape", f"found {named(row.record)}: {cure}")
    if len(shapes) > 1 or len(record) < len(names):
        return row.fault("ambiguous-shape", f"found {named(row.record)}: keep what you mean")
    values, taken = [record[key] for key in shapes[0]], {*shapes[0], *TOOL_KEYS, "system"}
    if "instruction" in taken:  # Alpaca: an instruction and what it is about
        taken.add("input")
        values[0] = "\n\n".join(str(part) for part in (values[0], record.get("input")) if part)
    messages = turns(*values) if len(values) == 2 else values[0]
    if not messages or not isinstance(messages, list) or (check and "messages" not in row.record):
        return row.fault("missing-messages", "there is no list of `messages`: write one")
    if isinstance(record.get("history"), list):
        taken.add("history")
        for turn in reversed(record["history"]):  # a question with its answer, or a message
            messages = (turns(*turn) if isinstance(turn, list) else [turn]) + messages
    if record.get("system"):
        messages = [{"role": "system", "content": record["system"]}, *messages]
    row.left_out += [key for key in record if key not in taken and record[key] not in (None, "")]
    written = [to_message(row, message) for message in messages]
    if system and "system" not in [message.get("role") for message in written]:
        written.insert(0, system)
    row.example = {"messages": written}
    row.example |= {key: record[key] for key in TOOL_KEYS if record.get(key) is not None}
    lost = [key for key in row.left_out if key in CONTEXT]
    if check and row.left_out:
        row.fault("unknown-key", f"the API does not know {named(row.left_out)}: delete it")
    elif check and written != messages:
        row.fault("unknown-role", "the API has its own names of roles: run this without --check")
    elif lost:
        cure = "join it to the question if the answer needs it"
        row.fault("not-in-training", f"{named(lost)} is not in the training data: {cure}")


def to_message(row: Row, raw: Any) -> dict:
    """Return a message with the API's names for its keys and roles, and without other keys."""
    message = {}
    for key, value in raw.items() if isinstance(raw, dict) else ():
        name = OTHER_NAMES.get(key.lower(), key.lower())
        if name == "function_call" and value:
            row.fault("unknown-key", "this is the old form: write `tools` and `tool_calls`")
        elif name not in MESSAGE_KEYS or value is None:
            row.left_out.append(f"{key} of messages")
        else:
            message[name] = ROLES.get(str(value).lower(), str(value)) if name == "role" else value
    return message


# --- Rules: the kind, what finds the fault, the cure ---

WARNINGS = {"last-not-assistant", "short-answer", "placeholder-answer", "html", "mojibake"}
WARNINGS |= {"not-in-training", "tutorial-prompt", "common-mark", "few-examples"}
WARNINGS |= {
    "duplicate",
    "conflicting-answer",
    "differing-system",
    "held-out",
}  # other kinds are errors
NO_ANSWERS = {"nan", "none", "null", "#n/a", "n/a", "tbd", "todo"}
MESSAGE_RULES: list[tuple] = [  # m: a message; the first fault is told
    ("missing-role", lambda m: not m.get("role"), "a message has a `role` and `content`"),
    ("unknown-role", lambda m: m["role"] not in ROLES.values(), "a role is user or assistant"),
    ("missing-content", lambda m: not m.keys() & {"content", "tool_calls"}, "`content` is missing"),
    ("invalid-content", lambda m: not isinstance(m.get("content", ""), str | list), "write a text"),
    ("invalid-name", lambda m: not isinstance(m.get("name", ""), str), "`name` must be text"),
    ("invalid-weight", lambda m: repr(m.get("weight", 1)) not in "01", "`weight` is 0 or 1"),
    ("invalid-weight", lambda m: "weight" in m and m["role"] != "assistant", "it is for answers"),
    ("empty-question", lambda m: m["role"] == "user" and is_blank(m), "ask, or delete the row"),
    ("empty-answer", lambda m: m["role"] == "assistant" and is_blank(m), "write it, or delete it"),
]
ROW_RULES: list[tuple] = [  # by the roles in a row and the answers that are trained on
    ("no-user-message", lambda roles, _: "user" not in roles, "add the question that is answered"),
    ("no-assistant-message", lambda roles, _: "assistant" not in roles, "add the answer to learn"),
    ("nothing-trained", lambda _, answers: not answers, "every answer has weight 0: take one off"),
    ("last-not-assistant", lambda roles, _: roles[-1] != "assistant", "the end teaches nothing"),
    ("placeholder-answer", lambda _, answers: NO_ANSWERS & {*answers}, "it stands for no answer"),
    ("short-answer", lambda _, said: min(map(len, said)) < SHORT_ANSWER, "as brief it will be"),
]
HTML = r"&(?:amp|[lg]t|quot|nbsp|#\d+);|</?(?:p|br|div|span|b|i|em|ul|li|a)(?: [^<>]*=[^<>]*)?/?>"
SECRET = r"-----BEGIN [A-Z ]*PRIVATE KEY|\bsk-(?=[\w-]*\d)[\w-]{20}|A[KS]IA[A-Z0-9]{16}"
SECRET += r"|gh[pousr]_\w{36}|github_pat_\w{22}|glpat-[\w-]{20}|hf_\w{30}|xox[abeprs]-[\w-]{10}"
SECRET += r"|[rs]k_(?:live|test)_\w{16}|npm_\w{36}|pypi-[\w-]{50}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\."
SECRET += r"|AIza[\w-]{35}"
TEXT_RULES = [  # what a faulty text has in it (looked for first: that is fast), the fault's form
    ("control-token", "<|", r"<\|(?:(?:start|end)of\w+|fim_\w+|im_\w+)\|>", "the API rejects {}"),
    ("secret", "BEGIN sk- IA AI gh glpat- hf_ xox k_ npm_ pypi- eyJ", SECRET, "take out {}..."),
    ("blank-run", " ", r"\s{100000}", "100,000 blanks in a row break tokenizers: delete them"),
    ("lone-surrogate", "", "[\ud800-\udfff]", "there is half a character: delete it"),
    ("html", "& <", HTML, "the model will write {} too: take it out"),
    ("mojibake", "â Ã Â \ufffd", "â€.|[ÃÂ][\x80-\xbf]|\ufffd", "{} was read in a wrong encoding"),
]


def named(values: Iterable) -> str:
    return ", ".join(sorted({f"`{str(value)[:40]}`" for value in values if value}))


def said(message: dict) -> str:
    """Return what a message says: its text, the texts of its parts, the functions it calls."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "\n".join(str(part.get("text", "[image]")) for part in content)
    if "tool_calls" in message:
        content += json.dumps(message["tool_calls"], ensure_ascii=False)
    return content


def is_blank(message: dict) -> bool:
    return not said(message).strip()


def judge(row: Row) -> None:
    """Tell the faults that a row has by itself."""
    messages = row.example.get("messages", [])
    for message in messages:
        for kind, find, cure in MESSAGE_RULES:
            if find(message):
                row.fault(kind, cure)
                break
    if not messages or not row.is_sound():
        return
    row.texts = [said(message) for message in messages]
    text, roles = "\n".join(row.texts), [message["role"] for message in messages]
    row.system = row.texts[0] if roles[0] == "system" else None
    trained = [m for m in messages if m["role"] == "assistant" and m.get("weight") != 0]
    answers = [said(message).strip().lower() for message in trained]
    for kind, find, cure in ROW_RULES:
        if row.is_sound() and find(roles, answers):
            row.fault(kind, cure)
    for kind, marks, pattern, cure in TEXT_RULES:
        if any(mark in text for mark in marks.split(" ")) and (found := re.search(pattern, text)):
            row.fault(kind, cure.format(repr(found[0][:20])))


# --- Rows together ---

OLD_MARKS = re.compile(r"^\s+"), re.compile(r"\s*(?:#+|[-=]+>|END|STOP)\s*$|\s+$")


def plain(texts: Iterable[str]) -> str:
    """Return texts as they are compared: without case, and without blanks around them."""
    return "\0".join(text.strip().casefold() for text in texts)


def read_cases(path: Path) -> dict[str, str]:
    """Return {prompt: id} of a file of test cases, if there is one."""
    document = json.loads(path.read_text("utf-8")) if path.exists() else {}
    asked = {}
    for case in document.get("cases", []) if isinstance(document, dict) else []:
        turns = [*case.get("history", []), {"content": case["question"]}]
        asked[plain(map(said, turns))] = case["id"]
    return asked


def compare(rows: list[Row], cases: dict[str, str], check: bool) -> list[Row]:
    """Tell what rows say against each other; return them without those that are repeated."""
    seen: dict[str, Row] = {}
    kept = []
    for row in rows:
        roles = [message["role"] for message in row.example["messages"]]
        last = len(roles) - 1 - roles[::-1].index("assistant")
        row.prompt = plain(row.texts[roles.count("system") : last])
        same = seen.setdefault(plain(row.texts), row)
        first = seen.setdefault(plain(row.texts[:last]), row)
        if row.prompt in cases:
            row.fault("held-out", f"test case {cases[row.prompt]}, which must be new to the model")
        if same is not row and same.example == row.example and not check:
            row.fault("duplicate", f"the same as {same.file}:{same.line}: left out")
            continue
        if same is not row:
            row.fault("duplicate", f"the same as {same.file}:{same.line}: keep one")
        elif first is not row:
            row.fault("conflicting-answer", f"{first.file}:{first.line} answers this otherwise")
        kept.append(row)
    return kept


def judge_whole(whole: Row, rows: list[Row]) -> None:
    """Tell the faults of the training file as a whole."""
    if 0 < len(rows) < MIN_EXAMPLES:
        whole.fault("too-few-examples", f"{len(rows)} examples: training takes {MIN_EXAMPLES}")
    elif len(rows) < ADVISED_EXAMPLES:
        whole.fault("few-examples", f"{len(rows)} examples: {ADVISED_EXAMPLES} or more are better")
    if len({row.system for row in rows}) > 1:
        whole.fault("differing-system", "there are several system messages: is that meant?")
    for name, at in ("prompt", -2), ("answer", -1):
        texts = {row.texts[at] for row in rows if len(row.texts) > 1}
        for mark in OLD_MARKS:
            found = {match[0] if match else "" for match in map(mark.search, texts)}
            if len(found) == 1 < len(texts) and any(found):
                what = f"each {name} has {found.pop()!r}"
                whole.fault("common-mark", f"{what}: chat needs no such mark, take it out")


def share_of(prompts: Iterable[str], share: float) -> set[str]:
    """Return a share of them, evenly spread; what is added at the end moves none of them."""
    return {p for n, p in enumerate(prompts) if int((n + 1) * share) > int(n * share)}


def auto_epochs(examples: int) -> int:
    """Return the epochs that `auto` chooses: 3, but 1 to 25 for 100 to 25,000 examples in all.

    Source: openai/openai-cookbook, examples/Chat_finetuning_data_prep.ipynb
    """
    if examples * 3 < 100:
        return min(25, 100 // max(1, examples))
    return 3 if examples * 3 <= 25_000 else max(1, 25_000 // examples)


# --- Telling and writing ---


def tell(rows: list[Row], show_all: bool) -> None:
    """Print each fault; of one kind in more than three rows only the first, with the count."""
    groups: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for row in rows:
        for kind, sentence in row.faults:
            groups.setdefault((row.file, kind), []).append((row.line, sentence))
    for (file, kind), found in groups.items():
        level, more = "warning" if kind in WARNINGS else "error", ""
        if len(found) > 3 and not show_all:
            more = f" ({len(found):,} rows: lines {', '.join(str(n) for n, _ in found[:3])}, ...)"
        for line, sentence in found[:1] if more else found:
            place = f"{file}:{line}" if line else file
            print(f"{place}: {level}: {kind}: {sentence}{more}", file=sys.stderr)


def save_to_jsonl(examples: Iterable[dict], path: str | Path) -> str:
    """Write a file whole or not at all; return what became of it and of the one before it."""
    target, outcome = Path(path).resolve(), "written"
    data = "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples).encode()
    if target.exists() and target.read_bytes() == data:
        return "already up to date"
    if target.exists():
        shutil.copy2(target, f"{target}.bak")
        outcome = f"written; what stood there is kept as {target.name}.bak"
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, target)
    return outcome


# --- The step ---

END = "<|endoftext|>"  # parts the texts of a row, which are encoded together


class TrainingDataPreparator:
    """Makes a training file for one base model, under one system message."""

    def __init__(self, model: str = "", system: str | None = None, columns: dict | None = None):
        load_dotenv()
        self.model = model or os.environ.get("FINE_TUNE_MODEL") or DEFAULT_MODEL
        self.columns = columns or {}  # {name in the data: name of a shape}
        self.prompt, self.whose = SYSTEM_PROMPT, "SYSTEM_PROMPT of this script"
        if system is not None:
            self.prompt, self.whose = system, f"yours: {system[:60]}"
        elif "TechFlow" in SYSTEM_PROMPT:
            self.whose = 'TechFlow\'s, of this tutorial (--system "..." for yours)'
        self.system = {"role": "system", "content": self.prompt} if self.prompt else None
        if folder := os.environ.get("TIKTOKEN_CACHE_DIR"):  # .env names it relative to this script
            os.environ["TIKTOKEN_CACHE_DIR"] = str(HERE / folder)
        name, self.counted = "o200k_base", "approximate"  # local models have other tokenizers
        if self.model in PRICES:
            name, self.counted = tiktoken.encoding_name_for_model(self.model), "exact"
        try:
            self.encoding: Any = tiktoken.get_encoding(name)
        except (OSError, ValueError):  # the vocabulary is not here and cannot be downloaded
            self.encoding, self.counted = None, "estimated"

    def format_qa_pair(self, question: str, answer: str) -> dict:
        """Return the example of a question and its answer."""
        messages = turns(question, answer)
        return {"messages": [self.system, *messages] if self.system else messages}

    def validate_example(self, example: dict) -> list[tuple[str, str]]:
        """Return the (kind, sentence) of each fault of an example, judged as an upload is."""
        return validate_training_data([example])

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Return the tokens of each text; one with ENDs in it is that of several texts."""
        if self.encoding is None:
            return [len(text.encode()) // 4 for text in texts]
        return [*map(len, self.encoding.encode_batch(texts, allowed_special={END}))]

    def prepare_data(self, inputs: list[str], output: str = DEFAULT_OUTPUT, **options) -> dict:
        """Read, judge, compare, count, tell and write; return what the report file holds.

        The options are those of the command line: check, hold_out, validation_split, all.
        """
        check, target, whole = options.get("check", False), Path(output), Row(output, 0)
        columns, system = ({}, None) if check else (self.columns, self.system)
        rows = [Row(path, *found) for path in inputs for found in read(path, check)]
        for row in rows:
            to_example(row, columns, system, check)
            judge(row)
        cases = read_cases(Path(inputs[0]).with_name("test_cases.json"))
        kept = compare([row for row in rows if row.is_sound()], cases, check)
        limit = TOKEN_LIMIT if self.counted == "exact" else LOCAL_TOKEN_LIMIT
        for start in range(0, len(kept), 1000):
            batch = kept[start : start + 1000]
            counts = self.count_tokens([END.join(row.texts) for row in batch])
            for row, count in zip(batch, counts, strict=True):
                row.tokens = count + 3 * len(row.texts) + 4  # 3 for a row, 4 for each message
                if row.tokens > limit:
                    row.fault("too-many-tokens", f"{row.tokens:,}; {limit:,} are read: shorten it")
        kept = [row for row in kept if row.is_sound()]
        prompts = dict.fromkeys(row.prompt for row in kept)  # rows with one prompt stay together
        tests = share_of(prompts, options.get("hold_out", 0))
        rest = [prompt for prompt in prompts if prompt not in tests]
        others = share_of(
            rest, options.get("validation_split", 0) * len(prompts) / max(1, len(rest))
        )
        training = [row for row in kept if row.prompt not in tests | others]
        judge_whole(whole, training)
        given = sum(row.example["messages"][0] is self.system for row in training)
        if given and "tutorial" in self.whose and "techflow_support" not in inputs[0]:
            cure = "and whose assistant your model will be: give it yours"
            whole.fault("tutorial-prompt", f"the system prompt is {self.whose}, {cure}")
        tell([*rows, whole], options.get("all", False))
        if not check and (not training or not whole.is_sound()):
            sys.exit(
                f"Nothing was written: {len(training)} of {MIN_EXAMPLES} sound examples are there."
            )

        outcome = "judged" if check else save_to_jsonl([row.example for row in training], target)
        report = self.report(target, [*rows, whole], training, given)
        print(f"{target}: {outcome}")
        if check and report["errors"]:
            sys.exit(f"{target} cannot be uploaded as it is: mend the errors above.")
        stem = "" if output == DEFAULT_OUTPUT else f"{target.stem}_"
        for name, own in {"test_cases": tests, "validation_data": others}.items():
            path = target.with_name(f"{stem}{name}.jsonl")
            part = [row.example for row in kept if row.prompt in own]
            if part:
                print(f"{path}: {save_to_jsonl(part, path)}")
        if tests:
            print(f"With the model: python test_model.py --cases {stem}test_cases.jsonl")
        print("Next: python fine_tune.py", *([] if output == DEFAULT_OUTPUT else [output]))
        return report

    def report(self, target: Path, rows: list[Row], training: list[Row], given: int) -> dict:
        """Print what was found, and write what step 2 has to know of exactly these bytes."""
        server = os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        price = PRICES.get(self.model) if "api.openai.com" in server else None
        if re.match(r"https?://(localhost|127\.|\[::1\])", server):
            price = 0.0  # the local API
        tokens, epochs = sum(row.tokens for row in training), auto_epochs(len(training))
        cost = None if price is None else round(tokens * epochs * price / 1e6, 4)
        warnings = sum(kind in WARNINGS for row in rows for kind, _ in row.faults)
        errors = sum(len(row.faults) for row in rows) - warnings
        systems = {row.system for row in training}
        report: dict = {"file": str(target), "sha256": ""}
        report |= {"model": self.model, "examples": len(training), "tokens": tokens}
        report |= {"counted": self.counted, "epochs": epochs, "price_per_million_tokens": price}
        report |= {"estimated_cost": cost, "errors": errors, "warnings": warnings}
        report["sha256"] = hashlib.sha256(target.read_bytes()).hexdigest()
        report["system_prompt"] = systems.pop() if len(systems) == 1 else None
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        target.with_suffix(".report.json").write_text(text, "utf-8")

        bad, records = sum(not row.is_sound() for row in rows if row.line), len(rows) - 1
        messages = [message for row in training for message in row.example["messages"]]
        unseen = sum("tool_calls" in m or isinstance(m["content"], list) for m in messages)
        whose = f"{self.whose}, in {given:,} rows" if given else "the rows' own, or none"
        free = "no price is known" if price is None else "free, on the local API"
        print(f"Records          {records:,}: {records - bad:,} valid, {bad:,} invalid")
        for key, times in Counter(
            key for row in rows for key in dict.fromkeys(row.left_out)
        ).items():
            print(f"Left out         {key} ({times:,} rows)")
        if unseen:
            judge_them = f"python -m local_api --check {target}"
            print(f"Not looked at    {unseen:,} messages with tool calls or images: {judge_them}")
        print(f"System prompt    {whose}")
        print(f"Examples         {len(training):,}")
        print(f"Tokens           {tokens:,} ({self.counted})")
        print(f"  billed         {tokens * epochs:,} ({epochs} epochs, as `auto` chooses)")
        print(f"Estimated cost   {f'${cost:,.2f} (prices of {PRICES_DATE})' if price else free}")
        print(f"Problems         errors {errors:,}, warnings {warnings:,}")
        return report


def validate_training_data(examples: list[dict]) -> list[tuple[str, str]]:
    """Return the (kind, sentence) of each fault of examples, judged as an upload is."""
    rows = [Row("examples", number, example) for number, example in enumerate(examples, 1)]
    for row in rows:
        to_example(row, {}, None, check=True)
        judge(row)
    return [fault for row in rows for fault in row.faults]


# --- The command line ---


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make a training file of questions and answers.")
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="JSON, JSON Lines, CSV (default: TechFlow's)")
    add("-o", "--output", default=DEFAULT_OUTPUT, metavar="FILE", help="default: %(default)s")
    add("--check", action="store_true", help="judge INPUT as an upload is; write its report alone")
    add("--system", metavar="TEXT", help="system message of the rows that have none")
    add("--columns", default="", metavar="question=NAME,answer=NAME", help="other names of keys")
    add("--model", help=f"base model (default: FINE_TUNE_MODEL, else {DEFAULT_MODEL})")
    add("--hold-out", type=float, default=0, metavar="F", help="share for test cases, say 0.2")
    add("--validation-split", type=float, default=0, metavar="F", help="share for validation")
    add("--all", action="store_true", help="print each fault of each row")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_intermixed_args(argv)
    pairs = [pair.lower().split("=") for pair in args.columns.split(",") if pair]
    if any(len(pair) != 2 for pair in pairs) or not 0 <= args.hold_out + args.validation_split < 1:
        parser.error("--columns is question=NAME,answer=NAME; a share is between 0 and 1")
    tutorial = DEFAULT_INPUT if Path(DEFAULT_INPUT).exists() else str(HERE / DEFAULT_INPUT)
    inputs = args.inputs or [args.output if args.check else tutorial]
    if args.output in inputs and not args.check:
        parser.error(f"{args.output} would be overwritten: name another with -o, or --check it")
    shares = {"hold_out": args.hold_out, "validation_split": args.validation_split}
    try:
        step = TrainingDataPreparator(args.model, args.system, {own: name for name, own in pairs})
        output = inputs[0] if args.check else args.output
        step.prepare_data(inputs, output, check=args.check, all=args.all, **shares)
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}.")
    except KeyboardInterrupt:
        print("\nInterrupted: no file is half written. Run it again.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
