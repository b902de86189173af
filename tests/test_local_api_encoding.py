"""What the trainer makes of a file: rows that the base model's template cannot express, and rows that are too long."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from corpus import ANSWER, call, calls, chat, line, result, said
from tiny_model import CHAT_TEMPLATE

from local_api import train
from local_api.encoding import EncodingError, encode_example, read_examples
from local_api.validation import JobFailed

PARAMETERS = {"type": "object", "properties": {"tea": {"type": "string", "description": "Which tea"}}}
TOOL = {
    "type": "function",
    "function": {"name": "get_stock", "description": "Tins left\nin the shop", "parameters": PARAMETERS},
}
ARGUMENTS = '{"tea": "\\"Grün\\"\\n", "fresh": true, "sizes": [50, 2.5], "of": {"year": null}}'
STOCK = call(name="get_stock", arguments=ARGUMENTS)
CALLING, CALLING_ALONE = chat("How many?", calls(STOCK), tools=[TOOL]), chat("How many?", calls(STOCK))
TOOLS_FIRST = "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
WITH_CALLS = CHAT_TEMPLATE.replace(
    "message['content'] +", "message['content'] + (message['tool_calls'] | tojson if message['tool_calls'] else '') +"
)


@pytest.fixture(scope="module")
def load_tokenizer(tiny_model):
    from transformers import AutoTokenizer

    def load(template: str):
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.chat_template = template
        return tokenizer

    return load


def learnt(tokenizer, row: dict) -> str:
    encoded = encode_example(tokenizer, row)
    return tokenizer.decode([i for i, trained in zip(encoded.ids, encoded.trained, strict=True) if trained])


IN_COMMENTS = """{% for tool in tools or [] %}{{ tool.function.name }}
{% for name, about in tool.function.parameters.properties.items() %}{{ name }}: {{ about.description }}{% endfor %}
{% for line in tool.function.description.splitlines() %}// {{ line }}
{% endfor %}{% endfor %}"""


@pytest.mark.parametrize("tools", [TOOLS_FIRST, IN_COMMENTS])
def test_a_template_that_knows_tools_loses_nothing(load_tokenizer, tools):
    row = chat("How many?", calls(STOCK), result(1, ' "7"\n '), said(ANSWER), tools=[TOOL])
    text = learnt(load_tokenizer(tools + WITH_CALLS), row)
    assert "get_stock" in text and "2.5" in text and text.endswith(ANSWER + "<|im_end|>")


@pytest.mark.parametrize("template, row, sentence", [
    (CHAT_TEMPLATE, CALLING_ALONE, "message 2: the base model's chat template leaves a tool call out"),
    (WITH_CALLS, CALLING, "leaves out of `tools` 'get_stock'; describe the tools"),
    (TOOLS_FIRST + CHAT_TEMPLATE, CALLING, "leaves a tool call out ('get_stock')"),
    ("{% if tools %}{{ tools[0].function.name }}{% endif %}" + WITH_CALLS, chat("Q?", "No.", tools=[TOOL]), "'tea'"),
    (WITH_CALLS.replace("message['tool_calls'] |", "message['tool_calls'][0].function.name |"),
     CALLING_ALONE, "message 2: the base model's chat template leaves a tool call out ('tea')"),
    (WITH_CALLS.replace("%}{{", "%}{% if message.role != 'tool' %}{{", 1).replace("{% endfor", "{% endif %}{% endfor"),
     chat("How many?", calls(STOCK), result(1, "Seven."), said(ANSWER)), "message 3: the base model's chat template "
     "leaves a tool's result out ('Seven.')"),
    (CHAT_TEMPLATE.replace("messages %}", "messages if message.role != 'system' %}"),
     chat(said("Be brief.", "system"), said("Q?", "user"), said(ANSWER)), "message 1: the base model's chat template "
     "leaves text out ('Be brief.')"),
    (CHAT_TEMPLATE.replace("message['content'] +", "message['content'].split('</think>')[-1] +"),
     chat("Q?", "<think>Hm.</think>" + ANSWER), "message 2: the base model's chat template leaves text out"),
])  # fmt: skip
def test_a_template_that_drops_a_text_is_found_out(load_tokenizer, template, row, sentence):
    with pytest.raises(EncodingError) as error:
        encode_example(load_tokenizer(template), row)
    assert sentence in str(error.value)


def write(path: Path, rows) -> str:
    path.write_text("".join(line(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
    return str(path)


def test_such_a_row_ends_the_job(tiny_model, tmp_path):
    rows = [*(chat(f"Question {n}?", ANSWER) for n in range(12)), chat("How many?", calls(STOCK), tools=[TOOL])]
    job = {
        "base_model": "tiny", "model_dir": str(tiny_model), "adapter": None, "seed": 7, "hyperparameters": {},
        "training_file": write(tmp_path / "training.jsonl", rows), "validation_file": None,
    }  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    assert train.main([str(tmp_path)]) == 1
    error = json.loads((tmp_path / "outcome.json").read_text("utf-8"))["error"]
    assert (error["code"], error["param"]) == ("invalid_training_file", "training_file")
    assert error["message"].startswith("Invalid file format. Line 13: message 2: the base model's chat template leaves")


# --- length ---

SHORT = chat("Question?", ANSWER)
LONG_ANSWER = chat("Question?", ANSWER * 20)
LONG_QUESTION = chat("Question? " * 100, ANSWER)


@pytest.fixture
def tokenizer(load_tokenizer):
    return load_tokenizer(CHAT_TEMPLATE)


def test_rows_that_are_cut_or_left_out_are_told_and_counted(tokenizer, tmp_path):
    told = []
    path = write(tmp_path / "rows.jsonl", [SHORT] * 11 + [LONG_ANSWER, LONG_QUESTION, SHORT, LONG_ANSWER])
    limit = len(encode_example(tokenizer, SHORT).ids) + 10
    rows = read_examples(path, tokenizer, limit, "training_file", lambda *what: told.append(what))
    assert [len(row.ids) for row in rows] == [limit - 10] * 11 + [limit, limit - 10, limit]
    (gone, gone_data), (cut, cut_data) = told
    longest = max(len(encode_example(tokenizer, row).ids) for row in (LONG_ANSWER, LONG_QUESTION))
    reads = f"The base model reads {limit} tokens of a row, by its own tokenizer; the longest has {longest:,}."
    assert gone == f"Line 13 is left out of the training_file, since no answer begins before the cut. {reads}"
    assert cut == f"Lines 12, 15 are cut in the training_file, and the ends of the answers are not learnt. {reads}"
    assert gone_data == {"left_out": 1, "lines": [13]} and cut_data == {"cut": 2, "lines": [12, 15]}
    with pytest.raises(JobFailed) as failure:
        read_examples(write(tmp_path / "rows.jsonl", [LONG_QUESTION] * 12), tokenizer, limit, "training_file")
    message = failure.value.error["message"]
    assert message.startswith(
        "Lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 2 more are too long, and only 0 example(s) are left."
    )
    assert failure.value.error["code"] == "invalid_training_file" and "Shorten what stands before" in message


def test_the_job_has_it_as_events_once(tiny_model, tmp_path):
    rows = [SHORT] * 12 + [chat("Question?", "Yes. " * 1000)]
    job = {
        "base_model": "tiny", "model_dir": str(tiny_model), "adapter": None, "seed": 7,
        "hyperparameters": {"n_epochs": 1, "batch_size": 8}, "training_file": write(tmp_path / "a.jsonl", rows),
        "validation_file": write(tmp_path / "b.jsonl", [SHORT, chat("Question? " * 1000, ANSWER)]),
    }  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    assert train.main([str(tmp_path)]) == 0
    (tmp_path / "outcome.json").unlink()
    assert train.main([str(tmp_path)]) == 0  # as after an interruption
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text("utf-8").splitlines()]
    warnings = [event for event in events if event.get("level") == "warn"]
    assert [event["data"] for event in warnings] == [{"cut": 1, "lines": [13]}, {"left_out": 1, "lines": [2]}]
    assert "Line 13 is cut in the training_file" in warnings[0]["message"]
    assert "Line 2 is left out of the validation_file" in warnings[1]["message"]
