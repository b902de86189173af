"""Chat messages to token ids, and which of those tokens are trained on.

One rule serves training and answering: the text comes from the model's own chat template, and an assistant message is
encoded apart from what precedes it. So the model meets, token for token, the same beginning of an answer in training as
it will when it is asked.

A row that the template cannot express, and one that is too long for the model, is never passed over in silence.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from .rows import Fault, read_rows
from .rules import MIN_EXAMPLES, dict_at, text_of
from .validation import JobFailed


class EncodingError(Exception):
    """Messages that this model's chat template cannot express; the message says why."""


class Encoded(NamedTuple):
    ids: list[int]
    trained: list[bool]  # same length as ids: True where the token is learnt


def read_examples(
    path: str, tokenizer: Any, limit: int, param: str, tell: Callable[[str, dict], None] = print
) -> list[Encoded]:
    """Encode a training or validation file, each example cut to `limit` tokens.

    `tell` hears, in a sentence and as data, of the rows that were cut and of those that were left out because nothing
    to be learnt stood before the cut. JobFailed, with the line: a row that the model's chat template cannot express, or
    a file of which too little is left.
    """
    examples: list[Encoded] = []
    cut: list[int] = []
    left_out: list[int] = []
    longest = 0
    for line, row in read_rows(path):
        try:
            if isinstance(row, Fault):
                raise EncodingError(row.message)
            encoded = encode_example(tokenizer, row)
        except (EncodingError, ValueError, KeyError, TypeError) as error:
            raise JobFailed(f"invalid_{param}", f"Invalid file format. Line {line}: {error}.", param) from None
        if any(encoded.trained[:limit]):
            examples.append(Encoded(encoded.ids[:limit], encoded.trained[:limit]))
            cut += [line] * any(encoded.trained[limit:])
        elif any(encoded.trained):
            left_out.append(line)
        longest = max(longest, len(encoded.ids))
    reads = f"The base model reads {limit:,} tokens of a row, by its own tokenizer; the longest has {longest:,}"
    if left_out:
        if len(examples) < (MIN_EXAMPLES if param == "training_file" else 1):
            few = f"{of_lines(left_out)} too long, and only {len(examples)} example(s) are left. {reads}. "
            raise JobFailed(f"invalid_{param}", few + "Shorten what stands before the answers.", param)
        gone = f"{of_lines(left_out)} left out of the {param}, since no answer begins before the cut. {reads}."
        tell(gone, {"left_out": len(left_out), "lines": left_out})
    if cut:
        ends = f"{of_lines(cut)} cut in the {param}, and the ends of the answers are not learnt. {reads}."
        tell(ends, {"cut": len(cut), "lines": cut})
    if not examples:
        raise JobFailed(f"invalid_{param}", "No line of the file holds an assistant message to train on.", param)
    return examples


def of_lines(lines: list[int]) -> str:
    """[3] -> "Line 3 is", [3, 4] -> "Lines 3, 4 are"; of many the first ten."""
    shown = ", ".join(map(str, lines[:10])) + (f" and {len(lines) - 10} more" if len(lines) > 10 else "")
    return f"Line {shown} is" if len(lines) == 1 else f"Lines {shown} are"


def encode_prompt(tokenizer: Any, messages: list[dict], tools: list[dict] | None = None) -> list[int]:
    """Return the token ids of a conversation up to the place where the assistant's answer begins."""
    return encode_text(tokenizer, render(tokenizer, plain(tokenizer, messages), tools, answer_follows=True))


def encode_example(tokenizer: Any, example: dict) -> Encoded:
    """Encode one training example ({"messages": [...], "tools": [...]}).

    Trained on: the content of every assistant message, with the token that ends its turn, unless its `weight` is 0.
    """
    messages, tools = plain(tokenizer, example["messages"]), example.get("tools")
    ends = end_of_turn_ids(tokenizer)
    ids: list[int] = []
    trained: list[bool] = []
    done, start = "", 0
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:position], tools, answer_follows=True)
        after = render(tokenizer, messages[: position + 1], tools)
        if not (before.startswith(done) and after.startswith(before)):
            raise EncodingError(
                "this model's chat template rewrites earlier turns, so turns cannot be encoded one by one"
            )
        for number in range(start, position):
            require_all_of(number, messages[number], before[len(done) :])
        require_all_of(position, messages[position], after[len(before) :])
        if not done:
            require_all_tools(tools or [], before)
        prompt = encode_text(tokenizer, before[len(done) :])
        answer = encode_text(tokenizer, after[len(before) :])
        # What the template adds behind the end of the turn (a line break, say) belongs to the next turn: not learnt.
        last = max((i for i, token in enumerate(answer) if token in ends), default=len(answer) - 1)
        learn = example["messages"][position].get("weight", 1) != 0
        ids += prompt + answer
        trained += [False] * len(prompt) + [learn and i <= last for i in range(len(answer))]
        done, start = after, position + 1
    return Encoded(ids, trained)


