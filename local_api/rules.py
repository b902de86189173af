"""What an example of a training file must be: one table of rules, for messages, tools and images.

Each rule has a kind, by which it is known, finds its fault or nothing, and says how to cure it. A key whose value is
null counts as absent: answers of chat APIs carry `refusal: null`, rows that were exported from tables `tools: null`.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

from .rows import Fault

MIN_EXAMPLES, ADVISED_EXAMPLES = 10, 50
SHORT_ANSWER = 50  # characters
MAX_BLANKS = 100_000  # in a row
WARNINGS = {"last-not-assistant", "short-answer", "few-examples"}  # every other kind is an error

ROLES = ("system", "developer", "user", "assistant", "tool")
KEYS = {role: {"role", "content", "name", "weight"} for role in ROLES}
KEYS["assistant"] |= {"tool_calls"}
KEYS["tool"] |= {"tool_call_id"}
EXAMPLE_KEYS = {"messages", "tools", "parallel_tool_calls"}

CONTROL_TOKEN = re.compile(
    r"<\|(?:(?:start|end)of(?:text|prompt)|fim_(?:prefix|middle|suffix)|im_(?:start|end|sep))\|>"
)
# A key of OpenAI and others, AWS, GitHub or Hugging Face; a private key
SECRET = re.compile(
    r"(?<!\w)sk-[\w-]{0,40}[^\W_]{20}[\w-]*|AKIA[A-Z\d]{16}|(?:ghp|_pat|hf)_[^\W_]{22}\w*"
    r"|-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-[\s\S]*",
    re.ASCII,
)


# --- an example as the rules see it: what has the wrong type is empty here, and a fault by a rule of its own ---


class Message:
    def __init__(self, raw: Any):
        self.is_object = isinstance(raw, dict)
        self.raw: dict = without_nulls(raw) if self.is_object else {}
        self.role = self.raw["role"] if self.raw.get("role") in ROLES else ""
        self.content = self.raw.get("content")
        self.texts, self.images = [], []
        self.has_valid_content = isinstance(self.content, str | None)
        if isinstance(self.content, str):
            self.texts = [self.content]
        elif self.role != "tool":  # the API takes a tool's result as plain text only
            parts = dicts_in(self.content)
            self.texts = [part["text"] for part in parts if part.get("type") == "text" and is_text(part, "text")]
            images = [dict_at(part, "image_url") for part in parts if part.get("type") == "image_url"]
            self.images = [image for image in images if is_text(image, "url")] if self.role == "user" else []
            if isinstance(self.content, list):
                self.has_valid_content = 0 < len(self.content) == len(self.texts) + len(self.images)
        self.is_blank = bool(self.texts) and not self.images and not any(text.strip() for text in self.texts)
        sent_calls = self.raw.get("tool_calls", []) if self.role == "assistant" else []
        self.calls = [call for call in functions_in(sent_calls) if is_text(call, "id")]
        self.has_bad_calls = self.calls != sent_calls or self.raw.get("tool_calls") == []
        self.arguments = [call["function"].get("arguments") for call in self.calls]
        weight = self.raw.get("weight", 1)
        self.has_bad_weight = repr(weight) not in ("0", "1") or ("weight" in self.raw and self.role != "assistant")
        self.is_trained = self.role == "assistant" and repr(weight) != "0"
        says_little = 0 < sum(map(len, self.texts)) < SHORT_ANSWER
        self.is_short = self.is_trained and says_little and not self.is_blank and not self.calls


class Example:
    def __init__(self, raw: dict):
        self.raw = without_nulls(raw)
        self.messages = [Message(message) for message in raw["messages"]]
        self.roles = {message.role for message in self.messages}  # "": missing or unknown
        self.tools = functions_in(self.raw.get("tools"))
        has_answer = "assistant" in self.roles
        self.teaches_nothing = has_answer and not any(message.is_trained for message in self.messages)
        self.goes_on = has_answer and self.messages[-1].role != "assistant"
        self.all_text = text_of(self.raw)
        calls = [call for message in self.messages for call in message.calls]
        called = {call["function"]["name"] for call in calls}
        self.undeclared = named(called - {tool["function"]["name"] for tool in self.tools})
        self.orphans, self.unanswered = self.unmatched()

    def unmatched(self) -> tuple[str, str]:
        """Return the ids of the results that no earlier call has, and of the calls that the next turn leaves behind."""
        known: set[str] = set()
        waiting: set[str] = set()  # the calls of the last turn, less the results since
        orphans: set[str] = set()
        left_behind: set[str] = set()
        for message in self.messages:
            if message.role == "tool":
                answered = str(message.raw.get("tool_call_id"))
                orphans |= {answered} - known
                waiting = waiting - {answered}
            else:
                left_behind |= waiting
                waiting = {call["id"] for call in message.calls}
                known |= waiting
        return named(orphans), named(left_behind)


def without_nulls(raw: dict) -> dict:
    return {key: value for key, value in raw.items() if value is not None}


def dicts_in(value: Any) -> list[dict]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def dict_at(value: dict, key: str) -> dict:
    return value[key] if isinstance(value.get(key), dict) else {}


def is_text(value: dict, key: str) -> bool:
    return isinstance(value.get(key), str)


def functions_in(value: Any) -> list[dict]:
    """Of a list of tools, or of calls, return the valid ones: {"type": "function", "function": {"name": ...}}."""
    tools = [item for item in dicts_in(value) if item.get("type") == "function"]
    return [tool for tool in tools if is_text(dict_at(tool, "function"), "name")]


def text_of(value: Any) -> str:
    """Return all texts in a JSON value, its keys too, a line each; images that stand in it as data are none."""
    if isinstance(value, str):
        return "" if value.startswith("data:image/") else value
    if isinstance(value, dict):
        return "\n".join(f"{key}\n{text_of(item)}" for key, item in value.items())
    return "\n".join(map(text_of, value)) if isinstance(value, list) else ""


def is_json(text: Any) -> bool:
    try:
        return json.loads(text) is not text
    except (TypeError, ValueError, RecursionError):
        return False


def has_blank_run(text: str) -> bool:
    return len(text) >= MAX_BLANKS and any(len(run) >= MAX_BLANKS for run in re.findall(r"\s+", text))


def named(values: Collection) -> str:
    """'a', 'b': each value once, cut to what a line can take, and without secrets."""
    return ", ".join(sorted({repr(SECRET.sub("[secret]", str(value))[:40]) for value in values}))


# --- the rules ---

# For each thing that is judged: the kind, what finds the fault (it returns True, or a text for {}), the cure.
# A message is judged by the rules for "message" and by those for its role; one without a known role, by those for "".
Rule = tuple[str, Callable[[Any], Any], str]
RULES: dict[str, list[Rule]] = {
    "example": [
        ("unknown-key", lambda e: named(e.raw.keys() - EXAMPLE_KEYS - {"functions"}),
         "the API rejects {} beside messages; delete it"),
        ("unknown-key", lambda e: "functions" in e.raw,
         '`functions` is the old form; write each as {{"type": "function", "function": ...}} in `tools`'),
        ("no-user-message", lambda e: "user" not in e.roles, "there is no user message; add what is answered"),
        ("no-assistant-message", lambda e: "assistant" not in e.roles, "there is nothing to learn; add the answer"),
        ("nothing-trained", lambda e: e.teaches_nothing, "every answer has weight 0; take it off what is to be learnt"),
        ("last-not-assistant", lambda e: e.goes_on, "what follows the last answer teaches nothing; delete it"),
        ("invalid-tools", lambda e: e.raw.get("tools", []) != e.tools, "`tools` must be a list of named functions"),
        ("invalid-tools", lambda e: not isinstance(e.raw.get("parallel_tool_calls", True), bool),
         "`parallel_tool_calls` must be true or false"),
        ("unknown-function", lambda e: e.undeclared, "the function {} is called but not in `tools`; declare it there"),
        ("orphan-tool-result", lambda e: e.orphans, "no earlier call has the id {}; tool_call_id must be that of one"),
        ("unanswered-call", lambda e: e.unanswered,
         "nothing answers the call {} before the next turn; add a `tool` message with its id, or end with the call"),
        ("control-token", lambda e: named(CONTROL_TOKEN.findall(e.all_text)), "the text holds {}; the API rejects it"),
        ("secret", lambda e: SECRET.search(e.all_text), "the text holds a key; take it out, revoke it if it is real"),
        ("blank-run", lambda e: has_blank_run(e.all_text),
         f"{MAX_BLANKS:,} blanks in a row break tokenizers; delete them"),
    ],
    "message": [
        ("unknown-key", lambda m: named(m.raw.keys() - KEYS[m.role] - {"function_call"}),
         "the API rejects {} here; delete it"),
        ("unknown-key", lambda m: "function_call" in m.raw,
         '`function_call` is the old form; write it as {{"id": "call_1", "type": "function", "function": ...}} '
         "in `tool_calls`"),
        ("missing-content", lambda m: m.content is None and not m.calls and "function_call" not in m.raw,
         "`content` is missing; write the text"),
        ("invalid-content", lambda m: not m.has_valid_content,
         "`content` must be text; a user's may be texts and images"),
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
        ("unknown-role", lambda m: m.raw.get("role") == "function",
         "the role 'function' is the old form; write 'tool', with the `tool_call_id` of the call that it answers"),
        ("unknown-role", lambda m: "role" in m.raw and m.raw["role"] != "function" and named([m.raw["role"]]),
         f"the role {{}} is unknown; write one of {ROLES}"),
    ],
}  # fmt: skip


def judge(row: Any) -> Iterator[Fault]:
    """Yield what is wrong with one row: a value as JSON says it, or the Fault for which it could not be read."""
    if isinstance(row, Fault):
        yield Fault(row.kind, SECRET.sub("[secret]", row.message)[:200])
    elif not isinstance(row, dict):
        yield Fault("not-an-object", 'a row must be an object, such as {"messages": [...]}')
    elif not isinstance(row.get("messages"), list) or not row["messages"]:
        yield Fault("missing-messages", "`messages` is missing or empty; write a question and its answer")
    else:
        example = Example(row)
        yield from broken(RULES["example"], example)
        for number, message in enumerate(example.messages, 1):
            own = RULES["message"] + RULES.get(message.role, []) if message.role else RULES[""]
            for kind, sentence in broken(own, message):
                yield Fault(kind, f"message {number}: {sentence}")


def broken(rules: list[Rule], thing: Example | Message) -> Iterator[Fault]:
    for kind, find, sentence in rules:
        if found := find(thing):
            yield Fault(kind, sentence.format(found))
