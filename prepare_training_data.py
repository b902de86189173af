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

import argparse
import codecs
import csv
import filecmp
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
import threading
import unicodedata
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
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
TOKEN_LIMITS = {"smollm2-135m-instruct": 8_192}  # models with a smaller context
SHORT_ANSWER = 50  # characters
MAX_BLANKS = 100_000  # in a row: tiktoken panics at about a million (openai/tiktoken issue 15)

# What the chat format adds to the texts: openai/openai-cookbook, How_to_count_tokens_with_tiktoken.ipynb.
MESSAGE_TOKENS, NAME_TOKENS, PRIMING_TOKENS = 3 + 1, 1, 3  # a message's 3 and its role, one token in every encoding
IMAGE_TOKENS = 85  # at low detail; at high detail it depends on the image, which is not looked at
DOWNLOAD_SECONDS = 10  # for a vocabulary: tiktoken itself would wait for ever
BLOCK_BYTES = 100_000  # that a thread counts at a time: enough that threads seldom wait for each other
CHUNK_BYTES = 1 << 16

JSON_SPACE = " \t\n\r"
JSON_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
END_OF_TEXT = "<|endoftext|>"
# The API rejects all of these; o200k_base alone would let the fim and im tokens pass.
CONTROL_TOKEN = re.compile(
    r"<\|(?:(?:start|end)of(?:text|prompt)|fim_(?:prefix|middle|suffix)|im_(?:start|end|sep))\|>"
)
BLANK_RUN = re.compile(rf"\s{{{MAX_BLANKS}}}")
SECRETS = (  # what it is, how it begins, how it goes on
    ("a private key", r"-----", r"BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY[\s\S]*"),
    ("an API key", r"(?<![A-Za-z0-9])sk-", r"(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{20,}"),
    ("an AWS access key", r"A", r"[KS]IA[A-Z0-9]{16}"),
    ("a GitHub token", r"gh[pousr]_", r"[A-Za-z0-9]{36,}"),
    ("a GitHub token", r"github_pat_", r"[A-Za-z0-9_]{22,}"),
    ("a GitLab token", r"glpat-", r"[A-Za-z0-9_-]{20,}"),
    ("a Google API key", r"A", r"Iza[A-Za-z0-9_-]{35}"),
    ("a Hugging Face token", r"hf_", r"[A-Za-z0-9]{30,}"),
    ("a Slack token", r"xox[abeprs]-", r"[A-Za-z0-9-]{10,}"),
    ("a Stripe key", r"[rs]k_", r"(?:live|test)_[A-Za-z0-9]{16,}"),
    ("an npm token", r"npm_", r"[A-Za-z0-9]{36}"),
    ("a PyPI token", r"pypi-", r"[A-Za-z0-9_-]{50,}"),
    ("a JSON Web Token", r"eyJ", r"[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"),
)
# Looked for by the last character of its beginning: those are rare in prose, which makes the search five times faster.
SECRET_PATTERNS = [(name, f"{begins[-1]}(?<={begins}){goes_on}") for name, begins, goes_on in SECRETS]
SECRET = re.compile("|".join(pattern for _, pattern in SECRET_PATTERNS))


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
    """What is wrong with a record; it stands in the place of one that cannot be read."""

    kind: str
    message: str


# --- reading: (line, value, text) for each record, where the value is what its text says, or a Fault ---


def read_records(path: str, check: bool = False) -> Iterator[tuple[int, Any, str]]:
    """Yield the records of a file: CSV by its name, a JSON array by its first character, else JSON Lines.

    With `check` it can only be JSON Lines, as for the upload. Raises StepError for a file that is missing or not UTF-8.
    """
    with explained_file_errors(), open(path, "rb") as file:
        start = file.peek(64)
        is_array = start.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
        if check and start.startswith(codecs.BOM_UTF8):
            yield 1, Fault("byte-order-mark", "a server may reject the byte order mark here; save the file without"), ""
        if check and is_array:
            yield 1, Fault("broken-file", "this is an array, the upload takes JSON Lines; run without --check"), ""
        elif is_array:
            yield from read_json_array(decoded(iter(lambda: file.read(CHUNK_BYTES), b""), path))
        elif path.lower().endswith(".csv") and not check:
            yield from read_csv(decoded(file, path))
        else:
            yield from read_json_lines(decoded(file, path), check)


@contextmanager
def explained_file_errors():
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StepError(f"{error.filename}: {error.strerror}.") from None


def decoded(chunks: Iterable[bytes], path: str) -> Iterator[str]:
    """Yield chunks as text, without the byte order mark that some editors begin a file with."""
    decode, line = codecs.getincrementaldecoder("utf-8-sig")().decode, 1
    for chunk in itertools.chain(chunks, [b""]):
        try:
            yield decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            line += error.object.count(b"\n", 0, error.start)
            byte = error.object[error.start]
            raise StepError(f"{path}:{line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8.") from None
        line += chunk.count(b"\n")


