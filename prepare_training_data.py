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
import shutil
import sqlite3
import sys
import tempfile
import threading
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
DEFAULT_INPUT = HERE / "examples" / "techflow_support" / "qa_pairs.json"
DEFAULT_OUTPUT, DEFAULT_VALIDATION_OUTPUT = "training_data.jsonl", "validation_data.jsonl"
DEFAULT_MODEL = "gpt-4.1-mini-2025-04-14"

# USD per 1M training tokens, from https://developers.openai.com/api/docs/pricing. Other models have no known price.
PRICES_DATE = "2026-07"  # the page has shown no training prices since
PRICES = {
    "gpt-4.1-2025-04-14": 25.00,
    "gpt-4.1-mini-2025-04-14": 5.00,
    "gpt-4o-2024-08-06": 25.00,
    "gpt-4o-mini-2024-07-18": 3.00,
}
TOKEN_LIMIT = 65_536  # tokens an example may have; https://developers.openai.com/api/docs/guides/fine-tuning-best-practices
TOKEN_LIMITS = {"smollm2-135m-instruct": 8_192}  # models with a smaller context
MIN_EXAMPLES, ADVISED_EXAMPLES = 10, 50  # https://developers.openai.com/api/docs/guides/supervised-fine-tuning
MAX_FILE_BYTES = 512 * 1024 * 1024
SHORT_ANSWER = 50  # characters
MAX_BLANKS = 100_000  # in a row: tiktoken panics at about a million (openai/tiktoken issue 15)

# What the chat format adds to the texts: openai/openai-cookbook, How_to_count_tokens_with_tiktoken.ipynb.
MESSAGE_TOKENS, NAME_TOKENS, PRIMING_TOKENS = 3 + 1, 1, 3  # a message's 3 and its role, one token in every encoding
IMAGE_TOKENS = 85  # at low detail; at high detail it depends on the image, which is not looked at
DOWNLOAD_SECONDS = 10  # for a vocabulary: tiktoken itself would wait for ever
BLOCK_BYTES = 100_000  # that a thread counts at a time: enough that threads seldom wait for each other
CHUNK_BYTES = 1 << 20