# --- what a template drops: many know no tools, and would teach an empty answer in the place of a call ---


def require_all_of(position: int, message: dict, rendered: str) -> None:
    """Raise EncodingError if a text of this message is not in what the template makes of it."""
    texts = [message["content"]]
    for call in message.get("tool_calls", []):
        texts += [call["function"]["name"], *text_of(call["function"].get("arguments")).splitlines()]
    for text in texts:
        if not stands_in(text, rendered):
            what = "a tool call" if text is not texts[0] else "a tool's result" if message["role"] == "tool" else "text"
            raise EncodingError(
                f"message {position + 1}: the base model's chat template leaves {what} out ({text.strip()[:40]!r}); "
                "write it as the text of an answer or a question, or choose a base model whose template knows it"
            )


def require_all_tools(tools: list[dict], rendered: str) -> None:
    for function in (tool["function"] for tool in tools):
        properties = dict_at(dict_at(function, "parameters"), "properties")
        described = [function, *(value for value in properties.values() if isinstance(value, dict))]
        texts = [function["name"], *properties]
        for item in described:  # by lines: some templates write them as comments
            texts += str(item.get("description") or "").splitlines()
        for text in texts:
            if not stands_in(text, rendered):
                raise EncodingError(
                    f"the base model's chat template leaves out of `tools` {text.strip()[:40]!r}; describe the tools "
                    "in the system message, or choose a base model whose template knows tools"
                )


def stands_in(text: str, rendered: str) -> bool:
    """Tell whether a text stands there as it is (blanks around it apart) or as JSON."""
    text = text.strip()
    forms = (text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1])
    return any(form in rendered for form in forms)


def end_of_turn_ids(tokenizer: Any, model: Any = None) -> set[int]:
    """Return the ids that end an answer: the tokenizer's, and those of the model's generation settings."""
    ends = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if configured is not None:
        ends.update(configured if isinstance(configured, list) else [configured])
    return ends


def render(tokenizer: Any, messages: list[dict], tools: list[dict] | None, answer_follows: bool = False) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools or None, tokenize=False, add_generation_prompt=answer_follows
        )
    except (TemplateError, TypeError) as error:  # a template refuses an order of roles, or adds None to a string
        raise EncodingError(f"this model's chat template does not take these messages: {error}") from None


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Encode text that a chat template made: it already holds every special token it needs."""
    return tokenizer(text, add_special_tokens=False).input_ids


def plain(tokenizer: Any, messages: list[dict]) -> list[dict]:
    """Return the messages as chat templates expect them: text content, parsed call arguments, no `weight`."""
    control_tokens = [token for token in tokenizer.get_added_vocab() if len(token) > 1]
    result = []
    for message in messages:
        message = {key: value for key, value in message.items() if key != "weight" and value is not None}
        if message["role"] == "developer":
            message["role"] = "system"
        if isinstance(message.get("content"), list):
            if any(part.get("type") != "text" for part in message["content"]):
                raise EncodingError("this is a text model: it takes no images or audio")
            message["content"] = "".join(part["text"] for part in message["content"])
        message.setdefault("content", "")
        for token in control_tokens:  # broken by an invisible space: a message must not end its own turn
            message["content"] = message["content"].replace(token, f"{token[0]}\u200b{token[1:]}")
        if "tool_calls" in message:
            message["tool_calls"] = [parsed_call(call) for call in message["tool_calls"]]
        result.append(message)
    return result


def parsed_call(call: dict) -> dict:
    """Return a tool call whose arguments are an object, as chat templates expect, instead of JSON text."""
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        function["arguments"] = json.loads(function["arguments"])
    return {**call, "function": function}
