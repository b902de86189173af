"""Step 1: make a training file of questions and answers, and find every fault before the upload does.

A fine-tuning API takes almost any file at upload and fails the job later with one terse line. This script names every
fault by file and line, tells what the training will cost, and writes only what can be trained on.

It reads JSON arrays, JSON Lines and CSV with a header. A record has one of three shapes:
    {"question": "...", "answer": "..."}        {"prompt": "...", "completion": "..."}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], "tools": [...]}
and may carry an `id` and a `category`, which are not written. SYSTEM_PROMPT is put in front where no system message is.

It leaves training_data.jsonl, one {"messages": [...]} a line; a file that stood there and differs is kept as .bak.
Problems go to stderr as FILE:LINE: error: kind: sentence. docs/troubleshooting.md says more of each kind.
Left out: preference data (DPO), duplicates in other words, personal data such as names and addresses.

    python prepare_training_data.py                                  # the tutorial's step
    python prepare_training_data.py faq.csv more.json -o my_data.jsonl --system "You are ..."
    python prepare_training_data.py --check training_data.jsonl      # judge a file, write nothing

Exit codes: 0 written, or --check found no error; 1 --check or --strict found errors, or the file as a whole cannot be
trained on; 2 usage, a file that is missing or not UTF-8; 130 interrupted.
"""

from __future__ import annotations  # so that an older Python gets as far as a sentence

import argparse
import csv
import filecmp
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import sys
import threading
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO
from urllib.parse import urlsplit

# The model learns to answer under this message; it has to be asked under the same one (step 4 sees to it).
SYSTEM_PROMPT = (
    "You are the support assistant of TechFlow, a project and workflow tool for teams. "
    "You help customers with their account, billing, features and bugs. Be friendly, accurate and brief."
)
HERE = Path(__file__).resolve().parent
DEFAULT_INPUT = os.path.join("examples", "techflow_support", "qa_pairs.json")
DEFAULT_OUTPUT, DEFAULT_VALIDATION_OUTPUT = "training_data.jsonl", "validation_data.jsonl"
DEFAULT_MODEL = "gpt-4.1-mini-2025-04-14"

# USD per 1M training tokens, as last published: https://developers.openai.com/api/docs/pricing has shown none since.
PRICES_DATE = "2026-07"
PRICES = {
    "gpt-4.1-2025-04-14": 25.00,
    "gpt-4.1-mini-2025-04-14": 5.00,
    "gpt-4o-2024-08-06": 25.00,
    "gpt-4o-mini-2024-07-18": 3.00,
}
# https://developers.openai.com/api/docs/guides/supervised-fine-tuning, and fine-tuning-best-practices
MIN_EXAMPLES, ADVISED_EXAMPLES, MAX_FILE_BYTES = 10, 50, 512 * 1024 * 1024
TOKEN_LIMIT = 65_536  # of one example
LOCAL_MODELS = {"smollm2-135m-instruct": 8_192}  # base models of the local API, with their own token limits
SHORT_ANSWER = 50  # characters
END_OF_TEXT = "<|endoftext|>"
MAX_BLANKS = 100_000  # in a row: tiktoken panics at about a million (openai/tiktoken issue 15)

# What the chat format adds to the texts: openai/openai-cookbook, How_to_count_tokens_with_tiktoken.ipynb.
MESSAGE_TOKENS, NAME_TOKENS, PRIMING_TOKENS = 3 + 1, 1, 3  # a message's 3 and its role, one token in every encoding
IMAGE_TOKENS = 85  # at low detail; at high detail it depends on the image, which is not looked at
LOADING_SECONDS = 20  # for a vocabulary: tiktoken itself would wait for a download for ever
BLOCK_ROWS = 200  # that a thread judges at a time: enough that threads seldom wait for each other,
BLOCK_BYTES = 1_000_000  # or fewer where rows are long: some blocks are in memory at once
JOINED_CHARS = 1_000_000  # that are encoded in one call; each token takes 36 bytes of memory
CHUNK_CHARS = 1 << 16  # of a JSON array that are read at a time

JSON_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
JSON_SPACE = re.compile(r"[ \t\r\n]*")
# The API rejects all of these; o200k_base alone would let the fim and im tokens pass.
CONTROL_TOKEN = re.compile(
    r"<\|(?:(?:start|end)of(?:text|prompt)|fim_(?:prefix|middle|suffix)|im_(?:start|end|sep))\|>"
)
SECRETS = (  # what it is, a text that each has (looked for first: that is ten times faster), the pattern
    ("a private key", "-----BEGIN", r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY[\s\S]*"),
    ("an API key", "sk-", r"(?<![A-Za-z0-9])sk-(?=[A-Za-z_-]{0,99}\d)[A-Za-z0-9_-]{20,}"),
    ("an AWS access key", "IA", r"A[KS]IA[A-Z0-9]{16}"),
    ("a GitHub token", "gh", r"gh[pousr]_[A-Za-z0-9]{36,}"),
    ("a GitHub token", "github_pat_", r"github_pat_[A-Za-z0-9_]{22,}"),
    ("a GitLab token", "glpat-", r"glpat-[A-Za-z0-9_-]{20,}"),
    ("a Google API key", "AIza", r"AIza[A-Za-z0-9_-]{35}"),
    ("a Hugging Face token", "hf_", r"hf_[A-Za-z0-9]{30,}"),
    ("a Slack token", "xox", r"xox[abeprs]-[A-Za-z0-9-]{10,}"),
    ("a Stripe key", "k_", r"[rs]k_(?:live|test)_[A-Za-z0-9]{16,}"),
    ("an npm token", "npm_", r"npm_[A-Za-z0-9]{36}"),
    ("a PyPI token", "pypi-", r"pypi-[A-Za-z0-9_-]{50,}"),
    ("a JSON Web Token", "eyJ", r"eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"),
)
ANY_SECRET = re.compile("|".join(pattern for _, _, pattern in SECRETS))
# Each secret, also a new one, has to have one of these; few other texts do, and a rare character in front rules them
# out quickly.
MARKS = (r"_[A-Za-z0-9]{16}", r"-(?!-{9})[\w-]{19}", r"A[\w-]{19}", r"eyJ[\w-]{8}", "xox", "-----BEGIN")
MAY_BE_SECRET = [re.compile(mark).search for mark in MARKS]


class StepError(Exception):
    """One sentence for the reader, and the exit code that goes with it."""

    def __init__(self, sentence: str, exit_code: int = 2):
        super().__init__(sentence)
        self.exit_code = exit_code


class Problem(NamedTuple):
    """A fault and where it stands; `line` counts from 1 and is None for a fault of the file as a whole."""

    file: str
    line: int | None
    level: str  # "error": cannot be trained on, or "warning"
    kind: str
    message: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.level}: {self.kind}: {self.message}"


