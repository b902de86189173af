"""use_fine_tuned_model.py: whom it asks, what it sends, and every way an answer can fail to arrive."""

import ast
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fake_api import FakeAPI

import use_fine_tuned_model as step4

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "use_fine_tuned_model.py"
SYSTEM = "You are the support assistant of TechFlow."


@pytest.fixture
def api(tmp_path, monkeypatch):
    with FakeAPI() as api:
        monkeypatch.chdir(tmp_path)
        for name, value in api.env().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "stdin", Terminal())
        yield api


@pytest.fixture
def model(api):
    """The fine-tuned model of the job that fine_tune_job.json records."""
    job = api.finish(api.add_job(model="smollm2-135m-instruct")["id"])
    write_record(api, job["id"])
    return job["fine_tuned_model"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def write_record(api, job_id, **more):
    record = {
        "job_id": job_id,
        "base_url": api.base_url,
        "model": "smollm2-135m-instruct",
        "system_prompt": SYSTEM,
        **more,
    }
    Path("fine_tune_job.json").write_text(json.dumps(record), encoding="utf-8")


def asked(api):
    return [request.body for request in api.requests if request.path == "/chat/completions"]


# whom it asks


def test_without_arguments_but_a_question_it_asks_the_recorded_job_with_the_training_prompt(api, model, capsys):
    assert step4.main(["How do I add a user?"]) == 0
    out, err = capsys.readouterr()
    assert out == "You said: How do I add a user?\n"
    assert model in err and "training data" in err and err.rstrip().endswith("Next: python test_model.py")
    (request,) = asked(api)
    assert request["model"] == model and request["temperature"] == 0
    assert request["messages"] == [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "How do I add a user?"},
    ]


@pytest.mark.parametrize(
    ("arguments", "expected_model", "question"),
    [
        (["ftjob-0001", "Hi"], "ft:smollm2-135m-instruct:acme::0001", "Hi"),
        (["ft:smollm2-135m-instruct:acme::0001", "Hi"], "ft:smollm2-135m-instruct:acme::0001", "Hi"),
        (["smollm2-135m-instruct", "Hi there"], "smollm2-135m-instruct", "Hi there"),
        (["Hello?"], "ft:smollm2-135m-instruct:acme::0001", "Hello?"),
        (["smollm2"], "ft:smollm2-135m-instruct:acme::0001", "smollm2"),
    ],
)
def test_model_and_question_are_told_apart(api, model, arguments, expected_model, question):
    assert step4.main(arguments) == 0
    assert (asked(api)[0]["model"], asked(api)[0]["messages"][-1]["content"]) == (expected_model, question)


@pytest.mark.parametrize("arguments", [[], ["-"], ["ftjob-0001"], ["ftjob-0001", "-"], ["smollm2-135m-instruct"]])
def test_the_question_may_come_through_a_pipe(api, model, monkeypatch, arguments):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Where is\nmy invoice?\n"))
    assert step4.main(arguments) == 0
    assert asked(api)[0]["messages"][-1]["content"] == "Where is\nmy invoice?"


def test_an_empty_pipe_is_no_question(api, model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    assert step4.main([]) == 2
    assert "no question" in capsys.readouterr().err
    assert not asked(api)


@pytest.mark.parametrize("flag", ["--compare", "--json"])
def test_compare_and_json_need_a_question(api, model, capsys, flag):
    assert step4.main([flag]) == 2
    assert "no question" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "system"), [(["--system", "Be brief."], "Be brief."), (["--system", ""], None), ([], SYSTEM)]
)
def test_the_system_prompt(api, model, arguments, system):
    assert step4.main(["Hi", *arguments]) == 0
    first = asked(api)[0]["messages"][0]
    assert first == ({"role": "system", "content": system} if system else {"role": "user", "content": "Hi"})


def test_another_jobs_model_is_not_asked_with_this_jobs_prompt(api, model, capsys):
    other = api.finish(api.add_job(model="gpt-4.1-mini-2025-04-14")["id"])
    assert step4.main([other["id"], "Hi"]) == 0
    assert asked(api)[0]["messages"] == [{"role": "user", "content": "Hi"}]
    assert "System prompt: none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "code"), [("running", 3), ("queued", 3), ("paused", 3), ("failed", 1), ("cancelled", 1)]
)
def test_a_job_without_a_model(api, capsys, status, code):
    api.job_plan = [status]
    job = api.add_job()
    write_record(api, job["id"])
    assert step4.main(["Hi"]) == code
    err = capsys.readouterr().err
    assert status in err and f"python check_fine_tune_status.py {job['id']}" in err and len(err.splitlines()) == 1