JSON_SPACE = re.compile(r"[ \t\n\r]*")
JSON_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
END_OF_TEXT = "<|endoftext|>"
# The API rejects all of these; o200k_base alone would let the fim and im tokens pass.
CONTROL_TOKEN = re.compile(r"<\|(?:endoftext|endofprompt|startoftext|fim_(?:prefix|middle|suffix)|im_(?:start|end|sep))\|>")
BLANK_RUN = re.compile(rf"\s{{{MAX_BLANKS}}}")
SECRETS = (  # what it is, how it begins, how it goes on
    ("a private key", r"-----", r"BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY"),
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
    """What is wrong with a record that cannot be read; it stands in the place of the record."""

    kind: str
    message: str
    text: str = ""


# --- reading: (line, value) for each record, where the value is parsed JSON or a Fault ---


def read_records(path: str, check: bool = False) -> Iterator[tuple[int, Any]]:
    """Yield the records of a file: CSV by its name, a JSON array by its first character, else JSON Lines.

    With `check` it can only be JSON Lines, as for the upload. Raises StepError for a file that is missing or not UTF-8.
    """
    with explained_file_errors(), open(path, "rb") as file:
        is_array = file.peek(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
        if is_array and check:
            yield 1, Fault("broken-file", "the API takes JSON Lines, not an array; run without --check to convert it")
        elif is_array:
            yield from read_json_array(path, file)
        elif path.lower().endswith(".csv") and not check:
            yield from read_csv(path, file)
        else:
            yield from read_json_lines(path, file, check)


def read_jsonl(path: str) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) of a JSON Lines file; a line that is not JSON has a Fault for its value."""
    with explained_file_errors(), open(path, "rb") as file:
        yield from read_json_lines(path, file)


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


def read_json_lines(path: str, file, check: bool = False) -> Iterator[tuple[int, Any]]:
    parse = json_parser()
    if check and file.peek(3).startswith(codecs.BOM_UTF8):
        yield 1, Fault("byte-order-mark", "a server may reject the byte order mark at the start; save the file without")
    for line, text in enumerate(decoded(file, path), 1):
        start = JSON_SPACE.match(text).end()
        if start == len(text):
            if text and check:
                yield line, Fault("blank-line", "a server may count a blank line as a broken row; delete it")
            continue
        try:
            value, end = parse(text, start)
            if JSON_SPACE.match(text, end).end() < len(text):
                raise json.JSONDecodeError("Text after the object", text, end)
        except ValueError as error:
            value = Fault("invalid-json", f"{syntax_fault(error)}; a line must be one JSON object", text)
        yield line, value


def json_parser() -> Callable[..., tuple[Any, int]]:
    """Return parse(text, start) -> (value, end); ValueError: not JSON. An object with a key twice makes it a Fault."""
    repeated: list[str] = []

    def one_of_each(pairs: list) -> dict:
        record = dict(pairs)
        if len(record) < len(pairs):
            repeated.extend(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        return record

    def no_constant(name: str):
        raise ValueError(f"{name} is not JSON")

    decoder = json.JSONDecoder(object_pairs_hook=one_of_each, parse_constant=no_constant)

    def parse(text: str, start: int) -> tuple[Any, int]:
        repeated.clear()
        try:
            value, end = decoder.raw_decode(text, start)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        if repeated:
            value = Fault("duplicate-key", f"the key {named(repeated[:1])} stands twice; keep one", text[start:end])
        return value, end

    return parse


def syntax_fault(error: ValueError) -> str:
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def read_json_array(path: str, file) -> Iterator[tuple[int, Any]]:
    text, parse = JSONText(decoded(iter(lambda: file.read(CHUNK_BYTES), b""), path)), json_parser()
    try:
        text.take("[")
        separator = text.peek() == "]" and text.take("]")
        while separator != "]":
            text.peek()
            line = text.line
            yield line, text.value(parse)
            separator = text.take(",]")
        if text.peek():
            raise json.JSONDecodeError("Text after the array", text.text, text.at)
    except ValueError as error:
        message = f"{getattr(error, 'msg', error)}; mend it here, the rest of the file was not read"
        yield text.line, Fault("broken-file", message)


class JSONText:
    """A JSON text of any size: one chunk and one value of it are in memory. `line` is where reading has come to."""

    def __init__(self, chunks: Iterator[str]):
        self.chunks, self.text, self.at, self.line, self.ended = chunks, "", 0, 1, False

    def read_on(self):
        chunk = next(self.chunks, None)
        self.ended = chunk is None
        self.text, self.at = self.text[self.at :] + (chunk or ""), 0

    def advance(self, end: int):
        self.line, self.at = self.line + self.text.count("\n", self.at, end), end

    def peek(self) -> str:
        """Return the next character that is not white space, "" at the end."""
        while True:
            self.advance(JSON_SPACE.match(self.text, self.at).end())
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.read_on()

    def take(self, allowed: str) -> str:
        char = self.peek()
        if not char or char not in allowed:
            raise json.JSONDecodeError(f"Expecting {' or '.join(allowed)}", self.text, self.at)
        self.advance(self.at + 1)
        return char

    def value(self, parse: Callable) -> Any:
        while True:
            try:
                value, end = parse(self.text, self.at)
                if end < len(self.text) or self.ended:
                    self.advance(end)
                    return value
            except json.JSONDecodeError as error:
                # What breaks off at the end of the text so far may go on in the next chunk.
                if self.ended or (error.pos + 16 < len(self.text) and not error.msg.startswith("Unterminated")):
                    self.advance(error.pos)
                    raise
            self.read_on()


def read_csv(path: str, file) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)  # an answer may be longer than the module's 128 KB
    rows, header = csv.reader(filter(None, decoded(file, path)), strict=True), None
    while True:
        line = rows.line_num + 1
        try:
            fields = next(rows, None)
        except csv.Error as error:
            yield line, Fault("invalid-csv", f"{error}; put the field in quotes, and write a quote inside it twice")
            continue
        if fields is None:
            return
        if header is None:
            header = fields or None
            twice = [name for name in fields if name and fields.count(name) > 1]
        elif twice:
            yield line, Fault("duplicate-key", f"the column {named(twice[:1])} stands twice; keep one", str(fields))
        elif fields and len(fields) != len(header):
            message = f"{len(fields)} fields where the header has {len(header)}; put fields with commas in quotes"
            yield line, Fault("invalid-csv", message, str(fields))
        elif fields:
            yield line, {name: value for name, value in zip(header, fields, strict=True) if name}


# --- from a record to an example ---

SHAPES = (("messages",), ("question", "answer"), ("prompt", "completion"))
NOT_WRITTEN = ("id", "category")


def to_example(record: Any, system: str) -> Any:
    """Return the training example that a record of one of the three shapes stands for, or the Fault that it has."""
    if not isinstance(record, dict):
        return Fault("not-an-object", 'the record must be an object, such as {"question": "...", "answer": "..."}')
    fitting = [shape for shape in SHAPES if all(key in record for key in shape)]
    if not fitting:
        return Fault("unknown-shape", f"found {named(record) or 'no keys'}; a record needs question and answer, "
                                      "prompt and completion, or messages")
    if len(fitting) > 1:
        return Fault("ambiguous-shape", f"found {' as well as '.join(' and '.join(shape) for shape in fitting)}; keep one")
    if fitting[0] != ("messages",):
        question, answer = fitting[0]
        return qa_example(record[question], record[answer], system)
    messages, rest = record["messages"], {k: v for k, v in record.items() if k not in ("messages", *NOT_WRITTEN)}
    if isinstance(messages, list) and messages:
        roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
        if "developer" in roles:  # which training files call `system`
            messages = [message | {"role": "system"} if role == "developer" else message
                        for message, role in zip(messages, roles, strict=True)]
        if system and "system" not in roles and "developer" not in roles:
            messages = [{"role": "system", "content": system}, *messages]
    return {"messages": messages} | rest


def qa_example(question: Any, answer: Any, system: str) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": [{"role": "system", "content": system}, *turns] if system else turns}


# --- the rules ---

ROLES = ("system", "user", "assistant", "tool")
KEYS = dict.fromkeys(ROLES, {"role", "content", "name", "weight"})
KEYS |= {"assistant": KEYS["assistant"] | {"tool_calls"}, "tool": KEYS["tool"] | {"tool_call_id"}}
EXAMPLE_KEYS = {"messages", "tools", "parallel_tool_calls"}


class Message:
    """A message as the rules see it: what has the wrong type is empty here, and a fault by a rule of its own."""

    __slots__ = ("all_texts", "calls", "content", "images", "is_blank", "is_object", "is_trained", "parts", "raw", "role", "texts")

    def __init__(self, raw: Any):
        self.is_object, self.raw = isinstance(raw, dict), raw if isinstance(raw, dict) else {}
        self.role = self.raw["role"] if self.raw.get("role") in ROLES else ""
        self.content, calls = self.raw.get("content"), self.raw.get("tool_calls")
        self.parts = [p for p in self.content if isinstance(p, dict)] if isinstance(self.content, list) else []
        self.texts = [part["text"] for part in self.parts if isinstance(part.get("text"), str)]
        if isinstance(self.content, str):
            self.texts = [self.content]
        self.images = [part for part in self.parts if part.get("type") == "image_url"]
        self.is_blank = bool(self.texts) and not self.images and not any(map(str.strip, self.texts))
        self.calls = [call for call in calls if is_function(call)] if isinstance(calls, list) else []
        self.is_trained = self.role == "assistant" and self.raw.get("weight") != 0
        self.all_texts = self.texts + [str(call["function"].get(k, "")) for call in self.calls for k in ("name", "arguments")]
        if isinstance(self.raw.get("name"), str):
            self.all_texts.append(self.raw["name"])


class Example:
    """A training example as the rules see it."""

    def __init__(self, raw: dict):
        self.raw, messages, tools = raw, raw.get("messages"), raw.get("tools")
        self.messages = [Message(message) for message in messages] if isinstance(messages, list) else []
        self.functions = [tool["function"] for tool in tools if is_function(tool)] if isinstance(tools, list) else []
        self.trained_texts = [text for message in self.messages if message.is_trained for text in message.all_texts]
        self.other_texts = [text for message in self.messages if not message.is_trained for text in message.all_texts]
        for function in self.functions:
            self.other_texts += function_texts(function)
        self.text = "\n".join(self.trained_texts + self.other_texts)
        self.has_blank_run = len(self.text) >= MAX_BLANKS and bool(BLANK_RUN.search(self.text))

    def of(self, role: str) -> list[Message]:
        return [message for message in self.messages if message.role == role]

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


def function_texts(function: dict) -> list[str]:
    """The texts that the Cookbook's rule counts of a declared function; what is nested deeper is in no published rule."""
    texts = [f"{function['name']}:{described(function)}"]
    for key, value in properties_of(function).items():
        texts += [f"{key}:{value.get('type', '')}:{described(value)}", *map(str, enum_of(value))]
    return texts


def properties_of(function: dict) -> dict:
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    return {k: v for k, v in properties.items() if isinstance(v, dict)} if isinstance(properties, dict) else {}


def described(value: dict) -> str:
    return str(value.get("description", "")).removesuffix(".")


def enum_of(value: dict) -> list:
    return value["enum"] if isinstance(value.get("enum"), list) else []


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
    """'a', 'b': each value once, cut to what a line can take."""
    return "" if not values else ", ".join(sorted({repr(str(value)[:40]) for value in values}))


class Rule(NamedTuple):
    """A line of the table: `find` looks at what `judges` names and returns what is wrong, or something empty.

    judges: "example"; "message", each of its messages; or only those of one role.
    """

    kind: str
    level: str
    judges: str
    find: Callable[[Any], Any]
    sentence: str  # with {} for what was found


RULES = (
    Rule("missing-messages", "error", "example", lambda e: not e.messages,
         "`messages` is missing or empty; it needs a user message and the assistant's answer"),
    Rule("unknown-key", "error", "example", lambda e: named(e.raw.keys() - EXAMPLE_KEYS),
         "the API rejects {} beside `messages`; delete it"),
    Rule("no-user-message", "error", "example", lambda e: e.messages and not e.of("user"),
         "there is no user message; add what the assistant answers to"),
    Rule("no-assistant-message", "error", "example", lambda e: e.messages and not e.of("assistant"),
         "there is no assistant message, so nothing to learn; add the answer"),
    Rule("nothing-trained", "error", "example", lambda e: e.of("assistant") and not any(m.is_trained for m in e.messages),
         "every assistant message has weight 0, so nothing is learnt; take the weight off one"),
    Rule("last-not-assistant", "warning", "example", lambda e: e.of("assistant") and e.messages[-1].role != "assistant",
         "what follows the last assistant message teaches nothing; end with the answer"),
    Rule("invalid-tools", "error", "example", lambda e: "tools" in e.raw and (
         not isinstance(e.raw["tools"], list) or len(e.raw["tools"]) > len(e.functions)),
         "`tools` must be a list of tools of type function, each with a function that has a name"),
    Rule("invalid-tools", "error", "example", lambda e: not isinstance(e.raw.get("parallel_tool_calls", True), bool),
         "`parallel_tool_calls` must be true or false"),
    Rule("unknown-function", "error", "example", lambda e: named(e.undeclared_functions()),
         "the function {} is called but not in `tools`; declare it there"),
    Rule("orphan-tool-result", "error", "example", lambda e: named(e.orphan_results()),
         "the tool result for {} answers no earlier call; its tool_call_id must be the id of one"),
    Rule("invalid-message", "error", "message", lambda m: not m.is_object,
         "a message must be an object with `role` and `content`"),
    Rule("missing-role", "error", "message", lambda m: m.is_object and "role" not in m.raw,
         f"`role` is missing; write one of {', '.join(ROLES)}"),
    Rule("unknown-role", "error", "message", lambda m: "role" in m.raw and not m.role and named([m.raw["role"]]),
         f"the role {{}} is unknown; write one of {', '.join(ROLES)}"),
    Rule("unknown-key", "error", "message", lambda m: m.role and named(m.raw.keys() - KEYS[m.role]),
         "the API rejects {} here; delete it"),
    Rule("missing-content", "error", "message", lambda m: m.role and m.content is None and not m.raw.get("tool_calls"),
         "`content` is missing; write the text"),
    Rule("invalid-content", "error", "message", lambda m: m.role and m.content is not None and not has_valid_content(m),
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
    Rule("invalid-weight", "error", "assistant", lambda m: "weight" in m.raw and repr(m.raw["weight"]) not in ("0", "1"),
         "`weight` must be 0 (not learnt) or 1"),
    Rule("invalid-weight", "error", "message", lambda m: "weight" in m.raw and m.role != "assistant",
         "`weight` belongs to assistant messages alone; delete it"),
    Rule("invalid-tool-call", "error", "assistant", lambda m: "tool_calls" in m.raw and not has_valid_calls(m),
         "`tool_calls` must be a list of calls of type function, each with an id and a function that has a name"),
    Rule("invalid-arguments", "error", "assistant", lambda m: not all(is_json(c["function"].get("arguments")) for c in m.calls),
         "the `arguments` of a tool call must be JSON written as a text"),
    Rule("control-token", "error", "example", lambda e: "<|" in e.text and named(CONTROL_TOKEN.findall(e.text)),
         "the text holds {}, which the API rejects; delete it or write it differently"),
    Rule("secret", "error", "example", lambda e: secrets_in(e.text),
         "the text holds {}, which the model would learn; take it out, and revoke it if it is real"),
    Rule("blank-run", "error", "example", lambda e: e.has_blank_run,
         f"the text has {MAX_BLANKS:,} blanks in a row, on which tokenizers fail; shorten them"),
)
RULES_FOR = {judged: [rule for rule in RULES if rule.judges == judged] for judged in ("example", "message")}
RULES_FOR |= {role: [rule for rule in RULES if rule.judges in ("message", role)] for role in ROLES}

# What no look at one example finds: faults of reading, of counting, between rows, and of the file as a whole.
WARNINGS = ("byte-order-mark", "blank-line", "duplicate", "conflicting-answer", "differing-system", "held-out",
            "validation-overlap", "few-examples")
ERRORS = ("invalid-json", "invalid-csv", "duplicate-key", "not-an-object", "unknown-shape", "ambiguous-shape",
          "lone-surrogate", "too-many-tokens")
FILE_ERRORS = ("broken-file", "too-few-examples", "file-too-large")  # nothing is written while one of these stands
LEVELS = {rule.kind: rule.level for rule in RULES} | dict.fromkeys(WARNINGS, "warning")
LEVELS |= dict.fromkeys((*ERRORS, *FILE_ERRORS), "error")


def faults_in(example: Example) -> Iterator[Fault]:
    """Yield every fault that the table finds in an example."""
    messages = [(m.role or "message", f"message {number}: ", m) for number, m in enumerate(example.messages, 1)]
    for subject, place, judged in [("example", "", example), *messages]:
        for rule in RULES_FOR[subject]:
            if found := rule.find(judged):
                yield Fault(rule.kind, place + rule.sentence.format(found))


# --- counting tokens ---


class TokenCounter:
    """Counts texts in a model's encoding. `counted` says how: "exact"; "approximate", where tiktoken does not know the
    model and o200k_base stands in; or "estimated", where the vocabulary cannot be had."""

    def __init__(self, model: str):
        self.encoding_name, self.counted, self.encoding = "o200k_base", "approximate", None
        why = "tiktoken is not installed"
        with suppress(ModuleNotFoundError):
            import tiktoken  # imported here, so that --help does not wait for it

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
        total = PRIMING_TOKENS + trained + sum(counts[text] for text in example.other_texts)
        for message in example.messages:
            total += MESSAGE_TOKENS + NAME_TOKENS * ("name" in message.raw) + IMAGE_TOKENS * len(message.images)
        for function in example.functions:  # 7, 3, 12: the Cookbook's figures, found by comparing with the API
            properties = properties_of(function).values()
            total += (10 if self.encoding_name == "cl100k_base" else 7) + 3 * bool(properties) + 3 * len(properties)
            total += sum(3 * len(enum_of(value)) - 3 for value in properties if enum_of(value))
        return total + 12 * bool(example.functions), trained


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
    texts = [m.content if isinstance(m.content, str) and not m.calls else render([m.content, m.calls]) for m in messages]
    plain = unicodedata.normalize("NFKC", TURN.join(texts)).casefold().encode("utf-8", "surrogatepass")
    return plain.translate(None, b" \t\n\r\v\f")


class FirstPlaces:
    """Where each thing stood first. SQLite keeps it in a temporary file, so that memory does not grow with the rows."""

    def __init__(self):
        self.database = sqlite3.connect("")
        self.database.execute("PRAGMA journal_mode = OFF")
        self.database.execute("PRAGMA cache_size = -32000")  # KB
        self.database.execute("CREATE TABLE first (thing INTEGER PRIMARY KEY, place TEXT)")

    def get(self, thing: Any) -> str | None:
        found = self.database.execute("SELECT place FROM first WHERE thing = ?", (hash(thing),)).fetchone()
        return found and found[0]

    def setdefault(self, thing: Any, place: str) -> str:
        insert = "INSERT OR IGNORE INTO first VALUES (?, ?)"
        return place if self.database.execute(insert, (hash(thing), place)).rowcount else self.get(thing) or place


class Comparer:
    """Sorts rows, and warns of what one says against those before it and against the test cases."""

    def __init__(self, held_out: str | None, validation_split: float, check: bool):
        self.validation_split, self.check, self.first = validation_split, check, FirstPlaces()
        self.held_out_file, self.held_out = held_out, read_held_out(held_out) if held_out else {}
        self.first_system: tuple[bytes, str] | None = None
        self.told_of_system = False

    def sort(self, row: "Row", source: str):
        """Set row.side, where the row goes; `source` is "training" or "validation", the file it stands in."""
        if not row.is_valid:
            row.side = "rejected"
        if not row.is_valid or row.example is None:
            return
        messages, place, row.side = row.example.messages, f"{row.file}:{row.line}", source
        last = max(number for number, message in enumerate(messages) if message.role == "assistant")
        prompt = said(message for message in messages[:last] if message.role != "system")
        system = said(row.example.of("system")) + render(row.example.raw.get("tools")).encode()
        if source == "validation":
            if earlier := self.first.get((system, prompt)):
                row.fault("validation-overlap", f"the same prompt as {earlier} in training; keep it in one of the two")
            return
        if in_validation(prompt, self.validation_split):
            row.side = "validation"
        earlier_prompt = self.first.setdefault((system, prompt), place)
        earlier_row = self.first.setdefault((system, prompt, said(messages[last:])), place)
        earlier_line = self.first.setdefault(row.data, place)
        if earlier_line != place:
            row.side = row.side if self.check else "repeated"
            row.fault("duplicate", f"the same as {earlier_line}; " + ("delete one" if self.check else "left out"))
        elif earlier_row != place:
            row.fault("duplicate", f"the same as {earlier_row} but for case, white space or Unicode form; keep one")
        elif earlier_prompt != place:
            row.fault("conflicting-answer", f"the same prompt as {earlier_prompt} with another answer; keep the better one")
        self.first_system = self.first_system or (system, place)
        if system != self.first_system[0] and not self.told_of_system:
            row.fault("differing-system", f"another system message or other tools than {self.first_system[1]}; told once")
            self.told_of_system = True
        for case in {prompt, *prompt.split(TURN.encode())} & self.held_out.keys():
            row.fault("held-out", f"{self.held_out[case]} of {self.held_out_file}: a test must be new to the model; delete it")


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
        except ValueError:
            cases = [value for _, value in read_jsonl(path)]
    prompts = {}
    for number, case in enumerate(cases if isinstance(cases, list) else [None], 1):
        if not isinstance(case, dict) or not isinstance(case.get("question"), str):
            raise StepError(f"{path}: test case {number} has no `question`.")
        turns = [*(case.get("history") or []), {"role": "user", "content": case["question"]}]
        prompt = said(turn for turn in map(Message, turns) if turn.role != "system")
        prompts[prompt] = f"test case {case.get('id', number)}"
    return prompts


# --- what becomes of a row, and what is told of all ---


@dataclass(slots=True)
class Row:
    """One record on its way from the input to the output."""

    file: str
    line: int
    record: Any
    example: Example | None = None
    data: bytes = b""  # the line to write
    tokens: int = 0
    trained_tokens: int = 0
    side: str = ""  # "training", "validation", "repeated" or "rejected"; "": not a row but a blank line
    problems: list[Problem] = field(default_factory=list)

    def fault(self, kind: str, message: str):
        self.problems.append(Problem(self.file, self.line, LEVELS[kind], kind, SECRET.sub("[secret]", message)))

    @property
    def is_valid(self) -> bool:
        return all(problem.level != "error" for problem in self.problems)

    def as_rejected(self) -> bytes:
        """The line that --rejected keeps: where the row stood, why it cannot be trained on, and the record as it was."""
        reasons = [f"{problem.kind}: {problem.message}" for problem in self.problems if problem.level == "error"]
        record = self.record.text if isinstance(self.record, Fault) else self.record
        return json.dumps({"file": self.file, "line": self.line, "reasons": reasons, "record": record}).encode() + b"\n"


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
    system_prompt: str | None = None  # the one that every training row starts with
    ignored_columns: list[str] = field(default_factory=list)
    errors: int = 0
    warnings: int = 0
    blocked: bool = False  # by a fault of the file as a whole
    written: dict[str, str] = field(default_factory=dict)  # {path: what became of it}
    problems: list[Problem] = field(default_factory=list)
    sizes: Counter = field(default_factory=Counter)  # {tokens: how many examples have that many}

    def add(self, row: Row):
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

    def size_at(self, share: float) -> int:
        """The tokens that this share of the examples does not exceed: 0.5 is the median."""
        rank = max(1, math.ceil(share * self.examples))
        ranks = zip(sorted(self.sizes), itertools.accumulate(self.sizes[size] for size in sorted(self.sizes)), strict=True)
        return next((size for size, up_to in ranks if up_to >= rank), 0)


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
        self.file = open(self.temporary, "wb")  # noqa: SIM115 (closed in __exit__)

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
        self.system, self.counter = system, TokenCounter(self.model)

    def format_qa_pair(self, question: str, answer: str) -> dict:
        """Return the example {"messages": [system, user, assistant]}."""
        return qa_example(question, answer, self.system)

    def validate_example(self, example: dict) -> list[Problem]:
        """Return what is wrong with one example, judged as it would be uploaded; an empty list if nothing is."""
        return [problem for row in self.judge([("example", 1, example)], check=True) for problem in row.problems]

    def count_tokens(self, what: str | list[dict] | dict) -> int:
        """Return the tokens of a text, of a list of messages, or of an example with its messages and tools."""
        if isinstance(what, str):
            return self.counter.count([what])[what]
        example = Example(what if isinstance(what, dict) else {"messages": what})
        return self.counter.example_tokens(example, self.counter.count(example.trained_texts + example.other_texts))[0]

    def prepare_data(
        self,
        inputs: str | list,
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
        """Judge `inputs` (a path, a list of paths or of records) and write what can be trained on to `output`, if given.

        With `check` the inputs are judged as an upload would be, and with them the validation file that
        validation_output names. Each Problem goes to `tell`, else into Report.problems. Prints nothing. Raises
        StepError for a file that cannot be read or written.
        """
        report = Report(self.model, self.counter.encoding_name, self.counter.counted, training_price(self.model))
        comparer = Comparer(held_out, validation_split, check)
        paths = {"training": output, "validation": validation_output, "rejected": rejected}
        sources = [("training", inputs)] + [("validation", validation_output)] * bool(check and validation_output)

        def add(problems: Iterable[Problem]):
            for problem in problems:
                report.errors += problem.level == "error"
                report.warnings += problem.level == "warning"
                report.blocked |= problem.kind in FILE_ERRORS
                (tell or report.problems.append)(problem)

        with explained_file_errors(), ExitStack() as stack:
            files = {side: stack.enter_context(AtomicFile(path)) for side, path in paths.items() if path and not check}
            for source, given in sources:
                for row in self.judge(records_of(given, check), check):
                    comparer.sort(row, source)
                    report.add(row)
                    add(row.problems)
                    if row.side in files:
                        files[row.side].file.write(row.as_rejected() if row.side == "rejected" else row.data)
            add(file_problems(report, inputs, files.get("training"), validation_split))
            if not report.blocked and not (strict and report.invalid):
                report.written = {file.name: file.commit() for file in files.values()}
        return report

    def judge(self, records: Iterable[tuple[str, int, Any]], check: bool) -> Iterator[Row]:
        """Yield a row for each (file, line, value), in order: judged here, its tokens counted by threads in blocks."""
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        waiting: deque = deque()
        block, size = [], 0
        with ThreadPoolExecutor(threads) as pool:
            for file, line, value in records:
                row = self.judged_row(file, line, value, check)
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

    def judged_row(self, file: str, line: int, value: Any, check: bool) -> Row:
        row = Row(file, line, value)
        if not isinstance(value, Fault) and not (check and isinstance(value, dict)):
            value = to_example(value, self.system)
        if isinstance(value, Fault):
            row.fault(value.kind, value.message)
            return row
        row.example = Example(value)
        for kind, message, _ in faults_in(row.example):
            row.fault(kind, message)
        try:
            row.data = render(value).encode() + b"\n"
        except UnicodeEncodeError:
            row.fault("lone-surrogate", "the text holds half of a character (\\ud800 to \\udfff); delete or mend it")
        except (ValueError, RecursionError):
            row.fault("invalid-json", "a number is too large, or the record nested too deeply, to be written as JSON")
        return row

    def count_block(self, rows: list[Row]) -> list[Row]:
        limit = TOKEN_LIMITS.get(base_model(self.model), TOKEN_LIMIT)
        examples = [(row, row.example) for row in rows if row.example and not row.example.has_blank_run]
        counts = self.counter.count(text for _, example in examples for text in example.trained_texts + example.other_texts)
        for row, example in examples:
            row.tokens, row.trained_tokens = self.counter.example_tokens(example, counts)
            if row.tokens > limit:
                row.fault("too-many-tokens", f"{row.tokens:,} tokens; {self.model} takes {limit:,}, and what is over, "
                                             "the end of the answer, is cut off; shorten it")
        return rows


def records_of(inputs: str | list, check: bool) -> Iterator[tuple[str, int, Any]]:
    """Yield (file, line, value) for each record of a path, a list of paths or a list of records."""
    for number, given in enumerate([inputs] if isinstance(inputs, str) else inputs, 1):
        if isinstance(given, str):
            yield from ((given, line, value) for line, value in read_records(given, check))
        else:
            yield "examples", number, given


def file_problems(report: Report, inputs: str | list, output: AtomicFile | None, split: float) -> Iterator[Problem]:
    """Yield what is wrong with the training file as a whole."""
    paths = [path for path in ([inputs] if isinstance(inputs, str) else inputs) if isinstance(path, str)]
    name = output.name if output else ", ".join(paths) or "examples"
    size = output.file.tell() if output else sum(map(os.path.getsize, paths))
    if report.examples < MIN_EXAMPLES:
        message = f"{report.examples} valid examples; the API takes no fewer than {MIN_EXAMPLES}"
        yield Problem(name, None, "error", "too-few-examples", message)
    elif report.examples < ADVISED_EXAMPLES:
        message = f"{report.examples} examples; improvement is seldom seen with fewer than {ADVISED_EXAMPLES}"
        yield Problem(name, None, "warning", "few-examples", message)
    if split and not report.validation_examples:
        yield Problem(name, None, "error", "too-few-examples", f"no prompt falls into a validation split of {split}; raise it")
    if size > MAX_FILE_BYTES:
        message = (f"{size / 2**20:,.0f} MB; an upload may have {MAX_FILE_BYTES // 2**20}: divide it and train on the parts in "
                   "turn (--model takes a fine-tuned model), or send it with client.uploads.upload_file_chunked")
        yield Problem(name, None, "error", "file-too-large", message)


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
    add("--validation-output", metavar="FILE",
        help=f"where they go (default: {DEFAULT_VALIDATION_OUTPUT}); with --check: a validation file to judge too")
    add("--held-out", metavar="FILE", help="test cases that training must not see (default: test_cases.json beside INPUT)")
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
    inputs = args.inputs or [DEFAULT_OUTPUT if args.check else os.path.relpath(DEFAULT_INPUT)]
    output = None if args.check else args.output or DEFAULT_OUTPUT
    validation_output = args.validation_output or (DEFAULT_VALIDATION_OUTPUT if args.validation_split else None)
    beside = os.path.join(os.path.dirname(inputs[0]), "test_cases.json")
    held_out = args.held_out or (beside if os.path.exists(beside) else None)
    refuse_overwriting([*inputs, held_out], [] if args.check else [output, validation_output, args.rejected])
    report = TrainingDataPreparator(args.model, args.system).prepare_data(
        inputs, output, check=args.check, strict=args.strict, validation_split=args.validation_split,
        validation_output=validation_output, held_out=held_out, rejected=args.rejected,
        tell=None if args.json else lambda problem: print(problem, file=sys.stderr),
    )
    if args.json:
        print(json.dumps(as_document(report), indent=2))
    else:
        print_report(report, held_out)
        print_next(report, args, validation_output)
    return 1 if report.blocked or (args.check and report.errors) or (args.strict and report.invalid) else 0


def refuse_overwriting(read: list, written: list):
    seen = {os.path.realpath(path) for path in read if path}
    for path in filter(None, written):
        if os.path.realpath(path) in seen:
            raise StepError(f"{path} is read or written already in this run; name another file to write.")
        seen.add(os.path.realpath(path))


def as_document(report: Report) -> dict:
    """What --json prints."""
    document = {key: value for key, value in vars(report).items() if key not in ("problems", "sizes")}
    per_example = {name: report.size_at(at) for name, at in (("min", 0), ("median", 0.5), ("p95", 0.95), ("max", 1))}
    document |= {"tokens_per_example": per_example, "epochs": report.epochs, "billed_tokens": report.billed_tokens}
    document |= {"estimated_cost": report.estimated_cost, "prices_as_of": PRICES_DATE}
    return document | {"problems": [problem._asdict() for problem in report.problems]}


def print_report(report: Report, held_out: str | None):
    note = {"exact": "", "approximate": f", approximate: tiktoken does not know {report.model}"}
    sizes = [report.size_at(at) for at in (0, 0.5, 0.95, 1)]
    cost = f"no price known for {report.model}"
    if report.price is not None:
        cost = f"${report.estimated_cost:,.2f} ({report.model}: ${report.price:.2f} per 1M tokens, as of {PRICES_DATE})"
    print(f"Records          {report.records:,}: {report.records - report.invalid:,} valid, {report.invalid:,} invalid, "
          f"{report.duplicates:,} exact duplicates left out")
    if report.ignored_columns:
        print(f"Ignored columns  {named(report.ignored_columns)}")
    print(f"Examples         {report.examples:,}" + f", and {report.validation_examples:,} for validation" * bool(report.validation_examples))
    print(f"Messages         {report.messages:,}")
    print(f"Tokens           {report.tokens:,} ({report.encoding}{note.get(report.counted, ', estimated: bytes / 4')})")
    print("  per example    min {:,}, median {:,}, p95 {:,}, max {:,}".format(*sizes))
    print_histogram(report.sizes)
    print(f"  trained on     {report.trained_tokens:,} (assistant messages of weight 1)")
    print(f"  billed         {report.billed_tokens:,} ({report.epochs} epochs, which is what `auto` chooses)")
    print(f"Estimated cost   {'free (local API)' if report.price == 0 else cost}")
    if held_out:
        print(f"Test cases       {held_out} was compared with the training data")


def print_histogram(sizes: Counter, bars: int = 8):
    low = min(sizes, default=0)
    step = math.ceil((max(sizes, default=0) - low + 1) / bars)
    heights = Counter({number: 0 for number in range((max(sizes, default=0) - low) // step + 1)})
    for size, times in sizes.items():
        heights[(size - low) // step] += times
    for number, height in sorted(heights.items()) if sizes else ():
        bounds = f"{low + number * step:,}-{low + (number + 1) * step - 1:,}"
        print(f"    {bounds:>15}  {'#' * math.ceil(40 * height / max(heights.values()))} {height:,}")


def print_next(report: Report, args: argparse.Namespace, validation_output: str | None):
    print(f"Problems         {report.errors:,} errors, {report.warnings:,} warnings\n")
    for path, outcome in report.written.items():
        print(f"{path}: {outcome}")
    if report.written:
        names = [args.output] * bool(args.output) + ["--validation-file", validation_output] * bool(report.validation_examples)
        print("Next: " + " ".join(["python fine_tune.py", *map(str, names)]))
    elif args.check and not report.errors:
        print("No errors: this file can be uploaded.")
    else:
        print("Nothing was written." if not args.check else "Errors: this file cannot be trained on as it is.")


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
    except KeyboardInterrupt:
        print("\nInterrupted: no file has changed. Run the same command again.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
