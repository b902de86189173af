"""Faulty rows and good ones, each with what a judge must find in it. Both judges answer for them: the strict one of
local_api, and step 1, which knows some of the kinds, by the same names, and writes nothing that the strict one refuses.
"""
# ruff: noqa: E501 (a case a line: tables of cases are read down, not across)

from __future__ import annotations

import json
import random
import string

ANSWER = "This answer is long enough that nobody would call it a short one, number "
LETTERS = "".join(random.Random(1).choices(string.ascii_letters + string.digits, k=100)) + "9"
SECRETS = [
    "sk-" + LETTERS[:48], "sk-proj-" + LETTERS[:30] + "_-" + LETTERS[30:60], "sk-ant-api03-" + LETTERS[:60],
    "AKIA" + "QWERTYUIOP123456", "ghp_" + LETTERS[:36], "github_pat_" + LETTERS[:22] + "_" + LETTERS[:59], "hf_" + LETTERS[:34],
    "-----BEGIN OPENSSH PRIVATE KEY-----\n" + LETTERS, "-----BEGIN PRIVATE KEY-----",
]  # fmt: skip


def chat(*turns: str | list | dict, **more) -> dict:
    """An example of user and assistant messages in turn; a dict stands for itself."""
    roles = ("user", "assistant")
    messages = [t if isinstance(t, dict) else {"role": roles[n % 2], "content": t} for n, t in enumerate(turns)]
    return {"messages": messages, **more}


def said(content, role: str = "assistant", **more) -> dict:
    return {"role": role, "content": content, **more}


def call(number: int = 1, **function) -> dict:
    return {
        "id": f"c{number}",
        "type": "function",
        "function": {"name": "look_up", "arguments": '{"q": 1}', **function},
    }


def calls(*of_one_turn: dict) -> dict:
    return {"role": "assistant", "content": None, "tool_calls": [*of_one_turn]}


def result(number: int = 1, content="7") -> dict:
    return said(content, "tool", tool_call_id=f"c{number}")


def line(row) -> str:
    return row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)


TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]
PICTURE = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
LEGACY_CALL = {"role": "assistant", "function_call": {"name": "look_up", "arguments": "{}"}}