def json_parser() -> Callable[[str, int], tuple[Any, int]]:
    """Return parse(text, start) -> (value, end); ValueError: not JSON. An object with a key twice makes it a Fault."""
    repeated: list[str] = []

    def one_of_each(pairs: list) -> dict:
        record = dict(pairs)
        if len(record) < len(pairs):
            repeated.extend(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        return record

    def no_constant(name: str):
        raise ValueError(f"{name} is no JSON number")

    decoder = json.JSONDecoder(object_pairs_hook=one_of_each, parse_constant=no_constant)

    def parse(text: str, start: int) -> tuple[Any, int]:
        repeated.clear()
        try:
            value, end = decoder.raw_decode(text, start)
        except RecursionError:
            raise ValueError("Nested too deeply") from None
        if repeated:
            value = Fault("duplicate-key", f"the key {named(repeated[:1])} stands twice; keep one")
        return value, end

    return parse


def read_json_lines(lines: Iterable[str], check: bool = False) -> Iterator[tuple[int, Any, str]]:
    parse = json_parser()
    for number, text in enumerate(lines, 1):
        line = text.strip(JSON_SPACE)
        if line:
            try:
                value, end = parse(line, 0)
                if end < len(line):
                    raise json.JSONDecodeError("More text after the object", line, end)
            except ValueError as error:
                place = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                value = Fault("invalid-json", f"{first_line(error)}{place}; a line must be one JSON object")
            yield number, value, line
        elif text and check:
            yield number, Fault("blank-line", "a server may count a blank line as a broken row; delete it"), ""


def first_line(error: Exception) -> str:
    return getattr(error, "msg", str(error)).partition("\n")[0]


def read_json_array(chunks: Iterator[str]) -> Iterator[tuple[int, Any, str]]:
    """Yield (line, element), with no more than an element and a chunk in memory; a syntax error ends it."""
    parse, text, line, expected, enough = json_parser(), "", 1, "[", 0
    for chunk in itertools.chain(chunks, [None]):  # None: there is no more
        text += chunk or ""
        while chunk is None or len(text) >= enough:
            stripped = text.lstrip(JSON_SPACE)
            line, text = line + text.count("\n", 0, len(text) - len(stripped)), stripped
            if not text and (chunk is not None or not expected):
                break
            try:
                if expected == "value" or (expected == "value or ]" and text[:1] != "]"):
                    value, end = parse(text, 0)
                    if chunk is not None and end + 16 > len(text):
                        break  # a number may go on in the next chunk
                    yield line, value, text[:end]
                    expected, enough = ",]", 0
                elif text and text[0] in expected:
                    end, expected = 1, {"[": "value or ]", ",": "value", "]": ""}[text[0]]
                else:
                    raise json.JSONDecodeError(f"Expecting {' or '.join(expected) or 'the end'}", text, 0)
            except ValueError as error:
                at = getattr(error, "pos", 0)
                if chunk is not None and (at + 16 > len(text) or str(error).startswith("Unterminated")):
                    enough = 2 * len(text)  # the value goes on: so as not to parse a long one for every chunk
                    break
                message = f"{first_line(error)}; mend it here, the rest of the file was not read"
                yield line + text.count("\n", 0, at), Fault("broken-file", message), ""
                return
            line, text = line + text.count("\n", 0, end), text[end:]


def read_csv(lines: Iterator[str]) -> Iterator[tuple[int, Any, str]]:
    csv.field_size_limit(2**31 - 1)  # an answer may be longer than the module's 128 KB
    rows, header, twice = csv.reader(filter(None, lines), strict=True), None, None
    while True:
        line = rows.line_num + 1
        try:
            fields = next(rows, None)
        except csv.Error as error:
            yield line, Fault("invalid-csv", f"{error}; put the field in quotes, and write a quote inside it twice"), ""
            continue
        if fields is None:
            return
        if not header:
            header = fields
            if len(header) == 1 and re.search(r"[;\t]", header[0]):
                cure = "the fields are parted by semicolons or tabs; save the file with commas"
                yield line, Fault("broken-file", cure), ""
                return
            twice = next((name for name in fields if name and fields.count(name) > 1), None)
        elif twice:
            yield line, Fault("duplicate-key", f"the column {twice!r} stands twice; keep one"), render(fields)
        elif fields and len(fields) != len(header):
            message = f"{len(fields)} fields where the header has {len(header)}; put fields with commas in quotes"
            yield line, Fault("invalid-csv", message), render(fields)
        elif fields:
            yield line, {name: value for name, value in zip(header, fields, strict=True) if name}, ""


# --- from a record to an example ---

SHAPES = (("messages",), ("question", "answer"), ("prompt", "completion"))
NOT_WRITTEN = ("id", "category")


def to_example(record: Any, system: dict | None) -> Any:
    """Return the training example that a record of one of the three shapes stands for, or the Fault that it has."""
    if not isinstance(record, dict):
        return Fault("not-an-object", 'a record must be an object, such as {"question": "...", "answer": "..."}')
    shapes = [" and ".join(shape) for shape in SHAPES if all(key in record for key in shape)]
    if not shapes:
        wanted = "question and answer, prompt and completion, or messages"
        return Fault("unknown-shape", f"found {named(record) or 'no keys'}; a record needs {wanted}, in lower case")
    if len(shapes) > 1:
        return Fault("ambiguous-shape", f"found {' as well as '.join(shapes)}; keep one of them")
    if "messages" not in record:
        question, answer = ("question", "answer") if "question" in shapes[0] else ("prompt", "completion")
        return qa_example(record[question], record[answer], system)
    messages = record["messages"]
    if isinstance(messages, list):
        messages = with_system(messages, system)
    if messages is record["messages"] and not any(key in record for key in NOT_WRITTEN):
        return record  # as it is
    return {key: value for key, value in record.items() if key not in NOT_WRITTEN} | {"messages": messages}


def qa_example(question: Any, answer: Any, system: dict | None) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": with_system(turns, system)}


def with_system(messages: list, system: dict | None) -> list:
    """Put the system message in front where there is none. `developer` is its other name, which training files lack."""
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    if "developer" in roles:
        renamed = {"role": "system"}
        return [m | renamed if role == "developer" else m for m, role in zip(messages, roles, strict=True)]
    return messages if "system" in roles or not (system and messages) else [system, *messages]


# --- the rules ---

ROLES = ("system", "user", "assistant", "tool")
KEYS = {role: {"role", "content", "name", "weight"} for role in ROLES}
KEYS |= {"assistant": KEYS["assistant"] | {"tool_calls"}, "tool": KEYS["tool"] | {"tool_call_id"}}
EXAMPLE_KEYS = {"messages", "tools", "parallel_tool_calls"}


class Message:
    """A message as the rules see it: what has the wrong type is empty here, and a fault by a rule of its own."""

    def __init__(self, raw: Any):
        self.is_object, self.raw = isinstance(raw, dict), raw if isinstance(raw, dict) else {}
        self.role = self.raw["role"] if self.raw.get("role") in ROLES else ""
        self.content: Any = self.raw.get("content")
        calls = self.raw.get("tool_calls")
        self.parts: list[dict] = []
        self.images: list[dict] = []
        self.texts: list = [self.content]
        if not isinstance(self.content, str):
            self.parts = [p for p in self.content if isinstance(p, dict)] if isinstance(self.content, list) else []
            self.images = [part for part in self.parts if part.get("type") == "image_url"]
            self.texts = [part["text"] for part in self.parts if isinstance(part.get("text"), str)]
        self.is_blank = bool(self.texts) and not self.images and not any(map(str.strip, self.texts))
        self.calls = [call for call in calls if is_function(call)] if isinstance(calls, list) else []
        self.is_trained = self.role == "assistant" and self.raw.get("weight") != 0


class Example:
    """A training example as the rules see it, and the texts of which its tokens are counted."""

    def __init__(self, raw: dict):
        self.raw, messages, tools = raw, raw.get("messages"), raw.get("tools")
        self.messages = [Message(message) for message in messages] if isinstance(messages, list) else []
        self.roles = {message.role for message in self.messages}  # "": missing or unknown
        self.functions = [tool["function"] for tool in tools if is_function(tool)] if isinstance(tools, list) else []
        self.trained_texts: list[str] = []
        self.other_texts, self.format_tokens = function_parts(self.functions)
        self.format_tokens += PRIMING_TOKENS
        for message in self.messages:
            texts = self.trained_texts if message.is_trained else self.other_texts
            texts += message.texts
            self.format_tokens += MESSAGE_TOKENS + IMAGE_TOKENS * len(message.images)
            for call in message.calls:
                texts += [call["function"]["name"], str(call["function"].get("arguments"))]
            if isinstance(message.raw.get("name"), str):
                self.other_texts.append(message.raw["name"])
                self.format_tokens += NAME_TOKENS
        self.texts = self.trained_texts + self.other_texts
        self.text = "\n".join([*self.texts, json.dumps(tools)] if tools else self.texts)
        self.has_blank_run = len(self.text) >= MAX_BLANKS and bool(BLANK_RUN.search(self.text))

    def undeclared_functions(self) -> set:
        called = {call["function"]["name"] for message in self.messages for call in message.calls}
        return called - {function["name"] for function in self.functions}

    def orphan_results(self) -> list:
        """The tool_call_id of each tool result that answers no earlier call."""
        called, orphans = [], []
        for message in self.messages:
            called += [call.get("id") for call in message.calls]
            if message.role == "tool" and message.raw.get("tool_call_id") not in called:
                orphans.append(message.raw.get("tool_call_id"))
        return orphans


def is_function(value: Any) -> bool:
    """A tool as declared, or a call of one: {"type": "function", "function": {"name": ...}}."""
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def function_parts(functions: list[dict]) -> tuple[list[str], int]:
    """Return the texts and format tokens of declared functions, by the Cookbook's rule, which knows no nesting."""
    texts, tokens = [], 12 * bool(functions)
    for function in functions:
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        properties = (
            {k: v for k, v in properties.items() if isinstance(v, dict)} if isinstance(properties, dict) else {}
        )
        texts.append(f"{function['name']}:{str(function.get('description', '')).removesuffix('.')}")
        tokens += 7 + 3 * bool(properties)
        for key, value in properties.items():
            choices = value["enum"] if isinstance(value.get("enum"), list) else []
            texts += [f"{key}:{value.get('type', '')}:{str(value.get('description', '')).removesuffix('.')}"]
            texts += map(str, choices)
            tokens += 3 + (3 * len(choices) - 3 if choices else 0)
    return texts, tokens


def has_valid_content(message: Message) -> bool:
    """A string, or for all but `tool` a list of text parts, with images among them for the user."""
    if message.role == "tool" or not isinstance(message.content, list):
        return isinstance(message.content, str)
    texts = [part for part in message.parts if part.get("type") == "text" and isinstance(part.get("text"), str)]
    images = [part for part in message.images if isinstance(part.get("image_url"), dict) and message.role == "user"]
    return 0 < len(message.content) == len(texts) + len(images)


def has_valid_calls(message: Message) -> bool:
    calls = message.raw["tool_calls"]
    return isinstance(calls, list) and 0 < len(calls) == len([c for c in message.calls if isinstance(c.get("id"), str)])


def is_json(text: Any) -> bool:
    try:
        json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return False
    return isinstance(text, str)


def secrets_in(text: str) -> str:
    found = [match.start() for match in SECRET.finditer(text)]
    return ", ".join(sorted({name for at in found for name, one in SECRET_PATTERNS if re.compile(one).match(text, at)}))


def named(values: Iterable) -> str:
    """'a', 'b': each value once, cut to what a line can take, and without secrets."""
    return "" if not values else ", ".join(sorted({repr(SECRET.sub("[secret]", str(value))[:40]) for value in values}))


class Rule(NamedTuple):
    """A line of the table: `find` looks at what `judges` names and returns what is wrong, or something empty.

    judges: "example"; "message", every message; only those of one role; or "roleless", those whose role is not known.
    """

    kind: str
    level: str
    judges: str
    find: Callable[[Any], Any]
    sentence: str  # with {} for what was found


# fmt: off
RULES = (
    Rule("missing-messages", "error", "example", lambda e: not e.messages,
         "`messages` is missing or empty; it needs a user message and the assistant's answer"),
    Rule("unknown-key", "error", "example", lambda e: named(e.raw.keys() - EXAMPLE_KEYS),
         "the API rejects {} beside `messages`; delete it"),
    Rule("no-user-message", "error", "example", lambda e: e.messages and "user" not in e.roles,
         "there is no user message; add what the assistant answers to"),
    Rule("no-assistant-message", "error", "example", lambda e: e.messages and "assistant" not in e.roles,
         "there is no assistant message, so nothing to learn; add the answer"),
    Rule("nothing-trained", "error", "example", lambda e: (
         "assistant" in e.roles and not any(message.is_trained for message in e.messages)),
         "every assistant message has weight 0, so nothing is learnt; take the weight off one"),
    Rule("last-not-assistant", "warning", "example", lambda e: (
         "assistant" in e.roles and e.messages[-1].role != "assistant"),
         "what follows the last assistant message teaches nothing; end with the answer"),
    Rule("invalid-tools", "error", "example", lambda e: "tools" in e.raw and (
         not isinstance(e.raw["tools"], list) or len(e.raw["tools"]) > len(e.functions)),
         "`tools` must be a list of tools of type function, each with a function that has a name"),
    Rule("invalid-tools", "error", "example", lambda e: not isinstance(e.raw.get("parallel_tool_calls", True), bool),
         "`parallel_tool_calls` must be true or false"),
    Rule("unknown-function", "error", "example", lambda e: named(e.undeclared_functions()),
         "the function {} is called but not in `tools`; declare it there"),
    Rule("orphan-tool-result", "error", "example", lambda e: "tool" in e.roles and named(e.orphan_results()),
         "the tool result for {} answers no earlier call; its tool_call_id must be the id of one"),
    Rule("invalid-message", "error", "roleless", lambda m: not m.is_object,
         "a message must be an object with `role` and `content`"),
    Rule("missing-role", "error", "roleless", lambda m: m.is_object and "role" not in m.raw,
         f"`role` is missing; write one of {', '.join(ROLES)}"),
    Rule("unknown-role", "error", "roleless", lambda m: "role" in m.raw and named([m.raw["role"]]),
         f"the role {{}} is unknown; write one of {', '.join(ROLES)}"),
    Rule("unknown-key", "error", "message", lambda m: named(m.raw.keys() - KEYS[m.role]),
         "the API rejects {} here; delete it"),
    Rule("missing-content", "error", "message", lambda m: m.content is None and not m.raw.get("tool_calls"),
         "`content` is missing; write the text"),
    Rule("invalid-content", "error", "message", lambda m: m.content is not None and not has_valid_content(m),
         "`content` must be text (a tool's result one string; a user's message may be a list of texts and images)"),
    Rule("empty-question", "error", "user", lambda m: m.is_blank,
         "the user's message is empty; write it or delete the row"),
    Rule("empty-answer", "error", "assistant", lambda m: m.is_blank and not m.calls,
         "the answer is empty; write one or delete the row"),
    Rule("short-answer", "warning", "assistant", lambda m: m.is_trained and m.texts and not m.is_blank and not m.calls
         and sum(map(len, m.texts)) < SHORT_ANSWER,
         f"the answer has fewer than {SHORT_ANSWER} characters; the model will learn to be as brief"),
    Rule("invalid-name", "error", "message", lambda m: not isinstance(m.raw.get("name", ""), str),
         "`name` must be a text"),
    Rule("invalid-weight", "error", "assistant", lambda m: repr(m.raw.get("weight", 1)) not in ("0", "1"),
         "`weight` must be 0 (not learnt) or 1"),
    Rule("invalid-weight", "error", "message", lambda m: "weight" in m.raw and m.role != "assistant",
         "`weight` belongs to assistant messages alone; delete it"),
    Rule("invalid-tool-call", "error", "assistant", lambda m: "tool_calls" in m.raw and not has_valid_calls(m),
         "`tool_calls` must be a list of calls of type function, each with an id and a function that has a name"),
    Rule("invalid-arguments", "error", "assistant", lambda m: not all(
         is_json(call["function"].get("arguments")) for call in m.calls),
         "the `arguments` of a tool call must be JSON written as a text"),
    Rule("control-token", "error", "example", lambda e: "<|" in e.text and named(CONTROL_TOKEN.findall(e.text)),
         "the text holds {}, which the API rejects; delete it or write it differently"),
    Rule("secret", "error", "example", lambda e: secrets_in(e.text),
         "the text holds {}, which the model would learn; take it out, and revoke it if it is real"),
    Rule("blank-run", "error", "example", lambda e: e.has_blank_run,
         f"the text has {MAX_BLANKS:,} blanks in a row, on which tokenizers fail; shorten them"),
)
# fmt: on
RULES_FOR = {role: [rule for rule in RULES if rule.judges in (role, "message")] for role in ROLES}
RULES_FOR |= {"": [rule for rule in RULES if rule.judges == "roleless"]}
EXAMPLE_RULES = [rule for rule in RULES if rule.judges == "example"]

# What no look at one example finds: faults of reading, of counting, between rows, and of the file as a whole.
WARNINGS = ["byte-order-mark", "blank-line", "duplicate", "conflicting-answer", "differing-system"]
WARNINGS += ["held-out", "validation-overlap", "few-examples"]
ERRORS = ["invalid-json", "invalid-csv", "duplicate-key", "not-an-object", "unknown-shape", "ambiguous-shape"]
ERRORS += ["lone-surrogate", "too-many-tokens"]
FILE_ERRORS = ["broken-file", "too-few-examples", "file-too-large"]  # nothing is written while one of these stands
LEVELS = {rule.kind: rule.level for rule in RULES} | dict.fromkeys(WARNINGS, "warning")
LEVELS |= dict.fromkeys((*ERRORS, *FILE_ERRORS), "error")


def faults_in(example: Example, first: int | None = 1) -> Iterator[Fault]:
    """Yield every fault that the table finds in an example, its messages numbered from `first` or not at all."""
    for rule in EXAMPLE_RULES:
        if found := rule.find(example):
            yield Fault(rule.kind, rule.sentence.format(found))
    for number, message in enumerate(example.messages, first or 0):
        for rule in RULES_FOR[message.role]:
            if found := rule.find(message):
                place = "" if first is None else f"message {number}: "
                yield Fault(rule.kind, place + rule.sentence.format(found))


# --- counting tokens ---


class TokenCounter:
    """Counts texts in a model's encoding. `counted` says how: "exact"; "approximate", where tiktoken does not know the
    model and o200k_base stands in; or "estimated", where the vocabulary cannot be had."""

    def __init__(self, model: str):
        import tiktoken  # imported here, so that --help does not wait for it

        self.encoding_name, self.counted = "o200k_base", "approximate"
        with suppress(KeyError):
            self.encoding_name, self.counted = tiktoken.encoding_name_for_model(base_model(model)), "exact"
        self.encoding, why = load_encoding(self.encoding_name)
        if self.encoding is None:
            self.counted = "estimated"
            print(f"warning: {why}, so token counts are estimates (bytes / 4).", file=sys.stderr)

    def count(self, texts: Iterable[str]) -> dict[str, int]:
        """Return {text: tokens}, by one call of tiktoken for all: it lets other threads run meanwhile."""
        unique = list(dict.fromkeys(texts))  # a system prompt that stands in every row is counted once
        if self.encoding is None:
            return {text: -(-len(text.encode("utf-8", "replace")) // 4) for text in unique}
        # No token reaches across the end-of-text token, so it keeps the texts apart and each count exact.
        joined = END_OF_TEXT.join(text.replace(END_OF_TEXT, "") for text in unique)
        tokens = self.encoding.encode(joined, allowed_special={END_OF_TEXT}, disallowed_special=())
        tokens.append(self.encoding.eot_token)
        counts, start = {}, 0
        for text in unique:
            end = tokens.index(self.encoding.eot_token, start)
            counts[text], start = end - start, end + 1
        return counts

    def example_tokens(self, example: Example, counts: dict[str, int]) -> tuple[int, int]:
        """Return (all tokens, those trained on) of an example, whose texts have been counted."""
        trained = sum(counts[text] for text in example.trained_texts)
        total = example.format_tokens + trained + sum(counts[text] for text in example.other_texts)
        return total + 3 * len(example.functions) * (self.encoding_name == "cl100k_base"), trained


def load_encoding(name: str) -> tuple[Any, str]:
    """Return (encoding, "") or (None, why). tiktoken downloads what it has not cached, and knows no timeout."""
    import tiktoken

    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    folder = str(HERE / folder) if folder else os.path.join(tempfile.gettempdir(), "data-gym-cache")
    os.environ["TIKTOKEN_CACHE_DIR"] = folder  # one that .env names is relative to .env, wherever the script is called
    url = f"https://openaipublic.blob.core.windows.net/encodings/{name}.tiktoken"
    is_cached = os.path.exists(os.path.join(folder, hashlib.sha1(url.encode()).hexdigest()))
    outcome: list = [None, f"the vocabulary of {name} did not arrive within {DOWNLOAD_SECONDS} s"]

    def load():
        try:
            outcome[:] = tiktoken.get_encoding(name), ""
        except (OSError, ValueError) as error:  # what requests raises is an OSError
            outcome[1] = f"the vocabulary of {name} could not be downloaded ({type(error).__name__})"

    thread = threading.Thread(target=load, daemon=True)  # a daemon, so that a hanging download does not keep us alive
    thread.start()
    thread.join(60 if is_cached else DOWNLOAD_SECONDS)
    return outcome[0], outcome[1]


def base_model(model: str) -> str:
    """The base of a fine-tuned model's id: tiktoken 0.14 maps ft:gpt-4.1-mini-2025-04-14:org::id wrongly."""
    return model.split(":")[1] if model.startswith("ft:") else model


# --- comparing rows ---

TURN = "\0"  # between the messages of a prompt


def said(messages: Iterable[Message]) -> bytes:
    """What messages say, without what does not change it: case, white space and Unicode form."""
    texts = [render([m.content, m.calls]) if m.parts or m.calls else "".join(m.texts) for m in messages]
    plain = unicodedata.normalize("NFKC", TURN.join(texts)).casefold().encode("utf-8", "surrogatepass")
    return plain.translate(None, b" \t\n\r\v\f")


class FirstPlaces:
    """Where each thing stood first. SQLite keeps it in a temporary file, so that memory does not grow with the rows."""

    def __init__(self):
        import sqlite3  # imported here, so that --help does not wait for it

        self.database = sqlite3.connect("")
        self.database.execute("PRAGMA journal_mode = OFF")
        self.database.execute("PRAGMA cache_size = -32000")  # KB
        self.database.execute("CREATE TABLE first (thing INTEGER PRIMARY KEY, place TEXT)")

    def find(self, thing: Any) -> str | None:
        found = self.database.execute("SELECT place FROM first WHERE thing = ?", (hash(thing),)).fetchone()
        return found and found[0]

    def meet(self, thing: Any, place: str) -> str | None:
        """Return where a thing stood before; None if it is new, and then remember it."""
        insertion = self.database.execute("INSERT OR IGNORE INTO first VALUES (?, ?)", (hash(thing), place))
        return None if insertion.rowcount else self.find(thing)


class Comparer:
    """Sorts rows, and warns of what one says against those before it and against the test cases."""

    def __init__(self, held_out: str | None, validation_split: float, check: bool):
        self.held_out_file, self.held_out = held_out, read_held_out(held_out) if held_out else {}
        self.validation_split, self.check, self.places = validation_split, check, FirstPlaces()
        self.first_system: tuple[bytes, str] | None = None
        self.told_of_system = False

    def sort(self, row: "Row", source: str):
        """Set row.side, where the row goes; `source` is "training" or "validation", the file it stands in."""
        if not row.is_valid:
            row.side = "rejected"
        elif row.example:  # else it is a blank line
            messages, row.side = row.example.messages, source
            last = max(number for number, message in enumerate(messages) if message.role == "assistant")
            prompt = said(message for message in messages[:last] if message.role != "system")
            system = said(message for message in messages if message.role == "system")
            known_as = (prompt, system, render(row.example.raw.get("tools")))
            if source == "training":
                self.compare(row, known_as, said(messages[last:]))
            elif earlier := self.places.find(known_as):
                row.fault("validation-overlap", f"the same prompt as {earlier} in training; keep it in one of the two")

    def compare(self, row: "Row", known_as: tuple, answer: bytes):
        (prompt, system, _), place = known_as, f"{row.file}:{row.line}"
        same_prompt = self.places.meet(known_as, place)
        alike = self.places.meet((known_as, answer), place)
        same = self.places.meet(row.data, place)
        if same:
            row.fault("duplicate", f"the same as {same}; " + ("delete one" if self.check else "left out"))
        elif alike:
            row.fault("duplicate", f"the same as {alike} but for case, white space or Unicode form; keep one")
        elif same_prompt:
            row.fault("conflicting-answer", f"the prompt of {same_prompt} with another answer; keep the better one")
        if same and not self.check:
            row.side = "repeated"
        elif self.validation_split and in_validation(prompt, self.validation_split):
            row.side = "validation"
        self.first_system = self.first_system or (system, place)
        if system != self.first_system[0] and not self.told_of_system:
            row.fault("differing-system", f"another system message than {self.first_system[1]}; this is told once")
            self.told_of_system = True
        for case in {prompt, *prompt.split(TURN.encode())} & self.held_out.keys():
            row.fault("held-out", f"{self.held_out[case]} of {self.held_out_file}; a test must be new to the model")


def in_validation(prompt: bytes, split: float) -> bool:
    """Whether a prompt goes to validation: by its content alone, so that new rows move no old one."""
    digest = hashlib.blake2b(prompt, digest_size=8).digest()
    return int.from_bytes(digest, "big") < split * 2**64


def read_held_out(path: str) -> dict[bytes, str]:
    """Return {prompt: "test case ID"} of test cases: {"cases": [...]}, an array of cases or JSON Lines."""
    with explained_file_errors(), open(path, "rb") as file:
        try:
            cases = json.loads("".join(decoded(file, path)))
            cases = cases.get("cases", [cases]) if isinstance(cases, dict) else cases
        except (ValueError, RecursionError):
            cases = [value for _, value, _ in read_records(path)]
    prompts = {}
    for number, case in enumerate(cases if isinstance(cases, list) else [None], 1):
        if not isinstance(case, dict) or not isinstance(case.get("question"), str):
            raise StepError(f"{path}: test case {number} has no `question`.")
        history = case["history"] if isinstance(case.get("history"), list) else []
        turns = [Message(turn) for turn in [*history, {"role": "user", "content": case["question"]}]]
        prompts[said(turn for turn in turns if turn.role != "system")] = f"test case {case.get('id', number)}"
    return prompts


# --- what becomes of a row, and what is told of all ---


@dataclass(slots=True)
class Row:
    """One record on its way from the input to the output."""

    file: str
    line: int
    record: Any
    text: str = ""  # of the record, as it stood
    example: Example | None = None
    data: bytes = b""  # the line to write
    tokens: int = 0
    trained_tokens: int = 0
    side: str = ""  # "training", "validation", "repeated" or "rejected"; "": not a row but a blank line
    problems: list[Problem] = field(default_factory=list)

    def fault(self, kind: str, message: str):
        self.problems.append(Problem(self.file, self.line, LEVELS[kind], kind, message))

    @property
    def is_valid(self) -> bool:
        return all(problem.level != "error" for problem in self.problems)

    def as_rejected(self) -> bytes:
        """The line that --rejected keeps: where the row stood, what is wrong with it, and the record as it was."""
        errors = [f"{problem.kind}: {problem.message}" for problem in self.problems if problem.level == "error"]
        record = self.text if isinstance(self.record, Fault) else self.record
        return json.dumps({"file": self.file, "line": self.line, "errors": errors, "record": record}).encode() + b"\n"


@dataclass
class Report:
    """What prepare_data found. Examples, messages and tokens are those of the training side."""

    model: str
    encoding: str
    counted: str  # "exact", "approximate" or "estimated": see TokenCounter
    price: float | None  # USD per 1M training tokens; 0.0 on the local API, None where no price is known
    telling: Callable[[Problem], None] | None = None  # told each problem; without it `problems` keeps them
    records: int = 0
    invalid: int = 0
    duplicates: int = 0
    examples: int = 0
    validation_examples: int = 0
    messages: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    system_prompt: str | None = None  # the one that every training row starts with
    ignored_columns: list[str] = field(default_factory=list)
    errors: int = 0
    warnings: int = 0
    blocked: bool = False  # by a fault of the file as a whole
    written: dict[str, str] = field(default_factory=dict)  # {path: what became of it}
    problems: list[Problem] = field(default_factory=list)
    sizes: Counter = field(default_factory=Counter)  # {tokens: how many examples have that many}

    def tell(self, problem: Problem):
        self.errors += problem.level == "error"
        self.warnings += problem.level == "warning"
        self.blocked |= problem.kind in FILE_ERRORS
        (self.telling or self.problems.append)(problem)

    def add(self, row: Row):
        for problem in row.problems:
            self.tell(problem)
        self.records += row.side != ""
        self.invalid += row.side == "rejected"
        self.duplicates += row.side == "repeated"
        self.validation_examples += row.side == "validation"
        if isinstance(row.record, dict) and "messages" not in row.record and row.side != "rejected":
            self.ignored_columns += row.record.keys() - {*sum(SHAPES, ()), *NOT_WRITTEN, *self.ignored_columns}
        if row.side == "training" and row.example:
            first = row.example.messages[0]
            system = first.content if first.role == "system" and isinstance(first.content, str) else None
            self.system_prompt = system if not self.examples or system == self.system_prompt else None
            self.examples += 1
            self.messages += len(row.example.messages)
            self.tokens += row.tokens
            self.trained_tokens += row.trained_tokens
            self.sizes[row.tokens] += 1

    @property
    def epochs(self) -> int:
        return auto_epochs(self.examples)

    @property
    def billed_tokens(self) -> int:
        return self.tokens * self.epochs

    @property
    def estimated_cost(self) -> float | None:
        return self.cost(self.epochs)

    def cost(self, epochs: int) -> float | None:
        """USD for this many epochs; None where no price is known."""
        return None if self.price is None else self.tokens * epochs * self.price / 1e6

    def tokens_per_example(self) -> dict[str, int]:
        sizes = sorted(self.sizes)
        up_to = list(itertools.accumulate(self.sizes[size] for size in sizes))  # examples of at most this size
        shares = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
        return {
            name: sizes[bisect_left(up_to, share * self.examples)] if sizes else 0 for name, share in shares.items()
        }


def auto_epochs(examples: int) -> int:
    """The epochs that `auto` chooses: 3, but 1 to 25 to have 100 to 25,000 examples in all.

    Source: https://github.com/openai/openai-cookbook, examples/Chat_finetuning_data_prep.ipynb
    """
    if examples * 3 < 100:
        return min(25, 100 // max(1, examples))
    return 3 if examples * 3 <= 25_000 else max(1, 25_000 // examples)


def training_price(model: str) -> float | None:
    """USD per 1M training tokens: 0.0 on the local API, None where no price is known."""
    host = urlsplit(os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1").hostname or ""
    if host in ("localhost", "::1") or host.startswith("127."):
        return 0.0
    name = base_model(model)  # also without its date: gpt-4.1-mini
    known = [price for dated, price in PRICES.items() if dated == name or dated.startswith(name + "-20")]
    return known[0] if known and host == "api.openai.com" else None


# --- writing ---


def render(value: Any) -> str:
    return JSON_ENCODER.encode(value)


class AtomicFile:
    """A file that appears whole or not at all: written beside its target, synced, and renamed over it."""

    def __init__(self, path: str):
        self.name, self.path = path, Path(os.path.realpath(path))  # the file that a link leads to, not the link
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        if self.path.is_dir():
            raise StepError(f"{path} is a folder; name a file.")
        if not os.access(self.path.parent, os.W_OK):
            raise StepError(f"{path} cannot be written: its folder is missing or read-only; name another file.")
        self.file = open(self.temporary, "wb", buffering=CHUNK_BYTES)  # noqa: SIM115 (closed in __exit__)

    def __enter__(self) -> "AtomicFile":
        return self

    def __exit__(self, *_):
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
            outcome = f"written; the one that stood there is kept as {self.keep_old()}"
        os.replace(self.temporary, self.path)
        return outcome

    def keep_old(self) -> str:
        """Give the old file a second name; its own it keeps until the rename."""
        names = (self.path.with_name(f"{self.path.name}.bak{number or ''}") for number in itertools.count())
        kept = next(name for name in names if not name.exists())
        try:
            os.link(self.path, kept)
        except OSError:  # a file system that has no links
            shutil.copy2(self.path, kept)
        return kept.name


def save_to_jsonl(examples: Iterable[dict], path: str) -> str:
    """Write examples as JSON Lines, whole or not at all; return what became of the file, as AtomicFile.commit does."""
    with explained_file_errors(), AtomicFile(path) as output:
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
        rows = self.judge([("example", 1, example, "")], check=True)
        return [problem for row in rows for problem in row.problems]

    def count_tokens(self, what: str | list[dict] | dict) -> int:
        """Return the tokens of a text, of a list of messages, or of an example with its messages and tools."""
        if isinstance(what, str):
            return self.counter.count([what])[what]
        example = Example(what if isinstance(what, dict) else {"messages": what})
        return self.counter.example_tokens(example, self.counter.count(example.texts))[0]

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
        progress: Callable[[int], None] | None = None,
    ) -> Report:
        """Judge `inputs` (a path, or a list of paths or records); write what can be trained on to `output`, if given.

        With `check` the inputs are judged as an upload would be, and with them the validation file that
        validation_output names. Each Problem goes to `tell`, or into Report.problems; `progress` is called now and then
        with the number of records. Prints nothing. Raises StepError for a file that cannot be read or written.
        """
        given = inputs if isinstance(inputs, list) else [inputs]
        report = Report(self.model, self.counter.encoding_name, self.counter.counted, training_price(self.model), tell)
        comparer = Comparer(held_out, validation_split, check)
        paths = {"training": output, "validation": validation_split and validation_output, "rejected": rejected}
        sources = {"training": given} | ({"validation": [validation_output]} if check and validation_output else {})
        with explained_file_errors(), ExitStack() as stack:
            files = {side: stack.enter_context(AtomicFile(path)) for side, path in paths.items() if path and not check}
            for source, records in sources.items():
                for row in self.judge(records_of(records, check), check):
                    comparer.sort(row, source)
                    report.add(row)
                    if row.side in files:
                        files[row.side].file.write(row.as_rejected() if row.side == "rejected" else row.data)
                    if progress and report.records % 1000 == 0:
                        progress(report.records)
            names = [os.fspath(item) for item in given if isinstance(item, (str, os.PathLike))]
            size = files["training"].file.tell() if output else max(map(os.path.getsize, names), default=0)
            for kind, message in file_faults(report, size, validation_split):
                report.tell(Problem(output or (names or ["examples"])[0], None, LEVELS[kind], kind, message))
            if not report.blocked and not (strict and report.invalid):
                report.written = {file.name: file.commit() for file in files.values()}
        return report

    def judge(self, records: Iterable[tuple[str, int, Any, str]], check: bool) -> Iterator[Row]:
        """Yield a row for each (file, line, value, text), in order; threads count the tokens, block by block."""
        from concurrent.futures import ThreadPoolExecutor  # imported here, so that --help does not wait for it

        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        waiting: deque = deque()
        block, size = [], 0
        with ThreadPoolExecutor(threads) as pool:
            for record in records:
                row = self.judged_row(Row(*record), check)
                block.append(row)
                size += 1000 + len(row.data)
                if size > BLOCK_BYTES:
                    waiting.append(pool.submit(self.count_block, block))
                    block, size = [], 0
                if len(waiting) > threads:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        yield from self.count_block(block)

    def judged_row(self, row: Row, check: bool) -> Row:
        is_example = check and isinstance(row.record, dict)
        example = row.record if is_example or isinstance(row.record, Fault) else to_example(row.record, self.system)
        if isinstance(example, Fault):
            row.fault(example.kind, example.message)
            return row
        try:
            row.example = Example(example)
            added = any(message.raw is self.system for message in row.example.messages[:1])
            first = (0 if added else 1) if "messages" in row.record else None  # the reader's own messages count from 1
            for fault in faults_in(row.example, first):
                row.fault(fault.kind, fault.message)
            # A line that stays as it is need not be made again. Escapes are made again: half characters hide in them.
            is_line = example is row.record and row.text and "\n" not in row.text and "\\u" not in row.text
            row.data = (row.text if is_line else render(example)).encode() + b"\n"
        except UnicodeEncodeError:
            row.fault("lone-surrogate", "the text holds half of a character (\\ud800 to \\udfff); delete or mend it")
        except RecursionError:
            row.record = None  # --rejected could not write it either
            row.fault("invalid-json", "the record is nested too deeply")
        except ValueError:
            row.fault("invalid-json", "a number is not finite, which JSON cannot say; write another or delete it")
        return row

    def count_block(self, rows: list[Row]) -> list[Row]:
        limit = TOKEN_LIMITS.get(base_model(self.model), TOKEN_LIMIT)
        examples = [(row, row.example) for row in rows if row.example and not row.example.has_blank_run]
        counts = self.counter.count(text for _, example in examples for text in example.texts)
        for row, example in examples:
            row.tokens, row.trained_tokens = self.counter.example_tokens(example, counts)
            if row.tokens > limit:
                over = f"{row.tokens:,} tokens, of which {self.model} reads the first {limit:,}"
                row.fault("too-many-tokens", f"{over}: the end, which is the answer, would be cut off; shorten it")
        return rows


def records_of(inputs: list, check: bool) -> Iterator[tuple[str, int, Any, str]]:
    """Yield (file, line, value, text) for each record of a list of paths, or of records."""
    for number, given in enumerate(inputs, 1):
        if isinstance(given, (str, os.PathLike)):
            yield from ((os.fspath(given), *record) for record in read_records(os.fspath(given), check))
        else:
            yield "examples", number, given, ""


def file_faults(report: Report, size: int, validation_split: float) -> Iterator[Fault]:
    """Yield what is wrong with a training file of `size` bytes as a whole."""
    if report.examples < MIN_EXAMPLES:
        yield Fault("too-few-examples", f"{report.examples} valid examples; training takes {MIN_EXAMPLES} or more")
    elif report.examples < ADVISED_EXAMPLES:
        yield Fault("few-examples", f"{report.examples} examples; with fewer than {ADVISED_EXAMPLES} little is learnt")
    if validation_split and not report.validation_examples:
        yield Fault("too-few-examples", f"no prompt falls into a validation split of {validation_split}; raise it")
    if size > MAX_FILE_BYTES:
        over = f"{size / 2**20:,.0f} MB, and an upload may have {MAX_FILE_BYTES // 2**20}"
        cure = "train on parts of it in turn, or send it in parts (client.uploads.upload_file_chunked)"
        yield Fault("file-too-large", f"{over}; {cure}")


def validate_training_data(examples: Iterable[dict]) -> list[Problem]:
    """Return every problem of a list of training examples; Problem.line is the example's position, from 1."""
    return TrainingDataPreparator().prepare_data(list(examples), check=True).problems


def check_training_file(path: str, model: str | None = None, validation_file: str | None = None) -> Report:
    """Judge a training file, and with it a validation file, as --check does. StepError where one cannot be read."""
    return TrainingDataPreparator(model).prepare_data(path, check=True, validation_output=validation_file)


# --- the command line ---


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make a training file of questions and answers, and find every fault.")
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="JSON, JSON Lines or CSV files (default: the TechFlow examples)")
    add("-o", "--output", metavar="FILE", help=f"default: {DEFAULT_OUTPUT}")
    add("--check", action="store_true", help=f"judge INPUT (default: {DEFAULT_OUTPUT}) as an upload; write nothing")
    add("--system", default=SYSTEM_PROMPT, metavar="TEXT", help="system message where a record has none")
    add("--model", help=f"base model (default: FINE_TUNE_MODEL, else {DEFAULT_MODEL})")
    add("--validation-split", type=share, default=0.0, metavar="F", help="set this share of the prompts apart, say 0.1")
    where = f"where to (default: {DEFAULT_VALIDATION_OUTPUT}); with --check: a validation file to judge too"
    add("--validation-output", metavar="FILE", help=where)
    cases = "test cases that training must not see (default: test_cases.json beside INPUT, if there)"
    add("--held-out", metavar="FILE", help=cases)
    add("--rejected", metavar="FILE", help="keep the rows that cannot be trained on, with the reasons")
    add("--strict", action="store_true", help="write nothing if one row has an error")
    add("--json", action="store_true", help="print one JSON document and nothing else")
    return parser


def share(text: str) -> float:
    if not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


def run(args: argparse.Namespace) -> int:
    if args.check and (args.output or args.rejected or args.validation_split):
        raise StepError("--check writes nothing: leave -o, --rejected and --validation-split away.")
    if args.validation_output and not (args.check or args.validation_split):
        raise StepError("--validation-output needs --validation-split, the share that goes there.")
    tutorial = DEFAULT_INPUT if os.path.exists(DEFAULT_INPUT) else str(HERE / DEFAULT_INPUT)
    inputs = args.inputs or [DEFAULT_OUTPUT if args.check else tutorial]
    output = None if args.check else args.output or DEFAULT_OUTPUT
    validation_output = args.validation_output or (DEFAULT_VALIDATION_OUTPUT if args.validation_split else None)
    beside = os.path.join(os.path.dirname(inputs[0]), "test_cases.json")
    held_out = args.held_out or (beside if os.path.exists(beside) else None)
    refuse_overwriting([*inputs, held_out], [] if args.check else [output, validation_output, args.rejected])
    options = {"check": args.check, "strict": args.strict, "validation_split": args.validation_split}
    options |= {"validation_output": validation_output, "held_out": held_out, "rejected": args.rejected}
    if not args.json:
        options["tell"] = lambda problem: print(problem, file=sys.stderr)
    if sys.stderr.isatty():
        options["progress"] = lambda records: print(f"{records:,} records\r", end="", file=sys.stderr, flush=True)
    report = TrainingDataPreparator(args.model, args.system).prepare_data(inputs, output, **options)
    if args.json:
        print(json.dumps(as_document(report), indent=2))
    else:
        print_report(report, held_out)
        print_outcome(report, args, validation_output)
    return 1 if report.blocked or (args.check and report.errors) or (args.strict and report.invalid) else 0


def refuse_overwriting(read: list, written: list):
    seen = {os.path.realpath(path) for path in read if path}
    for path in filter(None, written):
        if os.path.realpath(path) in seen:
            raise StepError(f"{path} is read or written already in this run; name another output with -o, or --check.")
        seen.add(os.path.realpath(path))


def as_document(report: Report) -> dict:
    """What --json prints."""
    document = {key: value for key, value in vars(report).items() if key not in ("problems", "sizes", "telling")}
    document["tokens_per_example"] = report.tokens_per_example()
    document |= {"epochs": report.epochs, "billed_tokens": report.billed_tokens, "prices_as_of": PRICES_DATE}
    document |= {"estimated_cost": report.estimated_cost, "problems": [p._asdict() for p in report.problems]}
    return document


def print_report(report: Report, held_out: str | None):
    how = {"exact": "", "approximate": f", approximate: tiktoken does not know {report.model}"}
    sizes = ", ".join(f"{name} {size:,}" for name, size in report.tokens_per_example().items())
    cost = f"no price known for {report.model}"
    if report.price is not None:
        rate = f"{report.model}: ${report.price:.2f} per 1M tokens, as of {PRICES_DATE}"
        cost = f"${report.estimated_cost:,.2f} ({rate})" if report.price else "free: the local API trains it here"
    lines = [
        ("Records", f"{report.records:,}: {report.records - report.invalid:,} valid, {report.invalid:,} invalid"),
        ("Left out", report.duplicates and f"{report.duplicates:,} exact duplicates"),
        ("Ignored columns", named(report.ignored_columns)),
        ("Examples", f"{report.examples:,}"),
        ("  for validation", report.validation_examples and f"{report.validation_examples:,} others"),
        ("Messages", f"{report.messages:,}"),
        ("Tokens", f"{report.tokens:,} ({report.encoding}{how.get(report.counted, ', estimated: bytes / 4')})"),
        ("  per example", "\n".join([sizes, *histogram(report.sizes)])),
        ("  trained on", f"{report.trained_tokens:,} (assistant messages of weight 1)"),
        ("  billed", f"{report.billed_tokens:,} ({report.epochs} epochs, as `auto` chooses)"),
        ("Estimated cost", cost),
        ("Test cases", held_out and f"{held_out} (compared with the training data)"),
        ("Problems", f"errors {report.errors:,}, warnings {report.warnings:,}"),
    ]
    for name, value in lines:
        if value:
            print(f"{name:<17}{value}")


def histogram(sizes: Counter, bars: int = 8) -> Iterator[str]:
    """Yield a line for each bar: its range of tokens and how many examples are in it."""
    low, high = min(sizes, default=0), max(sizes, default=0)
    step = (high - low) // bars + 1
    heights = [sum(sizes[n] for n in sizes if start <= n < start + step) for start in range(low, high + 1, step)]
    for number, height in enumerate(heights if sizes else []):
        bounds = f"{low + number * step:,}-{low + number * step + step - 1:,}"
        yield f"{bounds:>19}  {'#' * math.ceil(40 * height / max(heights))} {height:,}"


def print_outcome(report: Report, args: argparse.Namespace, validation_output: str | None):
    print("\n".join(["", *(f"{path}: {outcome}" for path, outcome in report.written.items())]))
    if report.written:
        validation = f" --validation-file {shlex.quote(validation_output or '')}" if report.validation_examples else ""
        print(f"Next: python fine_tune.py{' ' + shlex.quote(args.output) if args.output else ''}{validation}")
    elif args.check:
        print("This file cannot be trained on as it is." if report.errors else "No errors: this file can be uploaded.")
    else:
        print("Nothing was written: correct the errors and run this again.")


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 must not end the run
    try:
        return run(args)
    except StepError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        print(f"{error.name} is not installed: python -m pip install -r requirements.txt", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted; no file is half written. Run the same command again.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
