"""use_fine_tuned_model.py: whom it asks, with which system prompt, and how an answer may end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fake_api import FakeAPI

import use_fine_tuned_model as step4
from conftest import ROOT

SCRIPT = ROOT / "use_fine_tuned_model.py"
BASE = "smollm2-135m-instruct"
SYSTEM = "You are the support assistant of TechFlow."


@pytest.fixture
def api(tmp_path, monkeypatch):
    with FakeAPI() as api:
        monkeypatch.chdir(tmp_path)
        for name, value in api.env().items():
            monkeypatch.setenv(name, value)
        yield api


def write_record(job: dict, path: str = "fine_tune_job.json", **more) -> None:
    """Write what fine_tune.py records of a job."""
    record = {"job_id": job["id"], "model": BASE, "fine_tuned_model": None, "system_prompt": SYSTEM, **more}
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text(json.dumps(record), encoding="utf-8")


@pytest.fixture
def model(api) -> str:
    """The fine-tuned model of the job that fine_tune_job.json records."""
    job = api.finish(api.add_job(model=BASE)["id"])
    write_record(job)
    return job["fine_tuned_model"]


def asked(api) -> list[dict]:
    return [request.body for request in api.requests if request.path == "/chat/completions"]


def refused(*argv: str) -> str:
    """Return the sentence with which the script ends."""
    with pytest.raises(SystemExit) as end:
        step4.main([*argv])
    assert isinstance(end.value.code, str) and len(end.value.code.splitlines()) == 1
    return end.value.code


# whom it asks


def test_a_question_goes_to_the_recorded_job_s_model_with_the_training_prompt(api, model, capsys):
    step4.main(["How do I add a user?"])
    out, err = capsys.readouterr()
    assert out == "You said: How do I add a user?\n"
    assert f"Model: {model} (made by the job in fine_tune_job.json)\nSystem prompt: that of the training data" in err
    assert err.endswith("Next: python test_model.py\n")
    (request,) = asked(api)
    assert request["model"] == model and request["temperature"] == 0
    system, question = {"role": "system", "content": SYSTEM}, {"role": "user", "content": "How do I add a user?"}
    assert request["messages"] == [system, question]


FINE_TUNED = f"ft:{BASE}:acme::0001"


@pytest.mark.parametrize(
    ("words", "expected_model", "question"),
    [
        (["ftjob-0001", "Hi"], FINE_TUNED, "Hi"),
        ([FINE_TUNED, "Hi there"], FINE_TUNED, "Hi there"),
        ([BASE, "Hi there"], BASE, "Hi there"),
        (["Hello?"], FINE_TUNED, "Hello?"),
        (["ftjob-0001", "--system", "x", "How are you?"], FINE_TUNED, "How are you?"),
    ],
)
def test_model_and_question_are_told_apart(api, model, words, expected_model, question):
    step4.main(words)
    assert (asked(api)[0]["model"], asked(api)[0]["messages"][-1]["content"]) == (expected_model, question)


@pytest.mark.parametrize(
    "words", [["I", "forgot", "my", "password"], ["Hello", "there"], [FINE_TUNED, "Hello", "there"], ["--compare"]]
)
def test_a_question_without_quotes(api, model, words):
    assert "Put the question in quotes" in refused(*words)
    assert not asked(api)


def test_a_job_without_a_model(api):
    api.job_plan = ["running"]
    job = api.add_job()
    write_record(job)
    assert refused("Hi") == f"Job {job['id']} is running: python check_fine_tune_status.py {job['id']} --wait"


def test_no_record(api):
    assert "run python fine_tune.py first" in refused("Hi")


def test_what_the_server_refuses_is_explained_without_the_key(api, model):
    api.echo_key = True
    sentence = refused("ft:gone", "Hi")
    assert f"{api.base_url} answered 404: The model `ft:gone` does not exist" in sentence and "check name" in sentence
    assert api.key not in sentence


def test_an_error_in_another_form_is_shown_as_it_came(api):
    """As of a server whose errors have no `message`, which a URL without /v1 meets."""
    api.fault("POST /chat/completions", "404", body={"detail": "Not Found"})
    sentence = refused("ft:gone", "Hi")
    assert "answered 404: Error code: 404" in sentence and "None" not in sentence


# the system prompt


def test_the_system_prompt_is_that_of_the_job_that_made_the_model(api, model, capsys):
    """An older model gets its own prompt, by name, by job and by checkpoint; an unknown one gets none."""
    older = api.finish(api.add_job(model=BASE)["id"])
    fine_tuned_model = older["fine_tuned_model"]
    checkpoint = f"ft:{BASE}:acme::another-id:ckpt-step-2"
    write_record(
        older, f"fine_tune_jobs/{older['id']}.json", fine_tuned_model=fine_tuned_model, system_prompt="Be brief.",
        checkpoints=[checkpoint, fine_tuned_model],
    )  # fmt: skip
    api.add_model(checkpoint)
    for name in (fine_tuned_model, older["id"], checkpoint):
        step4.main([name, "Hi there"])
        assert asked(api)[-1]["messages"][0] == {"role": "system", "content": "Be brief."}
        assert capsys.readouterr().err.endswith(f"Next: python test_model.py {name}\n")
    step4.main([BASE, "Hi there"])
    assert [message["role"] for message in asked(api)[-1]["messages"]] == ["user"]
    assert "System prompt: none recorded for this model (--system TEXT sends one)" in capsys.readouterr().err


def test_another_system_prompt(api, model, capsys):
    step4.main(["Hi", "--system", "You are a pirate."])
    assert asked(api)[0]["messages"][0]["content"] == "You are a pirate."
    assert "System prompt: --system" in capsys.readouterr().err


# how an answer ends


@pytest.mark.parametrize(
    ("finish_reason", "told"),
    [
        ("stop", ""),
        ("length", "(The answer is cut off: "),
        ("content_filter", "(The server's content filter stopped"),
        (None, "(The server did not say why the answer ended"),
        ("tool_calls", "(It ended with tool_calls.)"),
    ],
)
def test_every_end_of_an_answer_has_its_sentence(api, model, capsys, finish_reason, told):
    api.finish_reason = finish_reason
    step4.main(["Hi"])
    out, err = capsys.readouterr()
    assert out == "You said: Hi\n" and told in err and bool(told) == ("\n(" in err)


def test_a_refusal_s_text_is_shown(api, model, capsys):
    api.refusal, api.answer = True, lambda name, messages: "I will not."
    step4.main(["Hi"])
    assert capsys.readouterr().out == "I will not.\n"


@pytest.mark.parametrize(
    ("fault", "sentence"), [("drop stream", "No answer from http"), ("malformed", "answered nonsense")]
)
def test_an_answer_that_breaks_off_keeps_what_was_shown(api, model, capsys, fault, sentence):
    api.fault("POST /chat/completions", fault)
    assert sentence in refused("one two three four")
    assert capsys.readouterr().out == "You said: one \n"
    assert len(asked(api)) == 1


def test_a_server_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    assert "Is it running? (Local API: python -m local_api)" in refused("ft:a", "Hi")


# the chat, the comparison, the list


def talk(monkeypatch, *lines: str) -> None:
    lines_left = iter(lines)

    def read(prompt: str) -> str:
        for line in lines_left:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", read)


def test_a_chat_remembers_and_survives_a_failed_answer(api, model, monkeypatch, capsys):
    api.fault("POST /chat/completions", "400", message="too long")
    talk(monkeypatch, "", "Hi", "And now?")
    step4.main([])
    assert "answered 400: too long" in capsys.readouterr().err
    _, first, second = (request["messages"] for request in asked(api))
    assert [message["content"] for message in first] == [SYSTEM, "Hi"]
    assert [message["content"] for message in second] == [SYSTEM, "Hi", "You said: Hi", "And now?"]


def test_compare_asks_both_models_the_same(api, model, capsys):
    api.answer = lambda name, messages: f"I am {name}."
    step4.main(["Who are you?", "--compare"])
    assert capsys.readouterr().out == f"--- base: {BASE}\nI am {BASE}.\n--- fine_tuned: {model}\nI am {model}.\n"
    base, fine_tuned = asked(api)
    assert base["messages"] == fine_tuned["messages"]
    assert "No record names the base model of" in refused(BASE, "Who are you?", "--compare")


@pytest.mark.parametrize("answer", [["a", "b"], None])
def test_a_server_that_answers_something_else_than_the_api_is_named(api, model, monkeypatch, answer):
    monkeypatch.setattr(api, "route", lambda request: answer)
    assert "answered nonsense" in refused("--list-models")


def test_list_models(api, model, capsys):
    step4.main(["--list-models"])
    assert capsys.readouterr().out.splitlines() == step4.list_models()
    assert {BASE, model} <= set(step4.list_models())


def test_for_other_code(api, model, capsys):
    assert step4.get_model_id("ftjob-0001") == model
    handler = step4.create_fine_tuned_handler()
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert handler("c", history) == "You said: c" and len(history) == 2
    assert [message["content"] for message in asked(api)[-1]["messages"]] == [SYSTEM, "a", "b", "c"]
    step4.create_fine_tuned_handler(BASE, "Be brief.")("Hi")
    assert asked(api)[-1]["model"] == BASE and asked(api)[-1]["messages"][0]["content"] == "Be brief."
    assert capsys.readouterr().out == ""
    assert step4.compare_models("Hi") == {"base": "You said: Hi", "fine_tuned": "You said: Hi"}


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_ends_with_130(api, model):
    api.stream_delay, api.answer = 0.2, lambda name, messages: "word " * 100
    command = [sys.executable, str(SCRIPT), "Hi there"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(5) == b"word "
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and b"Interrupted" in err and b"Traceback" not in err