# kind: rows (a text is a line as it stands) that have this fault alone, each with a part of the sentence it brings.
FAULTY: dict[str, list[tuple]] = {
    "invalid-json": [
        ('{"messages": [}', "Expecting value at column 15"), ('{"messages": []} {"x": 1}', "column 18"), ("{'a': 1}", "double quotes"),
        ("[" * 100_000 + "]" * 100_000, "too deeply"), (line(chat("Q?", ANSWER)).replace('"Q?"', "[" * 900 + "]" * 900), ""),
        (chat("Q?", ANSWER, tools=[float("inf")]), "not finite"), (chat("Q?", ANSWER, tools=[float("nan")]), "not finite"),
        (line(chat("Q?", ANSWER, tools=[7])).replace("[7]", "[1e999]"), "not finite"),
        (line(chat("Q?", ANSWER, tools=[7])).replace("[7]", f"[{'1' * 5000}]"), "too long"),
    ],
    "duplicate-key": [('{"messages": [], "messages": [1]}', "'messages' stands twice"),
                      ('{"messages": [{"role": "user", "role": "user", "content": "a"}]}', "'role'")],
    "not-an-object": [("7", "must be an object"), ('"text"', "must be an object"), ("null", "must be an object")],
    "missing-messages": [({}, "missing or empty"), ({"messages": []}, ""), ({"messages": "Hi"}, ""), ({"messages": None}, ""),
                         ({"prompt": "a", "completion": "b"}, ""), ({"question": "a", "answer": "b"}, "")],
    "unknown-key": [(chat("Q?", ANSWER, metadata={}), "rejects 'metadata' beside"), (chat("Q?", said(ANSWER, refusal="No.")), "'refusal' here"),
                    (chat(said("Q?", "user", tool_calls=[call()]), ANSWER), "message 1: the API rejects 'tool_calls' here"),
                    (chat("Q?", said(ANSWER, tool_call_id="c1")), "message 2: the API rejects 'tool_call_id' here"),
                    (chat("Q?", ANSWER, functions=[TOOLS[0]["function"]]), "`functions` is the old form; write each as {"),
                    (chat("Q?", LEGACY_CALL), "`function_call` is the old form; write it as {")],
    "no-user-message": [(chat(said(ANSWER)), "no user message")],
    "no-assistant-message": [(chat("Q?"), "nothing to learn")],
    "nothing-trained": [(chat("Q?", said(ANSWER, weight=0)), "every answer has weight 0")],
    "last-not-assistant": [(chat("Q?", ANSWER, "Thanks!"), "teaches nothing"), (chat("Q?", calls(call()), result(), tools=TOOLS), "")],
    "invalid-tools": [(chat("Q?", ANSWER, tools={}), "must be a list"), (chat("Q?", ANSWER, tools=[{}]), ""),
                      (chat("Q?", ANSWER, tools=[{"type": "function", "function": {}}]), ""),
                      (chat("Q?", ANSWER, tools=TOOLS, parallel_tool_calls="yes"), "true or false")],
    "unknown-function": [(chat("Q?", calls(call(name="other")), tools=TOOLS), "'other' is called"), (chat("Q?", calls(call())), "'look_up'")],
    "orphan-tool-result": [(chat("Q?", calls(call()), result(), result(2), said(ANSWER), tools=TOOLS), "'c2'"),
                           (chat("Q?", said("1", "tool"), said(ANSWER)), "'None'"),
                           (chat("Q?", result(), calls(call()), tools=TOOLS), "'c1'")],
    "unanswered-call": [(chat("Q?", calls(call()), said(ANSWER), tools=TOOLS), "the call 'c1' before the next turn"),
                        (chat("Q?", calls(call()), said("And?", "user"), said(ANSWER), tools=TOOLS), "'c1'"),
                        (chat("Q?", calls(call(1), call(2)), result(2), said(ANSWER), tools=TOOLS), "'c1'"),
                        (chat("Q?", calls(call()), said(ANSWER), result(), said(ANSWER), tools=TOOLS), "'c1'"),
                        (chat("Q?", calls(call()), calls(call(2)), result(1), result(2), said(ANSWER), tools=TOOLS), "'c1'")],
    "invalid-message": [({"messages": ["Hi", said("Q?", "user"), said(ANSWER)]}, "message 1: a message must be an object")],
    "missing-role": [(chat({"content": "So."}, said("Q?", "user"), said(ANSWER)), "message 1: `role` is missing"),
                     (chat(said("So.", None), said("Q?", "user"), said(ANSWER)), "message 1: `role` is missing")],
    "unknown-role": [(chat(said("So.", "bot"), said("Q?", "user"), said(ANSWER)), "'bot' is unknown"), (chat(said("So.", [1]), said("Q?", "user"), said(ANSWER)), ""),
                     (chat("Q?", said("7", "function", name="look_up"), said(ANSWER)), "write 'tool', with the `tool_call_id`")],
    "missing-content": [(chat({"role": "user"}, ANSWER), "message 1: `content` is missing"), (chat("Q?", None), "message 2")],
    "invalid-content": [(chat("Q?", 7), "must be text"), (chat("Q?", False), "must be text"), (chat([], ANSWER), ""), (chat("Q?", [PICTURE]), ""),
                        (chat([{"type": "input_audio"}], ANSWER), ""), (chat([{"type": "image_url", "image_url": None}], ANSWER), ""),
                        (chat([{"type": "image_url"}], ANSWER), ""), (chat(["Q?"], ANSWER), ""),
                        (chat("Q?", calls(call()), result(1, [{"type": "text", "text": "1"}]), said(ANSWER), tools=TOOLS), "must be text")],
    "empty-question": [(chat(" \n", ANSWER), "user's message is empty"), (chat("", ANSWER), "")],
    "empty-answer": [(chat("Q?", ""), "message 2: the answer is empty"), (chat("Q?", " \t"), ""), (chat("Q?", [{"type": "text", "text": " "}]), "")],
    "short-answer": [(chat("Q?", "Yes."), "fewer than 50 characters")],
    "invalid-name": [(chat(said("Q?", "user", name=1), ANSWER), "`name` must be a text")],
    "invalid-weight": [(chat("Q?", said(ANSWER, weight=weight)), "must be 0") for weight in (0.5, 2, -1, True, "1", 1.0)]
    + [(chat(said("Q?", "user", weight=0), ANSWER), "only an answer")],
    "invalid-tool-call": [(chat("Q?", said(ANSWER, tool_calls=broken), tools=TOOLS), "each call needs an id")
                          for broken in ([{"id": "c1"}], [call() | {"id": 1}], [], "calls", [call() | {"type": "custom"}], [call(), 7])],
    "invalid-arguments": [(chat("Q?", calls(call(arguments=arguments)), tools=TOOLS), "must be JSON")
                          for arguments in ("{", "", {"q": 1}, None, {}, [1], 5, True)],
    "control-token": [(chat("Q?", ANSWER + token), f"holds '{token}'")
                      for token in ("<|endoftext|>", "<|fim_suffix|>", "<|im_start|>", "<|endofprompt|>")]
    + [(chat("Q?", calls(call(arguments='{"q": "<|im_end|>"}')), tools=TOOLS), "'<|im_end|>'")],
    "lone-surrogate": [('{"messages": [{"role": "user", "content": "a\\ud83d"}, {"role": "assistant", "content": "' + ANSWER + '"}]}', "half of a character")],
    "blank-run": [(chat("Q?", ANSWER + blank * 100_001 + end), "100,000 blanks") for blank, end in ((" ", ""), ("\t", "x"), ("\n", "x"), ("\u00a0", "x"))],
    "secret": [(chat("Q?", f"{ANSWER} key: {text} end"), "holds a key") for text in SECRETS]
    + [(chat([{"type": "image_url", "image_url": {"url": f"https://x/a.png?c={SECRETS[3]}%2F"}}], ANSWER), "holds a key")],
}  # fmt: skip