def test_no_record(api, capsys):
    assert step4.main(["Hi"]) == 2
    assert "python fine_tune.py" in capsys.readouterr().err


def test_a_missing_job_is_named_before_a_missing_question(api, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert step4.main([]) == 2
    assert "python fine_tune.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "named"),
    [("ftjob-0001", "ftjob-0001"), ("ft:smollm2-135m-instruct:acme::0001",) * 2, ("smollm2-135m-instruct", "")],
)
def test_the_next_line_keeps_what_was_named(api, model, capsys, name, named):
    assert step4.main([name, "Hi"]) == 0
    assert capsys.readouterr().err.endswith(f"Next: python test_model.py {named}".rstrip() + "\n")


def test_a_record_whose_job_was_never_created(api, capsys):
    write_record(api, None)
    assert step4.main(["Hi"]) == 2
    assert "python fine_tune.py" in capsys.readouterr().err


def test_a_record_of_another_server(api, model, capsys):
    write_record(api, "ftjob-0001", base_url="http://127.0.0.1:9/v1")
    assert step4.main(["Hi there"]) == 2
    err = capsys.readouterr().err
    assert "http://127.0.0.1:9/v1" in err and "OPENAI_BASE_URL" in err and not api.requests
    assert step4.main([model, "Hi"]) == 0  # a model named by hand is asked for
    write_record(api, "ftjob-0001", base_url=api.base_url.replace("127.0.0.1", "localhost"))
    assert step4.main(["Hi there"]) == 0  # the same server by its other name


