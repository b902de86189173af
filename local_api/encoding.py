"""Chat messages to token ids, and which of those tokens are trained on.

One rule serves training and answering: the text comes from the model's own chat template, and an assistant message is
encoded apart from what precedes it. So the model meets, token for token, the same beginning of an answer in training as
it will when it is asked.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple


class EncodingError(Exception):
    """Messages that this model's chat template cannot express; the message says why."""


class Encoded(NamedTuple):
    ids: list[int]
    trained: list[bool]  # same length as ids: True where the token is learnt


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
    done = ""
    for position, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:position], tools, answer_follows=True)
        after = render(tokenizer, messages[: position + 1], tools)
        if not (before.startswith(done) and after.startswith(before)):
            raise EncodingError(
                "this model's chat template rewrites earlier turns, so turns cannot be encoded one by one"
            )
        prompt = encode_text(tokenizer, before[len(done) :])
        answer = encode_text(tokenizer, after[len(before) :])
        # What the template adds behind the end of the turn (a line break, say) belongs to the next turn: not learnt.
        last = max((i for i, token in enumerate(answer) if token in ends), default=len(answer) - 1)
        learn = example["messages"][position].get("weight", 1) != 0
        ids += prompt + answer
        trained += [False] * len(prompt) + [learn and i <= last for i in range(len(answer))]
        done = after
    return Encoded(ids, trained)


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
        message["content"] = as_data(message.get("content", ""), control_tokens)
        if "tool_calls" in message:
            message["tool_calls"] = [parsed_call(call) for call in message["tool_calls"]]
        result.append(message)
    return result


def as_data(text: str, control_tokens: list[str]) -> str:
    """Break control tokens that a text spells out, with an invisible space: a message must not end its own turn."""
    for token in control_tokens:
        text = text.replace(token, f"{token[0]}\u200b{token[1:]}")
    return text


def parsed_call(call: dict) -> dict:
    """Return a tool call whose arguments are an object, as chat templates expect, instead of JSON text."""
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        function["arguments"] = json.loads(function["arguments"])
    return {**call, "function": function}