# Rows that nothing is wrong with.
GOOD: list = [
    chat("Q?", ANSWER),
    chat(said("Be brief.", "system"), said("Q?", "user"), said(ANSWER)),
    chat(said("Be brief.", "developer"), said("Q?", "user"), said(ANSWER)),
    chat("Q?", calls(call()), result(1, ""), said(ANSWER), tools=TOOLS),
    chat("Q?", calls(call(1), call(2)), result(2), result(1), said(ANSWER), tools=TOOLS),
    chat("Q?", calls(call()), result(), calls(call()), result(), said(ANSWER), tools=TOOLS),  # an id may come again
    chat("Call it.", calls(call()), tools=TOOLS, parallel_tool_calls=False),
    chat("Q?", said(ANSWER, tool_calls=[call()]), tools=TOOLS),
    chat("Q?", {"role": "assistant", "tool_calls": [call(arguments="{}")]}, tools=TOOLS),
    chat([{"type": "text", "text": "What is this?"}, PICTURE], ANSWER),
    chat([PICTURE], ANSWER),
    chat([{"type": "image_url", "image_url": {"url": "data:image/png;base64,hf_" + LETTERS[:35]}}], ANSWER),
    chat(said("Q?", "user", name="Ann"), ANSWER, "And?", ANSWER),
    chat("test_weight_decay_is_applied_to_every_group", "sk-loading_spinner_container_wrapper copyright_notice_for_third_party_software"),
    chat("sk-4711-blau-gross-2024", "right_side_of_the_customer_order_join_table hf_hub_download_file_v2_2024 " + ANSWER),
    chat("Q?", said(ANSWER, weight=0), "Again?", said(ANSWER, weight=1)),
    chat("Q?", [{"type": "text", "text": ANSWER}]),
    chat("Unlike <|this|>, < | and <| |>", ANSWER),
    chat("task-oriented-and-very-long-word disk-a1b2c3d4e5f6a7b8c9d0e1f2", "sk-learn-is-a-nice-library-to-use AKIA SHA_KIA " + ANSWER),
    chat("日本語 🎉", "é\u2028" + ANSWER),
    # What answers of chat APIs carry, and rows that were exported from a table: null counts as absent.
    chat("Q?", said(ANSWER, refusal=None, tool_calls=None, function_call=None, audio=None, name=None, weight=None)),
    chat(said("Q?", "user", tool_calls=None, tool_call_id=None), ANSWER, tools=None, parallel_tool_calls=None, functions=None),
]  # fmt: skip