def test_no_server_is_configured(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert step4.main(["Hi there"]) == 2
    assert ".env.example" in capsys.readouterr().err


def test_nobody_listens_there(model, monkeypatch, capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{unused.getsockname()[1]}/v1")
        start = time.monotonic()
        assert step4.main([model, "Hi"]) == 4
    assert "python -m local_api" in capsys.readouterr().err
    assert time.monotonic() - start < 5


# what it prints


def test_json_is_one_document(api, model, capsys):
    assert step4.main(["Hi", "--json", "--max-tokens", "7", "--temperature", "0.5"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document.pop("latency_seconds") >= 0
    assert document.pop("usage")["completion_tokens"] == 3
    assert document == {"model": model, "answer": "You said: Hi", "finish_reason": "stop"}
    assert (asked(api)[0]["max_tokens"], asked(api)[0]["temperature"]) == (7, 0.5)


def test_compare_asks_both_models_the_same(api, model, capsys):
    api.answer = lambda name, messages: f"I am {name}."
    assert step4.main(["Who are you?", "--compare"]) == 0
    out = capsys.readouterr().out
    assert out.index("I am smollm2-135m-instruct.") < out.index(f"I am {model}.")
    base, tuned = asked(api)
    assert base["messages"] == tuned["messages"]
    assert step4.main(["Who are you?", "--compare", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [document["base"]["answer"], document["fine_tuned"]["answer"]] == [
        "I am smollm2-135m-instruct.",
        f"I am {model}.",
    ]


def test_list_models_shows_fine_tuned_ones_first_with_their_shutdown_dates(api, model, capsys):
    api.add_model("aaa", shutdown_date="2027-01-14")
    assert step4.main(["--list-models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == model and "shuts down 2027-01-14" in lines[1] and lines[1].startswith("aaa ")
    assert step4.main(["--list-models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[1]["shutdown_date"] == "2027-01-14"


def test_an_answer_cut_by_max_tokens_says_so(api, model, capsys, monkeypatch):
    chunk = (
        '{"id":"1","object":"chat.completion.chunk","created":1,"model":"m",'
        '"choices":[{"index":0,"delta":%s,"finish_reason":%s}]}'
    )
    body = [chunk % ('{"content":"Half of"}', "null"), chunk % ("{}", '"length"'), "[DONE]"]
    with RawServer(b"".join(f"data: {data}\n\n".encode() for data in body)) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        assert step4.main([model, "Hi"]) == 0
    out, err = capsys.readouterr()
    assert out == "Half of\n" and "--max-tokens" in err


NASTY = (
    "[/bold] <b>&amp;</b> \x1b]0;title\x07\x1b[31mred\x1b[0m\x9b31m\x00 a\rb "
    "\u202egnp.exe {x} %s \ud83d\ude00 tab\tend\nüñ"
)


@pytest.mark.skipif(os.name == "nt", reason="there is no pty on Windows")
def test_a_terminal_gets_no_control_characters_and_a_pipe_gets_every_character(api, model):
    import pty

    text = NASTY.encode("utf-16", "surrogatepass").decode("utf-16")
    api.answer = lambda name, messages: text
    command = [sys.executable, str(SCRIPT), "Hi there"]
    piped = subprocess.run(command, capture_output=True, timeout=60, check=True, stdin=subprocess.DEVNULL)
    assert piped.stdout.decode() == text + "\n"

    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # Linux reports the end of a terminal so
        pass
    assert process.wait(60) == 0
    seen = shown.decode().replace("\r\n", "\n")
    assert not set(seen) & {"\x1b", "\x07", "\x00", "\x9b", "\r", "\u202e"}
    assert "[/bold] <b>&amp;</b> �]0;title��[31mred" in seen and "{x} %s 😀 tab" in seen and "üñ" in seen


def test_a_terminal_without_utf8_ends_nothing(api, model):
    api.answer = lambda name, messages: "Ja, natürlich – 😀"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "Hi there"],
        env=environment,
        capture_output=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0 and done.stdout.split() == b"Ja, nat?rlich ? ?".split()


def test_a_closed_pipe_is_no_error(api, model):
    api.answer = lambda name, messages: "word " * 5000
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "Hi there"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    assert process.stdout.read(5) == b"word "
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(60) == 0 and "Traceback" not in err and "Exception" not in err


# answers that do not arrive


class RawServer:
    """Answers every POST with a stream of these bytes; then the body ends, the connection breaks, or nothing comes."""

    def __init__(self, body: bytes, end: str = "close"):
        self.body, self.end, self.requests = body, end, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.base_url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        self.done = threading.Event()

    def __enter__(self):
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.done.set()
        self.listener.close()

    def serve(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.answer, args=(connection,), daemon=True).start()

    def answer(self, connection):
        with connection:
            received = b""
            while b"\r\n\r\n" not in received:
                received += connection.recv(65536)
            head, _, rest = received.partition(b"\r\n\r\n")
            length = next(
                int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
            )
            while len(rest) < length:
                rest += connection.recv(65536)
            self.requests += 1
            ends_cleanly = self.end == "close"
            connection.sendall(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n"
                + (b"" if ends_cleanly else b"Content-Length: 999999\r\n")
                + b"\r\n"
                + self.body
            )
            if self.end == "stall":
                self.done.wait(20)


WHOLE = (
    b"".join(
        b"data: "
        + json.dumps(
            {
                "id": "1",
                "object": "chat.completion.chunk",
                "created": 1,
                "model": "m",
                "choices": [{"index": 0, "delta": delta, "finish_reason": reason}],
            }
        ).encode()
        + b"\n\n"
        for delta, reason in [
            ({"role": "assistant", "content": ""}, None),
            ({"content": "One"}, None),
            ({"content": " two"}, None),
            ({"content": " thr\u00e9e"}, None),
            ({}, "stop"),
        ]
    )
    + b"data: [DONE]\n\n"
)
FINISHED = WHOLE.index(b"data: [DONE]")  # from here on the finish reason has come


def check_cut(cut: int, end: str, monkeypatch, capsys) -> None:
    with RawServer(WHOLE[:cut], end) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        code = step4.main(["ft:m:a::b", "Hi"])
    out, err = capsys.readouterr()
    assert "One two thrée".startswith(out.strip())
    if cut >= FINISHED and end == "close":
        assert (code, out) == (0, "One two thrée\n")
    elif out.strip() and cut < FINISHED:
        assert code == 4 and "cut short" in err and server.requests == 1  # never asked again after the first word
    elif cut < FINISHED - 2:
        assert code == 4 and server.requests == 3 and "asking again" in err


@pytest.fixture
def quick(api, monkeypatch):
    """No waiting between attempts, and a short patience with a silent server."""
    monkeypatch.setattr(step4.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("FINE_TUNE_TIMEOUT", "0.3")


PLACES = sorted(
    {
        0,
        1,
        40,
        WHOLE.index(b"One") + 3,
        WHOLE.index(b"two") + 10,
        WHOLE.index(b"thr") + 6,
        FINISHED - 40,
        FINISHED - 1,
        FINISHED,
        FINISHED + 5,
        len(WHOLE),
    }
)


@pytest.mark.parametrize("end", ["close", "reset"])
@pytest.mark.parametrize("cut", PLACES)
def test_a_stream_cut_at(cut, end, quick, monkeypatch, capsys):
    check_cut(cut, end, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["close", "reset"])
def test_a_stream_cut_at_every_byte(end, quick, monkeypatch, capsys):
    for cut in range(len(WHOLE) + 1):
        check_cut(cut, end, monkeypatch, capsys)


@pytest.mark.parametrize("cut", [WHOLE.index(b"two"), WHOLE.index(b"thr")])
def test_a_stream_that_stalls(cut, quick, monkeypatch, capsys):
    check_cut(cut, "stall", monkeypatch, capsys)


@pytest.mark.parametrize("fault", ["cut stream", "drop stream", "truncated", "malformed"])
def test_what_was_printed_stays_and_is_not_asked_again(api, model, capsys, fault):
    api.fault("POST /chat/completions", fault)
    assert step4.main(["one two three four"]) == 4
    out, err = capsys.readouterr()
    assert out.startswith("You said: one") and "cut short" in err
    assert len(asked(api)) == 1


@pytest.mark.parametrize(
    "event",
    [
        b"[1]",
        b'{"choices": [], "usage": 5}',
        b'{"choices": [{"index": 0, "delta": {"content": [{"type": "text"}]}}]}',
        b'{"choices": 5}',
        b"\xff",
    ],
)
def test_an_event_that_cannot_be_read_gets_a_sentence(event, quick, monkeypatch, capsys):
    with RawServer(b"data: " + event + b"\n\n" + WHOLE) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        assert step4.main(["ft:m:a::b", "Hi"]) == 4
    assert "sent an answer that cannot be read: it is no chat completion." in capsys.readouterr().err


@pytest.mark.parametrize("event", [b'{"choices": null}', b"{}", b'{"choices": [{"index": 0, "delta": null}]}'])
def test_an_event_without_text_is_passed_over(event, quick, monkeypatch, capsys):
    with RawServer(b"data: " + event + b"\n\n" + WHOLE) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        assert step4.main(["ft:m:a::b", "Hi"]) == 0
    assert capsys.readouterr().out == "One two thr\u00e9e\n"


def test_what_the_server_says_in_the_middle_of_an_answer_is_shown(quick, monkeypatch, capsys):
    error = b'data: {"error": {"message": "out of\\nmemory"}}\n\n'
    with RawServer(WHOLE[: WHOLE.index(b"data: ", WHOLE.index(b"two"))] + error) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        assert step4.main(["ft:m:a::b", "Hi"]) == 4
    out, err = capsys.readouterr()
    assert out == "One two\n" and "cut short: ask again.\n" in err and err.endswith("out of memory.\n")


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "x"])
def test_a_temperature_that_is_none(api, model, capsys, value):
    with pytest.raises(SystemExit) as end:
        step4.main(["Hi", "--temperature", value])
    assert end.value.code == 2 and "--temperature" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("fault", ["500 before", "500 after", "drop before", "drop after"])
def test_before_the_first_word_it_asks_again_and_says_so(api, model, capsys, monkeypatch, fault):
    monkeypatch.setattr(step4.time, "sleep", lambda seconds: None)
    api.fault("POST /chat/completions", fault)
    code = step4.main(["Hi"])
    out, err = capsys.readouterr()
    assert (code, out, len(asked(api))) == (0, "You said: Hi\n", 2)
    assert "asking again" in err


def test_it_does_not_ask_for_ever(api, model, capsys, monkeypatch):
    monkeypatch.setattr(step4.time, "sleep", lambda seconds: None)
    api.fault("POST /chat/completions", "500 before", times=99)
    assert step4.main(["Hi"]) == 4
    assert len(asked(api)) == 3 and "answered 500" in capsys.readouterr().err


def test_a_rate_limit_is_waited_for_and_said(api, model, capsys, monkeypatch):
    waits = []
    monkeypatch.setattr(step4.time, "sleep", waits.append)
    api.fault("POST /chat/completions", "429", times=2, retry_after=7)
    api.fault("POST /chat/completions", "429")
    assert step4.main(["Hi"]) == 0
    assert waits == [7, 7, 2]  # as the server says, else our own doubling
    assert "limits the rate; asking again in 7 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "how", "code"),
    [
        ("429", {"code": "insufficient_quota"}, 4),
        ("429", {"retry_after": 4000}, 4),
        ("401", {}, 2),
        ("403", {}, 2),
        ("404", {}, 2),
        ("400", {}, 2),
    ],
)
def test_what_waiting_does_not_cure_is_not_asked_again(api, model, capsys, fault, how, code):
    api.fault("POST /chat/completions", fault, times=9, **how)
    assert step4.main(["Hi"]) == code
    err = capsys.readouterr().err
    assert f"answered {fault}" in err and len(asked(api)) == 1 and "Traceback" not in err


@pytest.mark.parametrize("fault", ["400", "401", "500 after"])
def test_the_key_is_never_printed(api, model, capsys, monkeypatch, fault):
    monkeypatch.setattr(step4.time, "sleep", lambda seconds: None)
    api.echo_key = True
    api.fault("*", fault, times=99)
    assert step4.main([model, "Hi"]) in (2, 4)
    assert api.key not in "".join(capsys.readouterr())


# the chat


def talk(monkeypatch, *lines):
    lines = iter(lines)

    def read(prompt=""):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)


def test_a_chat_keeps_its_history_until_reset(api, model, monkeypatch, capsys):
    talk(monkeypatch, "Hi", "", "And now?", "/reset", "Hello again")
    assert step4.main([]) == 0
    first, second, third = (request["messages"] for request in asked(api))
    assert [message["role"] for message in first] == ["system", "user"]
    assert second == [*first, {"role": "assistant", "content": "You said: Hi"}, {"role": "user", "content": "And now?"}]
    assert third == [first[0], {"role": "user", "content": "Hello again"}]
    assert "/reset" in capsys.readouterr().err


def test_an_answer_that_fails_does_not_end_the_chat(api, model, monkeypatch, capsys):
    api.fault("POST /chat/completions", "cut stream")
    talk(monkeypatch, "one two three", "Still there?")
    assert step4.main([model]) == 0
    out, err = capsys.readouterr()
    assert "cut short" in err and "You said: Still there?" in out
    assert [message["content"] for message in asked(api)[-1]["messages"]] == [SYSTEM, "Still there?"]


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_ends_with_130(api, model):
    api.stream_delay, api.answer = 0.2, lambda name, messages: "word " * 100
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "Hi there"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    assert process.stdout.read(5) == b"word "
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and b"Interrupted" in err and b"Traceback" not in err


# for other code


def test_the_handler_is_a_drop_in(api, model):
    handler = step4.create_fine_tuned_handler()
    assert handler("Hi") == "You said: Hi"
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert handler("c", history) == "You said: c"
    assert [message["content"] for message in asked(api)[-1]["messages"]] == [SYSTEM, "a", "b", "c"]
    assert len(history) == 2
    other = step4.create_fine_tuned_handler("smollm2-135m-instruct", system_prompt="Be brief.")
    other("Hi")
    assert (
        asked(api)[-1]["model"] == "smollm2-135m-instruct" and asked(api)[-1]["messages"][0]["content"] == "Be brief."
    )


def test_its_functions(api, model):
    assert step4.get_model_id("ftjob-0001") == model
    assert step4.list_models()[0] == {"id": model, "owned_by": "acme", "shutdown_date": None}
    compared = step4.compare_models("Hi", "Be brief.")
    assert compared["base"]["model"] == "smollm2-135m-instruct" and compared["fine_tuned"]["answer"] == "You said: Hi"
    with pytest.raises(step4.StepError, match="404"):
        step4.get_model_id("ftjob-none")


# the script itself


def test_help_and_import_do_not_pay_for_openai():
    code = (
        "import sys, use_fine_tuned_model as s\ntry: s.main(['--help'])\nexcept SystemExit: pass\n"
        "print('openai' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.rstrip().endswith("False"), done.stderr


def test_what_stands_in_two_scripts_is_the_same():
    def of(name: str) -> dict[str, str]:
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        return {node.name: ast.dump(node) for node in tree.body if isinstance(node, ast.FunctionDef)}

    ours, theirs = of("use_fine_tuned_model.py"), of("test_model.py")
    for name in ("retry_delay", "get_model_id"):
        assert ours[name] == theirs[name]
    import test_model

    assert test_model.CONTROLS == step4.CONTROLS


def test_a_missing_package_is_named_with_the_cure(api, model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openai", None)
    assert step4.main(["Hi there"]) == 2
    err = capsys.readouterr().err
    assert "openai" in err and "virtual environment" in err and "python -m pip install -r requirements.txt" in err