class Fault(NamedTuple):
    """What is wrong with a record. It stands in the place of one that cannot be read; `text` is how that one reads."""

    kind: str
    message: str
    text: str = ""


# --- reading: (line, record) for each record, a Fault in its place if it cannot be read ---


def read_records(path: str, check: bool = False) -> Iterator[tuple[int | None, Any]]:
    """Yield the records of a file: CSV by its name, a JSON array by its first character, else JSON Lines.

    With `check` it can only be JSON Lines, as for the upload. Raises StepError for a file that is not UTF-8.
    """
    with open(path, "rb") as binary, io.TextIOWrapper(binary, "utf-8-sig", newline="\n") as file:
        skipped = 0  # blank lines before what the first look at the file shows
        # Editors put a byte order mark before the text.
        while not (start := binary.peek().removeprefix(b"\xef\xbb\xbf").lstrip()) and (blank := binary.read1()):
            skipped += blank.count(b"\n")
        read = read_csv if path.lower().endswith(".csv") and not check else read_json_lines
        try:
            if not start:
                yield None, Fault("broken-file", "the file is empty; see whether it was saved")
            elif check and start.startswith(b"["):
                yield 1, Fault("broken-file", "this is an array, the upload takes JSON Lines; run without --check")
            else:
                for line, record in (read_json_array if start.startswith(b"[") else read)(file):
                    yield skipped + line, record
        except UnicodeDecodeError as error:
            with open(path if os.path.isfile(path) else os.devnull, "rb") as lines:  # a pipe cannot be read again
                bad = (n for n, line in enumerate(lines, 1) if line.decode(errors="ignore").encode() != line)
                place = next((f"{path}:{n}" for n in bad), path)
            byte = error.object[error.start]
            cure = "export the sheet as CSV" if start.startswith(b"PK") else "save the file as UTF-8"  # PK: a workbook
            raise StepError(f"{place}: byte 0x{byte:02x} is not UTF-8; {cure}.") from None


def unique_keys(pairs: list) -> dict:
    record = dict(pairs)
    if len(record) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise KeyError(f"the key {named([key])} stands twice; keep one")  # readers take the last without a word
    return record


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)


def decode_json(text: str, start: int) -> tuple[Any, int]:
    """Return the value that starts there, or a Fault in its place, and where it ends. JSONDecodeError: it is none."""
    try:
        try:
            return DECODER.raw_decode(text, start)
        except KeyError as error:
            end = json.JSONDecoder().raw_decode(text, start)[1]
            return Fault("duplicate-key", error.args[0], text[start:end]), end
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError):
        raise json.JSONDecodeError("Nested too deeply, or a number of too many digits", text, start) from None


def read_json_lines(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        text = line.strip(" \t\r\n")
        if text:
            try:
                record, end = decode_json(text, 0)
                if end < len(text):
                    raise json.JSONDecodeError("More text after the object", text, end)
            except json.JSONDecodeError as error:
                why = f"{error.msg} at column {error.colno}; a line must be one JSON object"
                record = Fault("invalid-json", why, text)
            yield number, record


def read_json_array(file: TextIO) -> Iterator[tuple[int, Any]]:
    """Yield (line, element) with no more than an element and a chunk in memory. A syntax error ends it."""
    may_follow = {"": "[", "[": "]", "value": ",]", ",": "", "]": ""}
    text, at, line, last, more = "", 0, 1, "", True  # last: what was read last, a mark or a value
    while True:
        gap = JSON_SPACE.match(text, at)
        start = gap.end() if gap else at
        line, at = line + text.count("\n", at, start), start
        mark = text[at : at + 1]
        try:
            if mark and mark in may_follow[last]:
                end, last = at + 1, mark
            elif last in ("[", ","):
                value, end = decode_json(text, at)
                if more and end + 16 > len(text):  # a number may go on in the next chunk
                    raise json.JSONDecodeError("Expecting more", text, end)
                yield line, value
                last = "value"
            elif last == "]" and not mark and not more:
                return
            else:
                raise json.JSONDecodeError(f"Expecting {' or '.join(may_follow[last]) or 'the end'}", text, at)
            line, at = line + text.count("\n", at, end), end
        except json.JSONDecodeError as error:
            if not more or (error.pos + 16 < len(text) and "Unterminated" not in error.msg):
                why = f"{error.msg}; mend it here, the rest of the file was not read"
                yield line + text.count("\n", at, error.pos), Fault("broken-file", why)
                return
            chunk = file.read(max(CHUNK_CHARS, len(text)))  # as much again: a long value is not parsed for each chunk
            text, at, more = text[at:] + chunk, 0, bool(chunk)


def read_csv(file: TextIO) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)  # an answer may be longer than the module's 128 KB
    rows = csv.reader(file, strict=True)
    header: list[str] = []
    while True:
        line = rows.line_num + 1
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, Fault("invalid-csv", f"{error}; put the field in quotes, and write a quote inside it twice")
            continue
        if fields and not header:
            header, names = fields, [name for name in fields if name]
            if len(set(names)) < len(names) or (len(header) == 1 and re.search(r"[;\t]", header[0])):
                cure = "each column needs a name of its own, and commas between them, not semicolons or tabs"
                yield line, Fault("broken-file", f"{cure}: {named(names)}")
                return
        elif fields and len(fields) == len(header):
            yield line, {name: value for name, value in zip(header, fields, strict=True) if name}
        elif fields:
            why = f"{len(fields)} fields where the header has {len(header)}; put fields with commas in quotes"
            yield line, Fault("invalid-csv", why, render(fields))


# --- from a record to an example ---

SHAPES: tuple[tuple[str, ...], ...] = (("messages",), ("question", "answer"), ("prompt", "completion"))
NOT_WRITTEN = ("id", "category")


def to_example(record: Any, system: dict | None, check: bool) -> dict | Fault:
    """Return the training example that a record of one of the three shapes stands for, or the Fault that it has."""
    if isinstance(record, Fault):
        return record
    if not isinstance(record, dict):
        return Fault("not-an-object", 'a record must be an object, such as {"question": "...", "answer": "..."}')
    if not check:
        shapes = [shape for shape in SHAPES if all(key in record for key in shape)]
        if not shapes:
            wanted = "question and answer, prompt and completion, or messages"
            return Fault("unknown-shape", f"found {named(record) or 'no keys'}; a record needs {wanted}, in lower case")
        if len(shapes) > 1:
            return Fault("ambiguous-shape", f"found {' as well as '.join(map(' and '.join, shapes))}; keep one of them")
        if "messages" not in record:
            return qa_example(record[shapes[0][0]], record[shapes[0][1]], system)
    if not isinstance(record.get("messages"), list) or not record["messages"]:
        return Fault("missing-messages", "`messages` is missing or empty; write a question and its answer")
    if check:
        return record  # as it would be uploaded
    messages = with_system(record["messages"], system)
    return {key: value for key, value in record.items() if key not in NOT_WRITTEN} | {"messages": messages}


def qa_example(question: Any, answer: Any, system: dict | None) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": with_system(turns, system)}


def with_system(messages: list, system: dict | None) -> list:
    """Put the system message in front where there is none. `developer` is its other name, which training files lack."""
    messages = [m | {"role": "system"} if role_of(m) == "developer" else m for m in messages]
    return messages if not system or "system" in map(role_of, messages) else [system, *messages]


def role_of(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


# --- the rules ---

ROLES = ("system", "user", "assistant", "tool")
KEYS = {role: {"role", "content", "name", "weight"} for role in ROLES}
KEYS |= {"assistant": KEYS["assistant"] | {"tool_calls"}, "tool": KEYS["tool"] | {"tool_call_id"}}
EXAMPLE_KEYS = {"messages", "tools", "parallel_tool_calls"}


class Message:
    """A message as the rules see it: what has the wrong type is empty here, and a fault by a rule of its own."""

    calls: Sequence[dict] = ()  # what few messages have is set in those alone: a file may hold millions
    images: Sequence[dict] = ()
    arguments: Sequence[Any] = ()
    unknown_role = ""
    has_bad_calls = has_bad_weight = is_short = False
    is_valid = is_weighted = True

    def __init__(self, raw: Any):
        self.is_object = isinstance(raw, dict)
        self.raw = raw = raw if self.is_object else {}
        self.role, self.content, self.name = raw.get("role"), raw.get("content"), raw.get("name")
        if self.role not in ROLES:
            self.unknown_role, self.role = named([self.role]) if "role" in raw else "", ""
        if isinstance(self.content, str):
            self.texts = [self.content]
        else:
            parts = dicts_in(self.content) if self.role != "tool" else []
            self.texts = [p["text"] for p in parts if p.get("type") == "text" and isinstance(p.get("text"), str)]
            images = [p for p in parts if p.get("type") == "image_url" and self.role == "user"]
            self.images = [p for p in images if isinstance(dict_at(p, "image_url").get("url"), str)]
            is_list = isinstance(self.content, list) and 0 < len(self.content) == len(self.texts) + len(self.images)
            self.is_valid = self.content is None or is_list
        self.is_blank = bool(self.texts) and not self.images and not any(map(str.strip, self.texts))
        self.all_texts = self.texts
        if "tool_calls" in raw:
            self.calls = [call for call in functions_in(raw["tool_calls"]) if isinstance(call.get("id"), str)]
            self.has_bad_calls = not self.calls or raw["tool_calls"] != self.calls
            self.arguments = [call["function"].get("arguments") for call in self.calls]
            names = [call["function"]["name"] for call in self.calls]
            self.all_texts = [*self.texts, *names, *map(str, self.arguments)]
        if "weight" in raw:
            self.has_bad_weight = repr(raw["weight"]) not in ("0", "1") or self.role != "assistant"
            self.is_weighted = repr(raw["weight"]) != "0"
        self.is_trained = self.role == "assistant" and self.is_weighted
        if self.is_trained and self.texts and not self.is_blank and not self.calls:
            self.is_short = sum(map(len, self.texts)) < SHORT_ANSWER


class Example:
    """A training example as the rules see it."""

    def __init__(self, raw: dict):
        self.raw, self.messages = raw, [Message(message) for message in raw["messages"]]
        self.roles = {message.role for message in self.messages}  # "": missing or unknown
        self.is_trained = any(message.is_trained for message in self.messages) or "assistant" not in self.roles
        self.ends_well = "assistant" not in self.roles or self.messages[-1].role == "assistant"
        self.tools, self.parallel = functions_in(raw.get("tools")), raw.get("parallel_tool_calls", True)
        self.text = "\n".join(text for m in self.messages for text in (*m.all_texts, str(m.name)))
        for message in self.messages:
            if message.images:
                self.text += json.dumps(message.images)
        self.text += json.dumps(raw["tools"]) if "tools" in raw else ""
        calls: list[dict] = []
        results: list = []
        for message in self.messages:
            calls += message.calls
            if message.role == "tool" and message.raw.get("tool_call_id") not in [call["id"] for call in calls]:
                results.append(message.raw.get("tool_call_id"))
        self.orphans = named(results)  # tool results that answer no earlier call
        self.undeclared = named({c["function"]["name"] for c in calls} - {t["function"]["name"] for t in self.tools})


def dicts_in(value: Any) -> list[dict]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def dict_at(value: dict, key: str) -> dict:
    return value[key] if isinstance(value.get(key), dict) else {}


def functions_in(value: Any) -> list[dict]:
    """Of a list of tools, or of calls, return the valid ones: {"type": "function", "function": {"name": ...}}."""
    tools = [item for item in dicts_in(value) if item.get("type") == "function"]
    return [tool for tool in tools if isinstance(dict_at(tool, "function").get("name"), str)]


def is_json(text: Any) -> bool:
    try:
        return json.loads(text) is not text
    except (TypeError, ValueError, RecursionError):
        return False


def has_blank_run(text: str) -> bool:
    return len(text) >= MAX_BLANKS and any(len(run) >= MAX_BLANKS for run in re.findall(r"\s+", text))


def secrets_in(text: str) -> str:
    if not any(mark(text) for mark in MAY_BE_SECRET):
        return ""
    return ", ".join(sorted({name for name, part, pattern in SECRETS if part in text and re.search(pattern, text)}))


def named(values: Collection) -> str:
    """'a', 'b': each value once, cut to what a line can take, and without secrets."""
    if not values:
        return ""
    return ", ".join(sorted({repr(ANY_SECRET.sub("[secret]", str(value))[:40]) for value in values}))


# For each thing that is judged its rules: the kind, what finds the fault (it returns True, or a text for {}), the cure.
# A message is judged by the rules for "message" and by those for its role; one without a known role, by those for "".
RULES: dict[str, list[tuple[str, Callable[[Any], Any], str]]] = {
    "example": [
        ("unknown-key", lambda e: named(e.raw.keys() - EXAMPLE_KEYS), "the API rejects {} beside messages; delete it"),
        ("no-user-message", lambda e: "user" not in e.roles, "there is no user message; add what is answered"),
        ("no-assistant-message", lambda e: "assistant" not in e.roles, "there is nothing to learn; add the answer"),
        ("nothing-trained", lambda e: not e.is_trained, "every answer has weight 0; take it off what is to be learnt"),
        ("last-not-assistant", lambda e: not e.ends_well, "what follows the last answer teaches nothing; delete it"),
        ("invalid-tools", lambda e: e.raw.get("tools", []) != e.tools, "`tools` must be a list of named functions"),
        ("invalid-tools", lambda e: not isinstance(e.parallel, bool), "`parallel_tool_calls` must be true or false"),
        ("unknown-function", lambda e: e.undeclared, "the function {} is called but not in `tools`; declare it there"),
        ("orphan-tool-result", lambda e: e.orphans, "no earlier call has the id {}; tool_call_id must be that of one"),
        ("control-token", lambda e: named(CONTROL_TOKEN.findall(e.text)), "the text holds {}; the API rejects it"),
        ("secret", lambda e: secrets_in(e.text), "the text holds {}; take it out, and revoke it if it is real"),
        ("blank-run", lambda e: has_blank_run(e.text), f"{MAX_BLANKS:,} blanks in a row break tokenizers; delete them"),
    ],
    "message": [
        ("unknown-key", lambda m: named(m.raw.keys() - KEYS[m.role]), "the API rejects {} here; delete it"),
        ("missing-content", lambda m: m.content is None and not m.calls, "`content` is missing; write the text"),
        ("invalid-content", lambda m: not m.is_valid, "`content` must be text; a user's may be texts and images"),
        ("invalid-name", lambda m: not isinstance(m.raw.get("name", ""), str), "`name` must be a text"),
        ("invalid-weight", lambda m: m.has_bad_weight, "`weight` must be 0 or 1, and only an answer has one"),
    ],
    "user": [("empty-question", lambda m: m.is_blank, "the user's message is empty; write it or delete the row")],
    "assistant": [
        ("empty-answer", lambda m: m.is_blank and not m.calls, "the answer is empty; write one or delete the row"),
        ("short-answer", lambda m: m.is_short, f"fewer than {SHORT_ANSWER} characters; the model will be as brief"),
        ("invalid-tool-call", lambda m: m.has_bad_calls, "each call needs an id, the type function, a function's name"),
        ("invalid-arguments", lambda m: not all(map(is_json, m.arguments)), "`arguments` must be JSON in a text"),
    ],
    "": [
        ("invalid-message", lambda m: not m.is_object, "a message must be an object with `role` and `content`"),
        ("missing-role", lambda m: m.is_object and "role" not in m.raw, f"`role` is missing; write one of {ROLES}"),
        ("unknown-role", lambda m: m.unknown_role, f"the role {{}} is unknown; write one of {ROLES}"),
    ],
}
RULES_FOR = {role: RULES["message"] + RULES.get(role, []) for role in ROLES} | {"": RULES[""]}
WARNINGS = {"last-not-assistant", "short-answer", "duplicate", "conflicting-answer", "differing-system", "held-out"}
WARNINGS |= {"validation-overlap", "few-examples"}  # every other kind is an error
BLOCKING = {"broken-file", "too-few-examples", "file-too-large"}  # nothing is written while one of these stands


# --- counting tokens ---


class TokenCounter:
    """Counts in a model's encoding. `counted` says how: "exact"; "approximate", where tiktoken does not know the model
    and o200k_base stands in; or "estimated", where the vocabulary cannot be had."""

    def __init__(self, model: str):
        import tiktoken  # imported here, so that --help does not wait for it

        self.encoding_name, self.counted = "o200k_base", "approximate"
        with suppress(KeyError):
            self.encoding_name, self.counted = tiktoken.encoding_name_for_model(base_model(model)), "exact"
        if folder := os.environ.get("TIKTOKEN_CACHE_DIR"):  # one that .env names is relative to .env
            os.environ["TIKTOKEN_CACHE_DIR"] = str(HERE / folder)
        self.encoding: Any = None

        def load():
            with suppress(OSError, ValueError):  # what a download raises is an OSError
                self.encoding = tiktoken.get_encoding(self.encoding_name)

        # A download may hang for ever; a daemon thread does not keep the script alive.
        loading = threading.Thread(target=load, daemon=True)
        loading.start()
        loading.join(LOADING_SECONDS)
        if self.encoding is None:
            self.counted = "estimated"
            why = f"the vocabulary of {self.encoding_name} could be neither found nor downloaded"
            print(f"warning: {why}, so token counts are estimates (bytes / 4).", file=sys.stderr)

    def count(self, text: str) -> int:
        if self.encoding is None or has_blank_run(text):
            return math.ceil(len(text.encode("utf-8", "replace")) / 4)
        return len(self.encoding.encode_ordinary(text))

    def count_each(self, texts: Iterable[str]) -> dict[str, int]:
        """Return the tokens of each text, which are encoded in one call, so that threads seldom wait for each other."""
        known = [text for text in {*texts} if not has_blank_run(text) and END_OF_TEXT not in text]
        counts: dict[str, int] = {}
        while self.encoding is not None and known:
            joined, chars = list[str](), 0
            while known and chars < JOINED_CHARS:
                joined.append(known.pop())
                chars += len(joined[-1])
            text, start = END_OF_TEXT.join(joined), 0
            tokens = self.encoding.encode(text, allowed_special={END_OF_TEXT}, disallowed_special=())
            for text in joined[:-1]:
                end = tokens.index(self.encoding.eot_token, start)
                counts[text], start = end - start, end + 1
            counts[joined[-1]] = len(tokens) - start
        return counts

    def count_example(self, example: Example, counts: dict[str, int]) -> tuple[int, int]:
        """Return (all tokens, those trained on); `counts` are those of its texts that are known."""
        total, trained = PRIMING_TOKENS + self.count_tools(example.tools), 0
        for message in example.messages:
            said = sum(counts[text] if text in counts else self.count(text) for text in message.all_texts)
            name = self.count(message.name) + NAME_TOKENS if isinstance(message.name, str) else 0
            total += said + name + MESSAGE_TOKENS + IMAGE_TOKENS * len(message.images)
            trained += said * message.is_trained
        return total, trained

    def count_tools(self, tools: list[dict]) -> int:
        """The Cookbook's rule, which knows no nesting."""
        tokens = 12 * bool(tools)
        for function in (tool["function"] for tool in tools):
            properties = dict_at(dict_at(function, "parameters"), "properties")
            tokens += (10 if self.encoding_name == "cl100k_base" else 7) + 3 * bool(properties)
            tokens += self.count(f"{function['name']}:{str(function.get('description', '')).removesuffix('.')}")
            for key in properties:
                value = dict_at(properties, key)
                choices = value["enum"] if isinstance(value.get("enum"), list) else []
                about = f"{key}:{value.get('type', '')}:{str(value.get('description', '')).removesuffix('.')}"
                tokens += 3 + self.count(about) - 3 * bool(choices)
                tokens += sum(3 + self.count(str(choice)) for choice in choices)
        return tokens


def base_model(model: str) -> str:
    """The base of a fine-tuned model's id: tiktoken 0.14 maps ft:gpt-4.1-mini-2025-04-14:org::id wrongly."""
    return model.split(":")[1] if model.startswith("ft:") else model


# --- comparing rows ---

TURN = b"\0"  # between the messages of a prompt


@dataclass
class Row:
    """One record on its way from the input to the output."""

    side: str  # where it goes: "training", "validation", "rejected" or "repeated"; at first, the file it stands in
    file: str
    line: int | None
    record: Any
    example: Example | None = None
    data: bytes = b""  # the line to write
    tokens: int = 0
    trained_tokens: int = 0
    prompt: bytes = b""  # what is said in it, as rows are compared
    system: bytes = b""
    keys: tuple = ()  # 8 bytes each for the prompt, the prompt with its answer, and the line to write
    problems: list[Problem] = field(default_factory=list)

    def fault(self, kind: str, message: str):
        level = "warning" if kind in WARNINGS else "error"
        self.problems.append(Problem(self.file, self.line, level, kind, message))


def said(messages: Iterable[Message]) -> bytes:
    """What messages say, without what does not change it: case, white space and Unicode form."""
    plain = (render([m.content, m.calls]) if m.calls or m.images else "".join(m.texts) for m in messages)
    text = unicodedata.normalize("NFKC", TURN.decode().join(plain)).casefold().encode("utf-8", "surrogatepass")
    return text.translate(None, b" \t\n\r\v\f")


def compared(
    rows: Iterable[Row], held_out: dict[bytes, str], split: float, check: bool, validation: bool
) -> Iterator[Row]:
    """Warn of what a row says against those before it and against the test cases; set Row.side."""
    prompts: dict[int, str] = {}  # {what is asked, under whatever system message: where}; if validation rows follow
    seen: dict[str, dict[int, int | None]] = {}  # {file: {key: line where it stood first}}
    systems: dict[bytes, str] = {}  # {the first that is said, and another: where}

    def earlier(key: int) -> str | None:
        return next((f"{file}:{lines[key]}" for file, lines in seen.items() if key in lines), None)

    for row in rows:
        same_prompt, alike, same = map(earlier, row.keys or (0, 0, 0))
        if validation and row.keys and row.side == "training":
            prompts.setdefault(hash(row.prompt), f"{row.file}:{row.line}")
        elif validation and row.keys and hash(row.prompt) in prompts:
            where = prompts[hash(row.prompt)]
            row.fault("validation-overlap", f"the same prompt as {where} in training; keep it in one of the two")
        if row.side == "training":
            for key in row.keys:
                seen.setdefault(row.file, {}).setdefault(key, row.line)
            if same:
                row.fault("duplicate", f"the same as {same}; " + ("delete one" if check else "left out"))
            elif alike:
                row.fault("duplicate", f"the same as {alike} but for case, white space or Unicode form; keep one")
            elif same_prompt:
                row.fault("conflicting-answer", f"the prompt of {same_prompt} with another answer; keep the better one")
            if len(systems) == 1 and row.system not in systems:
                first = next(iter(systems.values()))
                row.fault("differing-system", f"another system message than {first}; this is told once")
            if len(systems) < 2:
                systems.setdefault(row.system, f"{row.file}:{row.line}")
            turns = row.prompt.split(TURN)
            beginnings = itertools.accumulate(turns if held_out else (), lambda before, turn: before + TURN + turn)
            for case in {part for part in itertools.chain(turns, beginnings) if part in held_out}:
                row.fault("held-out", f"{held_out[case]}; a test must be new to the model")
            if same and not check:
                row.side = "repeated"
            # By the prompt's content alone, so that no prompt is on both sides and new rows move no old one.
            elif int.from_bytes(hashlib.blake2b(row.prompt, digest_size=8).digest(), "big") < split * 2**64:
                row.side = "validation"
        yield row


def read_held_out(path: str) -> dict[bytes, str]:
    """Return {prompt: "test case ID of FILE"} of test cases: {"cases": [...]}, an array of cases or JSON Lines."""
    prompts = {}
    try:
        text = Path(path).read_text("utf-8-sig")
        try:
            cases = json.loads(text)
        except ValueError:
            cases = [json.loads(line) for line in text.split("\n") if line.strip()]
        for case in cases.get("cases", [cases]) if isinstance(cases, dict) else cases:
            turns = [*(case.get("history") or []), {"role": "user", "content": case["question"]}]
            asked = said(message for message in map(Message, turns) if message.role != "system")
            prompts[asked] = f"test case {case.get('id')} of {path}"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise StepError(f'{path} does not hold test cases, such as {{"cases": [{{"question": "..."}}]}}.') from None
    return prompts


# --- what is told of all rows ---


@dataclass
class Report:
    """What prepare_data found. Examples, messages and tokens are those of the training side."""

    model: str
    encoding: str
    counted: str  # "exact", "approximate" or "estimated": see TokenCounter
    price: float | None  # USD per 1M training tokens; 0.0 on the local API, None where no price is known
    records: int = 0
    invalid: int = 0
    duplicates: int = 0
    examples: int = 0
    validation_examples: int = 0
    messages: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    epochs: int = 0  # this and the next three: see finish
    billed_tokens: int = 0
    estimated_cost: float | None = None
    tokens_per_example: dict[str, int] = field(default_factory=dict)
    system_prompt: str | None = None  # the one that every training row starts with
    ignored_columns: list[str] = field(default_factory=list)
    errors: int = 0
    warnings: int = 0
    blocked: bool = False  # by a fault of the file as a whole
    written: dict[str, str] = field(default_factory=dict)  # {path: what became of it}
    problems: list[Problem] = field(default_factory=list)
    sizes: Counter = field(default_factory=Counter)  # {tokens: how many examples have that many}

    def add(self, row: Row):
        self.errors += sum(problem.level == "error" for problem in row.problems)
        self.warnings += sum(problem.level == "warning" for problem in row.problems)
        self.blocked |= any(problem.kind in BLOCKING for problem in row.problems)
        self.records += row.side != "file"
        self.invalid += row.side == "rejected"
        self.duplicates += row.side == "repeated"
        self.validation_examples += row.side == "validation"
        if isinstance(row.record, dict) and "messages" not in row.record and row.side != "rejected":
            shape = next(shape for shape in SHAPES if row.record.keys() >= {*shape})
            ignored = {ANY_SECRET.sub("[secret]", key) for key in row.record.keys() - {*shape, *NOT_WRITTEN}}
            self.ignored_columns += sorted(ignored - {*self.ignored_columns})
        if row.side == "training" and row.example:
            first = row.example.messages[0]
            system = first.content if first.role == "system" and isinstance(first.content, str) else None
            self.system_prompt = system if not self.examples or system == self.system_prompt else None
            self.examples += 1
            self.messages += len(row.example.messages)
            self.tokens += row.tokens
            self.trained_tokens += row.trained_tokens
            self.sizes[row.tokens] += 1

    def finish(self):
        self.epochs = auto_epochs(self.examples)
        self.billed_tokens, self.estimated_cost = self.tokens * self.epochs, self.cost(self.epochs)
        sizes, last = sorted(self.sizes.elements()) or [0], max(0, self.examples - 1)
        shares = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
        self.tokens_per_example = {name: sizes[int(share * last)] for name, share in shares.items()}

    def cost(self, epochs: int) -> float | None:
        """USD for this many epochs; None where no price is known."""
        return None if self.price is None else self.tokens * epochs * self.price / 1e6


def auto_epochs(examples: int) -> int:
    """The epochs that `auto` chooses: 3, but 1 to 25 to have 100 to 25,000 examples in all.

    Source: https://github.com/openai/openai-cookbook, examples/Chat_finetuning_data_prep.ipynb
    """
    if examples * 3 < 100:
        return min(25, 100 // max(1, examples))
    return 3 if examples * 3 <= 25_000 else max(1, 25_000 // examples)


def training_price(model: str) -> float | None:
    """USD per 1M training tokens: 0.0 on the local API, None where no price is known. StepError: no such address."""
    base_url, name = os.environ.get("OPENAI_BASE_URL"), base_model(model)
    try:
        host = urlsplit(base_url or "https://api.openai.com/v1").hostname or ""
    except ValueError:
        raise StepError("OPENAI_BASE_URL is no address such as http://127.0.0.1:8321/v1.") from None
    if host in ("localhost", "::1") or host.startswith("127.") or (name in LOCAL_MODELS and not base_url):
        return 0.0
    known = [price for dated, price in PRICES.items() if dated == name or dated.startswith(name + "-20")]
    return known[0] if known and host == "api.openai.com" else None


def judged_whole(file: str, size: int, report: Report, validation_split: float) -> Row:
    """Return a row with the faults of a training file of `size` bytes as a whole."""
    row = Row("file", file, None, None)
    if report.examples < MIN_EXAMPLES:
        row.fault("too-few-examples", f"{report.examples} valid examples; training takes {MIN_EXAMPLES} or more")
    elif report.examples < ADVISED_EXAMPLES:
        row.fault("few-examples", f"{report.examples} examples; with fewer than {ADVISED_EXAMPLES} little is learnt")
    if validation_split and not report.validation_examples:
        row.fault("too-few-examples", f"no prompt falls into a validation split of {validation_split}; raise it")
    if size > MAX_FILE_BYTES:
        over = f"{size / 2**20:,.0f} MB, and an upload may have {MAX_FILE_BYTES // 2**20}"
        row.fault("file-too-large", f"{over}; train on parts in turn, or see client.uploads.upload_file_chunked")
    return row


# --- writing ---


def render(value: Any) -> str:
    return JSON_ENCODER.encode(value)


class AtomicFile(AbstractContextManager):
    """A file that appears whole or not at all: written beside its target, synced, and renamed over it."""

    def __init__(self, path: str):
        self.name, self.path = path, Path(os.path.realpath(path))  # the file that a link leads to, not the link
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        if os.path.exists(path) and not os.path.isfile(path):  # renaming would put a file in the place of /dev/null
            raise StepError(f"{path} is a folder, a device or a pipe; name a file.")
        if not os.access(self.path.parent, os.W_OK):
            raise StepError(f"{path} cannot be written: its folder is missing or read-only; name another file.")
        self.file = open(self.temporary, "wb")  # noqa: SIM115 (closed in __exit__)

    def __exit__(self, *_):
        with suppress(OSError):  # on a full disk this fails as the last write did
            self.file.close()
        self.temporary.unlink(missing_ok=True)

    def commit(self) -> str:
        """Put the file in place; return in a few words what became of it and of the one that stood there."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        outcome = "written"
        if self.path.exists():
            if filecmp.cmp(self.path, self.temporary, shallow=False):
                return "already up to date"
            shutil.copymode(self.path, self.temporary)
            names = (self.path.with_name(f"{self.path.name}.bak{number or ''}") for number in itertools.count())
            kept = next(name for name in names if not name.exists())
            shutil.copy2(self.path, kept)  # it keeps its own name, too, until the new one takes it
            outcome = f"written; the one that stood there is kept as {kept.name}"
        os.replace(self.temporary, self.path)
        return outcome


def save_to_jsonl(examples: Iterable[dict], path: str) -> str:
    """Write examples as JSON Lines, whole or not at all; return what became of the file, as AtomicFile.commit does."""
    with AtomicFile(path) as output:
        for example in examples:
            output.file.write(render(example).encode() + b"\n")
        return output.commit()


# --- the whole ---


class TrainingDataPreparator:
    """Judges records and makes a training file of them, for `model`, with `system` where no system message is."""

    def __init__(self, model: str | None = None, system: str = SYSTEM_PROMPT):
        from dotenv import load_dotenv

        load_dotenv()
        self.model = model or os.environ.get("FINE_TUNE_MODEL") or DEFAULT_MODEL
        self.system = {"role": "system", "content": system} if system else None
        self.counter = TokenCounter(self.model)

    def format_qa_pair(self, question: str, answer: str) -> dict:
        """Return the example {"messages": [system, user, assistant]}."""
        return qa_example(question, answer, self.system)

    def validate_example(self, example: dict) -> list[Problem]:
        """Return what is wrong with one example, judged as it would be uploaded; an empty list if nothing is."""
        return self.judge_block([Row("training", "example", 1, example)], check=True)[0].problems

    def count_tokens(self, what: str | list[dict] | dict) -> int:
        """Return the tokens of a text, of a list of messages, or of an example with its messages and tools."""
        if isinstance(what, str):
            return self.counter.count(what)
        return self.counter.count_example(Example(what if isinstance(what, dict) else {"messages": what}), {})[0]

    def prepare_data(
        self,
        inputs: str | os.PathLike | list,
        output: str | None = None,
        *,
        check: bool = False,
        strict: bool = False,
        validation_split: float = 0.0,
        validation_output: str | None = None,
        held_out: str | None = None,
        rejected: str | None = None,
        tell: Callable[[Problem], None] | None = None,
    ) -> Report:
        """Judge `inputs` (a path, or a list of paths or records); write what can be trained on to `output`, if given.

        With `check` the inputs are judged as an upload would be, and with them the validation file that
        validation_output names. Each Problem goes to `tell`, or into Report.problems. Raises OSError for a file that
        cannot be read or written, StepError for one that is not UTF-8 or holds no test cases.
        """
        given = inputs if isinstance(inputs, list) else [inputs]
        rows = rows_of(given, "training", check)
        if check and validation_output:
            rows = itertools.chain(rows, rows_of([validation_output], "validation", check))
        names = [os.fspath(item) for item in given if isinstance(item, (str, os.PathLike))]
        paths = {"training": output, "validation": validation_split and validation_output, "rejected": rejected}
        report = Report(self.model, self.counter.encoding_name, self.counter.counted, training_price(self.model))
        tell = tell or report.problems.append

        def whole() -> Iterator[Row]:  # after all the rows
            size = files["training"].file.tell() if output else max(map(os.path.getsize, names), default=0)
            yield judged_whole(output or (names or ["examples"])[0], size, report, validation_split)

        with ExitStack() as stack:
            cases = read_held_out(held_out) if held_out else {}
            files = {side: stack.enter_context(AtomicFile(path)) for side, path in paths.items() if path and not check}
            judged = compared(
                self.judged(rows, check), cases, validation_split, check, check and bool(validation_output)
            )
            for row in itertools.chain(judged, whole()):
                report.add(row)
                for problem in row.problems:
                    tell(problem)
                if row.side in files:
                    files[row.side].file.write(row.data)
                if report.records % 1000 == 0 and sys.stderr and sys.stderr.isatty():
                    print(f"{report.records:,} records\r", end="", file=sys.stderr, flush=True)
            report.finish()
            if not report.blocked and not (strict and report.invalid):
                report.written = {file.name: file.commit() for file in files.values()}
        return report

    def judged(self, rows: Iterator[Row], check: bool) -> Iterator[Row]:
        """Judge rows in order, a block of them to a thread: while tiktoken counts in one, others run."""
        from concurrent.futures import ThreadPoolExecutor  # imported here, so that --help does not wait for it

        threads, size = min(8, os.cpu_count() or 1), 10
        waiting: deque = deque()
        with ThreadPoolExecutor(threads) as pool:
            while block := list(itertools.islice(rows, size)):
                waiting.append(pool.submit(self.judge_block, block, check))
                if len(waiting) > threads:
                    done = waiting.popleft().result()
                    row_bytes = sum(len(row.data) for row in done) / len(done)
                    size = max(1, min(BLOCK_ROWS, int(BLOCK_BYTES / (row_bytes + 1))))
                    yield from done
            while waiting:
                yield from waiting.popleft().result()

    def judge_block(self, rows: list[Row], check: bool) -> list[Row]:
        """Find the faults of each row by itself, count its tokens, and make the line to write of it."""
        for row in rows:
            self.judge(row, check)
        examples = [row.example for row in rows if row.example]
        texts = (text for example in examples for message in example.messages for text in message.all_texts)
        counts = self.counter.count_each(texts)
        limit = LOCAL_MODELS.get(base_model(self.model), TOKEN_LIMIT)
        for row in rows:
            if row.example:
                row.tokens, row.trained_tokens = self.counter.count_example(row.example, counts)
            if row.tokens > limit:
                over = f"{row.tokens:,} tokens, of which {self.model} reads the first {limit:,}"
                row.fault("too-many-tokens", f"{over}: the end, which is the answer, would be cut off; shorten it")
            errors = [f"{problem.kind}: {problem.message}" for problem in row.problems if problem.level == "error"]
            if errors:
                record = row.record.text if isinstance(row.record, Fault) else row.record
                rejected = {"file": row.file, "line": row.line, "errors": errors, "record": record}
                row.side, row.data, row.keys = "rejected", json.dumps(rejected).encode() + b"\n", ()
        return rows

    def judge(self, row: Row, check: bool):
        example = to_example(row.record, self.system, check)
        try:
            if isinstance(example, Fault):
                row.fault(example.kind, example.message)
            else:
                self.judge_example(row, Example(example))
        except UnicodeEncodeError:
            row.fault("lone-surrogate", "the text holds half of a character (\\ud800 to \\udfff); delete or mend it")
        except (ValueError, RecursionError):
            row.record = None  # --rejected could not write it either
            row.fault("invalid-json", "a number is not finite, or the record is nested too deeply")

    def judge_example(self, row: Row, example: Example):
        row.example, messages = example, example.messages
        for kind, find, sentence in RULES["example"]:
            if found := find(example):
                row.fault(kind, sentence.format(found))
        for number, message in enumerate(messages, 0 if messages[0].raw is self.system else 1):  # 1: the reader's first
            for kind, find, sentence in RULES_FOR[message.role]:
                if found := find(message):
                    row.fault(kind, f"message {number}: {sentence.format(found)}")
        row.data = render(example.raw).encode() + b"\n"
        last = max((n for n, message in enumerate(messages) if message.role == "assistant"), default=0)
        row.prompt = said(message for message in messages[:last] if message.role != "system")
        row.system = said(message for message in messages if message.role == "system")
        asked = row.prompt, row.system, "tools" in example.raw and json.dumps(example.raw["tools"])
        row.keys = hash(asked), hash((asked, said(messages[last:]))), hash(row.data)


def rows_of(inputs: list, side: str, check: bool) -> Iterator[Row]:
    """Yield a row for each record of a list of paths, or of records."""
    for number, given in enumerate(inputs, 1):
        if isinstance(given, (str, os.PathLike)):
            yield from (Row(side, os.fspath(given), *found) for found in read_records(os.fspath(given), check))
        else:
            yield Row(side, "examples", number, given)


def validate_training_data(examples: Iterable[dict]) -> list[Problem]:
    """Return every problem of a list of training examples; Problem.line is the example's position, from 1."""
    return TrainingDataPreparator().prepare_data(list(examples), check=True).problems


def check_training_file(path: str, model: str | None = None, validation_file: str | None = None) -> Report:
    """Judge a training file, and with it a validation file, as --check does. StepError where one cannot be read."""
    try:
        return TrainingDataPreparator(model).prepare_data(path, check=True, validation_output=validation_file)
    except OSError as error:
        raise StepError(f"{error.filename}: {error.strerror}.") from None


# --- the command line ---


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make a training file of questions and answers, and find every fault.")
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="JSON, JSON Lines or CSV files (default: the TechFlow examples)")
    add("-o", "--output", metavar="FILE", help=f"default: {DEFAULT_OUTPUT}")
    add("--check", action="store_true", help=f"judge INPUT (default: {DEFAULT_OUTPUT}) as an upload; write nothing")
    add("--system", default=SYSTEM_PROMPT, metavar="TEXT", help="system message where a record has none")
    add("--model", help=f"base model (default: FINE_TUNE_MODEL, else {DEFAULT_MODEL})")
    add("--validation-split", type=float, default=0.0, metavar="F", help="set this share of the prompts apart, say 0.1")
    where = f"where to (default: {DEFAULT_VALIDATION_OUTPUT}); with --check: a validation file to judge too"
    add("--validation-output", metavar="FILE", help=where)
    cases = "test cases that training must not see (default: test_cases.json beside INPUT, if there)"
    add("--held-out", metavar="FILE", help=cases)
    add("--rejected", metavar="FILE", help="keep the rows that cannot be trained on, with the reasons")
    add("--strict", action="store_true", help="write nothing if one row has an error")
    add("--json", action="store_true", help="print one JSON document and nothing else")
    return parser


def set_defaults(args: argparse.Namespace):
    """Put in what was not given, and refuse what does not go together."""
    if args.check and (args.output or args.rejected or args.validation_split):
        raise StepError("--check writes nothing: leave -o, --rejected and --validation-split away.")
    if args.validation_output and not (args.check or args.validation_split):
        raise StepError("--validation-output needs --validation-split, the share that goes there.")
    if not 0 <= args.validation_split < 1:
        raise StepError(f"--validation-split {args.validation_split} is not between 0 and 1.")
    tutorial = DEFAULT_INPUT if os.path.exists(DEFAULT_INPUT) else str(HERE / DEFAULT_INPUT)
    args.inputs = args.inputs or [DEFAULT_OUTPUT if args.check else tutorial]
    args.output = args.output or (None if args.check else DEFAULT_OUTPUT)
    args.validation_output = args.validation_output or (DEFAULT_VALIDATION_OUTPUT if args.validation_split else None)
    beside = os.path.join(os.path.dirname(args.inputs[0]), "test_cases.json")
    if not args.held_out and os.path.isfile(beside):
        try:
            read_held_out(beside)
            args.held_out = beside
        except StepError as error:  # the reader did not name it: it may be another's file
            print(f"warning: {error} Nothing is compared with it.", file=sys.stderr)
    read, written = [*args.inputs, args.held_out], [args.output, args.validation_output, args.rejected]
    known: set = {os.path.realpath(path) for path in read if path}
    for path in written if not args.check else []:
        if path and os.path.realpath(path) in known:
            raise StepError(f"{path} is read or written already in this run; name another output with -o, or --check.")
        known.add(path and os.path.realpath(path))


def print_report(report: Report, args: argparse.Namespace):
    counted = {"exact": "", "approximate": f", approximate: tiktoken does not know {report.model}"}
    sizes = ", ".join(f"{name} {size:,}" for name, size in report.tokens_per_example.items())
    cost = "free: the local API trains it here" if report.price == 0 else f"no price known for {report.model}"
    if report.price:
        rate = f"{report.model}: ${report.price:.2f} per 1M tokens, as of {PRICES_DATE}"
        cost = f"${report.estimated_cost:,.2f} ({rate}); the local API trains for free"
    lines = {
        "Records": f"{report.records:,}: {report.records - report.invalid:,} valid, {report.invalid:,} invalid",
        "Left out": report.duplicates and f"{report.duplicates:,} exact duplicates",
        "Ignored columns": named(report.ignored_columns),
        "Examples": f"{report.examples:,}",
        "  for validation": report.validation_examples and f"{report.validation_examples:,} others",
        "Messages": f"{report.messages:,}",
        "Tokens": f"{report.tokens:,} ({report.encoding}{counted.get(report.counted, ', estimated: bytes / 4')})",
        "  per example": "\n".join([sizes, *histogram(report.sizes)]),
        "  trained on": f"{report.trained_tokens:,} (assistant messages of weight 1)",
        "  billed": f"{report.billed_tokens:,} ({report.epochs} epochs, as `auto` chooses)",
        "Estimated cost": cost,
        "Test cases": args.held_out and f"{args.held_out} (compared with the training data)",
        "Problems": f"errors {report.errors:,}, warnings {report.warnings:,}",
    }
    print("".join(f"{name:<17}{value}\n" for name, value in lines.items() if value))
    for path, outcome in report.written.items():
        print(f"{path}: {outcome}")
    if report.written:
        files = [args.output] if args.output != DEFAULT_OUTPUT else []
        files += ["--validation-file", args.validation_output] if report.validation_examples else []
        print("Next: python fine_tune.py", *map(shlex.quote, files))
    elif args.check:
        print("This file cannot be trained on as it is." if report.errors else "No errors: this file can be uploaded.")
    else:
        print("Nothing was written: correct the errors and run this again.")


def histogram(sizes: Counter, bars: int = 8) -> Iterator[str]:
    """Yield a line for each bar: its range of tokens and how many examples are in it."""
    low, high = min(sizes, default=0), max(sizes, default=0)
    step = (high - low) // bars + 1
    heights = {start: sum(sizes[n] for n in range(start, start + step)) for start in range(low, high + 1, step)}
    for start, height in heights.items() if sizes else ():
        bar = "#" * math.ceil(40 * height / max(heights.values()))
        yield f"{f'{start:,}-{start + step - 1:,}':>19}  {bar} {height:,}"


def tell(problem: Problem):
    with suppress_closed(sys.stderr):
        print(problem, file=sys.stderr)


@contextmanager
def suppress_closed(stream: TextIO) -> Iterator[None]:
    """Go on without a reader: `head`, for instance, has had enough, but the files and the exit code are still due."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run(args: argparse.Namespace) -> int:
    set_defaults(args)
    options = {name: value for name, value in vars(args).items() if name not in ("model", "system", "json")}
    report = TrainingDataPreparator(args.model, args.system).prepare_data(**options, tell=None if args.json else tell)
    with suppress_closed(sys.stdout):
        if args.json:
            document = {name: value for name, value in vars(report).items() if name != "sizes"}
            problems = [problem._asdict() for problem in report.problems]
            print(json.dumps(document | {"prices_as_of": PRICES_DATE, "problems": problems}, indent=2))
        else:
            print_report(report, args)
        sys.stdout.flush()
    return 1 if report.blocked or (args.check and report.errors) or (args.strict and report.invalid) else 0


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_intermixed_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 must not end the run
    try:
        return run(args)
    except StepError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        cure = "activate the virtual environment (Python 3.10 or newer), or python -m pip install -r requirements.txt"
        print(f"{error.name} is missing here: {cure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted; no file is half written. Run the same command again.", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"{error.filename or 'Reading or writing failed'}: {error.strerror or error}.", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
