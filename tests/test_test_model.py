"""test_model.py: its statistics, its cases, its checks, its journal, its verdict and its files, through main()."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_api import FakeAPI

import test_model as step5

ROOT = Path(__file__).parent.parent
BASE = "smollm2-135m-instruct"
TUNED = f"ft:{BASE}:acme::0001"
PROMPT = "You are kind."


@pytest.fixture
def api(tmp_path, monkeypatch):
    """A server with one finished job, recorded in fine_tune_job.json."""
    with FakeAPI() as api:
        monkeypatch.chdir(tmp_path)
        for name, value in api.env().items():
            monkeypatch.setenv(name, value)
        assert api.finish(api.add_job(model=BASE)["id"])["fine_tuned_model"] == TUNED
        record(api)
        yield api


def record(api, path="fine_tune_job.json", **more):
    job = {"job_id": "ftjob-0001", "server": api.base_url, "model": BASE, "fine_tuned_model": TUNED, **more}
    Path(path).write_text(json.dumps({"system_prompt": PROMPT, **job}), encoding="utf-8")


def cases(*rows, name="cases.json", **shared):
    document = {"cases": list(rows), **shared} if shared else list(rows)
    text = json.dumps(document) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    Path(name).write_text(text, encoding="utf-8")
    return name


def numbered(count, **more):
    checks = {"contains": "right"}
    return [
        {"id": f"c{n}", "question": f"Question {n}?", "answer": "right", "checks": checks, **more} for n in range(count)
    ]


def pass_these(api, base, tuned):
    """Let the base model pass the cases whose number is in `base`, the fine-tuned one those in `tuned`."""

    def answer(model, messages):
        number = int(messages[-1]["content"].split()[1].rstrip("?"))
        return "It is right." if number in (tuned if model == TUNED else base) else "Wrong."

    api.answer = answer


def finish_reason(api, reason):
    """Let the fine-tuned model's answers end for this reason."""
    chat = api.chat

    def answered(request):
        completion = chat(request)
        if request.body["model"] == TUNED:
            completion["choices"][0]["finish_reason"] = reason
        return completion

    api.chat = answered


def run(*arguments, file="cases.json"):
    step5.main(["--cases", file, *arguments])
    return results()


def fails(*arguments, file="cases.json"):
    """Return the last sentence of a run that ends with exit code 1."""
    with pytest.raises(SystemExit) as end:
        step5.main(["--cases", file, *arguments])
    assert isinstance(end.value.code, str)  # sys.exit(text): exit code 1
    return end.value.code


def results():
    document = json.loads(Path("test_results.json").read_text(encoding="utf-8"))
    return document["summary"], {result["id"]: result for result in document["results"]}


def asked(api):
    return [request.body for request in api.requests if request.path == "/chat/completions" and request.body]


# --- the statistics ---


@pytest.mark.parametrize(
    ("passed", "cases", "low", "high"),
    [  # Newcombe 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (10, 10, 0.7225, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_intervals_are_the_published_ones(passed, cases, low, high):
    assert step5.wilson_interval(passed, cases) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize(
    ("fixed", "broken", "p"),
    [
        (6, 0, 0.03125),
        (5, 0, 0.0625),
        (9, 1, 0.021484375),
        (8, 2, 0.109375),
        (0, 0, 1.0),
        (3, 3, 1.0),
        (5, 15, 0.0413895),
    ],
)
def test_mcnemar_s_exact_test(fixed, broken, p):
    assert step5.mcnemar_exact(fixed, broken) == step5.mcnemar_exact(broken, fixed) == pytest.approx(p)


@pytest.mark.parametrize(
    ("base", "tuned", "verdict"),
    [
        ((), range(6), "better"),
        (range(6), (), "worse"),
        ((), range(5), "not enough cases"),
        (range(4), range(4, 8), "no difference shown"),
    ],
)
def test_the_verdict(api, base, tuned, verdict):
    cases(*numbered(10))
    pass_these(api, base, tuned)
    summary, _ = run()
    assert summary["verdict"] == verdict and (summary["base"]["passed"], summary["fine_tuned"]["passed"]) == (
        len(base),
        len(tuned),
    )


# --- one run ---


def test_what_it_asks_says_and_leaves(api, capsys):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    cases(*numbered(10, category="format", system="Be brief.", history=turns))
    pass_these(api, base=range(2), tuned=range(1, 9))
    summary, by_id = run("--failures", "failing.jsonl")
    assert summary["fixed"] == [f"c{n}" for n in range(2, 9)] and summary["broken"] == ["c0"]
    assert summary["still passing"] == ["c1"] and summary["still failing"] == ["c9"]
    assert summary["p_value"] == pytest.approx(step5.mcnemar_exact(7, 1)) and summary["cases"] == 10
    assert summary["categories"]["format"]["fine_tuned"]["passed"] == 8 and summary["model"] == TUNED
    one = by_id["c0"]
    assert (one["question"], one["expected"], one["system"]) == ("Question 0?", "right", "Be brief.")
    assert (one["generated"], one["base_generated"], one["outcome"]) == ("Wrong.", "It is right.", "broken")
    problem = 'does not contain "right"'
    check = {"check": "contains", "name": None, "value": "right", "passed": False, "problem": problem}
    assert one["fine_tuned"]["checks"] == [check] and one["fine_tuned"]["problem"] == problem and one["base"]["passed"]
    requests = asked(api)
    assert [message["content"] for message in requests[0]["messages"]][:3] == ["Be brief.", "a", "b"]
    assert (requests[0]["temperature"], requests[0]["seed"], requests[0]["max_tokens"]) == (0, 42, 400)
    assert [body["model"] for body in requests] == [BASE] * 10 + [TUNED] * 10  # one model after the other
    out = capsys.readouterr().out
    assert "base model" in out and "2 of 10" in out and "8 of 10" in out and problem in out
    assert "Failing cases: failing.jsonl, to look at, never to train on" in out
    assert "README, step 6" in out.splitlines()[-1] and "--failures" not in out.splitlines()[-1]
    failing = [json.loads(line) for line in Path("failing.jsonl").read_text("utf-8").splitlines()]
    assert [row["id"] for row in failing] == ["c0", "c9"] and failing[0]["fine_tuned"]["problem"] == problem
    assert failing[0]["generated"] == "Wrong." and failing[0]["expected"] == "right"


def test_a_local_server_is_asked_sixteen_at_a_time(api):
    cases(*numbered(20))
    under_way, most = [], [0]

    def wait(request):
        under_way.append(request)
        most[0] = max(most[0], len(under_way))
        time.sleep(0.3)
        under_way.pop()

    api.after = wait
    run()
    assert most[0] == step5.AT_ONCE_LOCALLY == 16


def test_what_comes_next_is_no_circle(api, capsys):
    cases(*numbered(2))
    run()
    assert capsys.readouterr().out.splitlines()[-1].startswith("Next: the same command with --failures")
    pass_these(api, (), (0, 1))
    Path("test_answers.jsonl").unlink()
    run()
    assert "docs/deployment.md" in capsys.readouterr().out.splitlines()[-1]


def test_below_min_pass_rate_the_exit_code_is_1_and_the_last_line_says_why(api):
    cases(*numbered(10))
    pass_these(api, (), range(8))
    assert run("--min-pass-rate", "0.8")[0]["fine_tuned"]["pass_rate"] == 0.8
    assert "--min-pass-rate 0.9" in fails("--min-pass-rate", "0.9")


def test_success_criteria(api, capsys):
    rows = numbered(10, category="format")
    for row in rows[6:]:
        row["category"] = "tone"
    criteria = [
        {"name": "Form", "category": "format", "min_pass_rate": 0.5, "judge": "tone"},
        {"name": "Own check", "checks": {"max_chars": 6}, "min_pass_rate": 0.7},
        {"name": "Too few", "category": "tone", "min_pass_rate": 0.0, "min_cases": 5},
        {"name": "No case", "category": "other", "min_pass_rate": 0.0},
        {"name": "All", "min_pass_rate": 0.31},
    ]
    cases(*rows, criteria=criteria)
    pass_these(api, (), range(3))
    summary, _ = run()
    of = {row["name"]: (row["met"], row["passed"], row["cases"]) for row in summary["criteria"]}
    assert of == {"Form": (True, 3, 6), "Own check": (True, 7, 10), "All": (False, 3, 10)} | {
        "Too few": (False, 0, 4),
        "No case": (False, 0, 0),
    }
    assert summary["criteria"][0]["judge"] == "tone"  # of the judge's page, and kept for it
    out = capsys.readouterr().out
    assert "✓ met      Form" in out and "✗ not met  All" in out and "50%" in out


def test_two_fine_tuned_models(api, capsys):
    older = api.finish(api.add_job(model=BASE)["id"])["fine_tuned_model"]
    cases(*numbered(1))
    assert run("--base-model", older)[0]["base_model"] == older
    out = capsys.readouterr().out
    assert "base model" not in out and "other model" in out


def test_for_other_code(api):
    tester = step5.ModelTester(TUNED, BASE)
    assert tester.generate_answer("Hi", system="S") == "You said: Hi"
    rows, _ = step5.read_cases(ROOT / "examples" / "education" / "test_cases.json")
    assert [result["id"] for result in tester.run_test_cases(rows)] == [row["id"] for row in rows]


# --- what passes ---


@pytest.mark.parametrize("reason", ["length", "content_filter"])
def test_an_answer_that_was_cut_fails_whatever_its_checks_find(api, reason):
    criterion = {"name": "Own", "checks": {"max_chars": 99}, "min_pass_rate": 0.5}
    cases(*numbered(2), criteria=[criterion])
    pass_these(api, (0, 1), (0, 1))
    finish_reason(api, reason)
    summary, by_id = run()
    assert summary["base"]["passed"] == 2 and summary["fine_tuned"]["passed"] == 0 and not summary["criteria"][0]["met"]
    assert "was cut" in by_id["c0"]["fine_tuned"]["problem"] and by_id["c0"]["fine_tuned"]["checks"][0]["passed"]


EARLIER = (
    "Hi there! I can help you add a date in Orion. 1. Open the task. 2. Click Due Date. 3. Choose a day. Anything else?"
)


@pytest.mark.parametrize(
    ("answer", "expected", "passed"),
    [
        (EARLIER.lower(), "For Orion: hide it.", False),
        (EARLIER.replace("in Orion", "to the Orion project"), "For Orion: hide it.", False),
        ("In Orion, open the task and hide its date.", "For Orion: hide it.", True),
        (EARLIER, EARLIER, True),  # where the case itself expects that
    ],
)
def test_an_answer_that_repeats_an_earlier_turn_fails(api, answer, expected, passed):
    history = [{"role": "user", "content": "A date in Orion?"}, {"role": "assistant", "content": EARLIER}]
    case = {"history": history, "question": "And to hide it?", "answer": expected, "checks": {"contains": "Orion"}}
    cases(case)
    api.answer = lambda model, messages: answer
    assert run()[0]["fine_tuned"]["passed"] == passed


@pytest.mark.parametrize(
    ("answer", "expected", "passed"),
    [
        ("-5", "5", False),
        ("3.14", "314", False),
        ("A", "The", False),
        ("a", "A", True),
        (" The  cat\n", "the cat", True),
        ("", "x", False),
    ],
)
def test_without_checks_an_answer_is_compared_as_written(api, capsys, answer, expected, passed):
    cases({"question": "q", "answer": expected})
    api.answer = lambda model, messages: answer
    assert run()[0]["fine_tuned"]["passed"] == passed
    assert "1 cases pass only word for word: add" in capsys.readouterr().out


@pytest.mark.parametrize("thought", ["<think>\nIs it wrong?</think>\n\n", "Is it wrong?\n</think>"])
def test_what_a_model_thinks_is_not_graded(api, thought):
    cases({"question": "q", "answer": "Right.", "checks": {"not_contains": "wrong", "matches": r"\ARight"}})
    api.answer = lambda model, messages: f"{thought}Right."
    summary, by_id = run()
    assert summary["fine_tuned"]["passed"] == 1 and by_id["case-1"]["generated"] == "Right."
    api.answer = lambda model, messages: f"{thought}wrong"
    Path("test_answers.jsonl").unlink()
    assert run()[0]["fine_tuned"]["passed"] == 0


@pytest.mark.parametrize(
    ("checks", "answer", "problem"),
    [
        ({"contains": ["Hello"]}, "say hello", ""),
        ({"contains": ["Hello"]}, "hallo", 'does not contain "Hello"'),
        ({"not_contains": "AI"}, "said", 'contains "AI"'),
        ({"matches": [r"^\d\. \w+$"]}, "Do:\n1. go", ""),
        ({"matches": ["a", "b"]}, "a", "does not match /b/"),
        (
            {"matches": [{"pattern": r"\bOrion\b", "name": "refers to the project"}]},
            "x",
            "fails: refers to the project",
        ),
        ({"max_chars": 3}, "abcd", "is longer than 3 characters"),
    ],
)
def test_checks(api, checks, answer, problem):
    cases({"id": 7, "question": "I paid $44?", "checks": checks})
    api.answer = lambda model, messages: answer
    side = run()[1]["7"]["fine_tuned"]
    assert side["problem"] == problem and side["passed"] == (not problem)
    assert [check["problem"] for check in side["checks"] if not check["passed"]] == ([problem] if problem else [])


def test_checks_that_all_cases_share_are_added_to_their_own(api):
    case = {"question": "q", "checks": {"contains": "b"}}
    cases(case, checks={"contains": "a"}, system="S")
    api.answer = lambda model, messages: "a"
    summary, by_id = run()
    assert [check["value"] for check in by_id["case-1"]["fine_tuned"]["checks"]] == ["a", "b"]
    assert summary["fine_tuned"]["passed"] == 0 and asked(api)[0]["messages"][0]["content"] == "S"


# --- the case files ---


def test_chat_rows_as_cases(api, capsys):
    turns = [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": text, "weight": 1} for role, text in turns]
    cases({"messages": messages}, {"messages": messages[1:]}, name="held_out.jsonl")
    api.answer = lambda model, messages: "D"
    summary, by_id = run(file="held_out.jsonl")
    one = by_id["case-1"]
    assert (one["system"], one["question"], one["expected"], len(one["history"])) == ("S", "c", "d", 2)
    assert summary["fine_tuned"]["passed"] == 2 and by_id["case-2"]["system"] == PROMPT
    assert all(message.keys() == {"role", "content"} for body in asked(api) for message in body["messages"])
    assert '2 cases pass only word for word: add "checks"' in capsys.readouterr().out


def test_keys_that_no_case_has_are_named(api, capsys):
    cases({"question": "q", "answer": "a", "Checks": {"contains": "x"}, "source": 1})
    run()
    assert "Ignored keys, which mean nothing in a test case: Checks, source" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("faq.csv", "question,answer\nq,a\n", "is a table: python prepare_training_data.py faq.csv -o cases.jsonl"),
        ("cases.json", "[\n{'a'}]", "line 2"),
        ("cases.jsonl", '{"question": "q", "answer": "a"}\n\n  {"question": "q"\n', "line 3"),
        ("cases.json", b"\xff\xfe", "cannot be read"),
        ("cases.json", [{"question": "q"}], "case-1 itself"),
        (
            "cases.json",
            '{"cases": [], "criteria": [{"name": "n", "min_pass_rate": 1, "checks": {"contain": "a"}}]}',
            "'contain'",
        ),
        ("cases.json", '{"cases": [], "criteria": [{"name": 5, "checks": {"matches": "("}}]}', "min_pass_rate"),
        ("cases.json", '{"cases": [], "criteria": [{"checks": {}}]}', "'name'"),
        ("cases.json", '{"cases": [], "criteria": ["n"]}', "has no attribute 'get'"),
        ("cases.json", "5", "cannot be read"),
        ("cases.json", [{"answer": "a"}], "case 1 cannot be read"),
        ("cases.json", '{"faqs": [{"question": "q", "answer": "a"}]}', "`cases` have: answer, category"),
        ("cases.json", [{"question": "q", "answer": "a"}, 3], "case 2 cannot be read"),
        ("cases.json", [{"question": "q", "answer": "a", "checks": {"contain": "a"}}], "'contain'"),
        ("cases.json", [{"question": "q", "answer": "a", "checks": {"matches": "(("}}], "case 1 cannot be read"),
        ("cases.json", [{"question": "q", "answer": "a", "checks": {"max_chars": "3"}}], "case 1 cannot be read"),
        (
            "cases.json",
            [{"id": "x", "question": "q", "answer": "a", "checks": {"contains": "b"}}],
            'the expected answer of x itself does not contain "b"',
        ),
    ],
)
def test_a_fault_in_the_cases_is_one_sentence_before_anything_is_asked(api, name, text, sentence):
    text = json.dumps(text) if isinstance(text, list) else text
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    said = fails(file=name)
    assert sentence in said and name in said and "\n" not in said and not asked(api)


def test_a_file_that_is_not_there(api):
    assert "no_such.json" in fails(file="no_such.json") and not api.requests


@pytest.mark.parametrize(
    "dataset", ["techflow_support/test_cases", "techflow_support/fresh_cases", "education/test_cases"]
)
def test_the_datasets_show_a_reader_words_instead_of_patterns(dataset):
    rows, criteria = step5.read_cases(ROOT / "examples" / f"{dataset}.json")
    for groups in [row["checks"] for row in rows] + [[of.get("checks", {})] for of in criteria]:
        for group in groups:
            for entry in group.get("matches", []):
                assert re_named(entry["name"]), entry


def re_named(name):
    return 3 < len(name) < 60 and not set(name) & set("\\^$[]|")


# --- models and system prompts ---


def test_no_job_and_no_model(api):
    cases(*numbered(1))
    record(api, fine_tuned_model=None)  # step 3 has not seen it succeed
    assert "steps 2 and 3" in fails()
    Path("fine_tune_job.json").unlink()
    assert "or MODEL --base-model NAME" in fails() and "or MODEL --base-model NAME" in fails("ft:x")


def test_the_system_prompt_is_that_of_the_job_which_made_the_model(api, capsys):
    Path("fine_tune_jobs").mkdir()
    older = api.finish(api.add_job(model=BASE)["id"])["fine_tuned_model"]
    record(api, "fine_tune_jobs/ftjob-0002.json", job_id="ftjob-0002", fine_tuned_model=older, system_prompt="Old.",
           checkpoints=["ft:another-id:ckpt-step-2", older])  # fmt: skip
    api.add_model("ft:another-id:ckpt-step-2")
    cases(*numbered(1))
    for model, prompt in (
        (TUNED, PROMPT),
        (older, "Old."),
        ("ftjob-0002", "Old."),
        ("ft:another-id:ckpt-step-2", "Old."),
    ):
        Path("test_answers.jsonl").unlink(missing_ok=True)
        run(model)
        assert asked(api)[-1]["messages"][0] == {"role": "system", "content": prompt}
        assert asked(api)[-1]["model"] == (older if model == "ftjob-0002" else model)
    assert "Warning" not in capsys.readouterr().out


def test_cases_for_another_model_are_warned_about(api, capsys):
    cases(*numbered(1), system="You are TechFlow's assistant.")
    run()
    assert asked(api)[-1]["messages"][0]["content"] == "You are TechFlow's assistant."
    out = capsys.readouterr().out
    assert "Warning" in out and "You are TechFlow's assistant." in out and PROMPT in out
    api.add_model("mine")
    run("mine", "--base-model", BASE)
    assert "System prompt: none recorded for this model" in capsys.readouterr().out


# --- the journal, and calls that fail ---


def test_no_answer_is_asked_for_twice(api, capsys):
    cases(*numbered(5))
    run()
    assert len(asked(api)) == 10 and "0 answers from test_answers.jsonl, 5 asked" in capsys.readouterr().out
    run()
    assert len(asked(api)) == 10 and "5 answers from test_answers.jsonl, 0 asked" in capsys.readouterr().out
    cases(*numbered(6))
    run()
    assert len(asked(api)) == 12
    cases(*numbered(6, system="Other."))
    run()
    assert len(asked(api)) == 24


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_stopped_goes_on(api, sent):
    cases(*numbered(30))
    pass_these(api, (), range(30))
    command = [sys.executable, str(ROOT / "test_model.py"), "--cases", "cases.json"]
    process, stopped = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True), []

    def answer(model, messages):
        if model == TUNED:
            stopped.append(time.sleep(0.1))
            if len(stopped) == 1:  # one Ctrl-C, though sixteen calls are under way
                process.send_signal(sent)
            time.sleep(2)
        return "right"

    api.answer = answer
    _, err = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130}[sent] and "Traceback" not in err
    if sent == signal.SIGINT:
        assert "The same command goes on" in err
    kept = [json.loads(line)["asked"] for line in Path("test_answers.jsonl").read_text("utf-8").splitlines()]
    assert len(kept) >= 30
    api.answer = lambda model, messages: "right"
    assert run()[0]["fine_tuned"]["passed"] == 30
    bodies = [json.dumps([f"{api.base_url}/", body], sort_keys=True) for body in asked(api)]
    assert [bodies.count(key) for key in kept] == [1] * len(kept)


def test_a_failed_call_is_a_failed_case_and_stdout_says_why_once(api, capsys):
    cases(*numbered(12))
    pass_these(api, (), range(12))
    api.fault("POST /chat/completions", "400", times=3, message="This one is refused.")
    assert "asks for the missing answers again" in fails()
    summary, _ = results()
    assert summary["verdict"] == "incomplete" and summary["failed_calls"] == 3 and summary["cases"] == 12
    out = capsys.readouterr().out
    assert out.count("This one is refused.") == 1 and "3 calls failed" in out
    assert "  0 answers from test_answers.jsonl, 12 asked" in out
    before = len(asked(api))
    assert run()[0]["verdict"] == "better" and len(asked(api)) == before + 3


@pytest.mark.parametrize("fault", ["500 before", "429", "drop before", "drop after"])
def test_the_sdk_asks_again_what_failed_in_passing(api, fault):
    cases(*numbered(3))
    pass_these(api, (), range(3))
    api.fault("POST /chat/completions", fault, times=2)
    assert run()[0]["failed_calls"] == 0 and len(asked(api)) == 8


@pytest.mark.parametrize("fault", ["401", "404", "html", "malformed"])
def test_what_would_fail_every_call_ends_the_run_and_keeps_what_came(api, fault):
    cases(*numbered(20))
    api.after = lambda request: len(asked(api)) >= 25 and api.fault("POST /chat/completions", fault, times=99)
    assert api.base_url in fails() and not Path("test_results.json").exists()
    time.sleep(1)  # the calls that were under way come to their end
    kept = len(Path("test_answers.jsonl").read_text().splitlines())
    assert kept >= 20
    api.faults.clear()
    api.after = lambda request: None
    before = len(asked(api))
    run()
    assert len(asked(api)) == before + 40 - kept


def test_the_key_is_in_no_file_and_no_output(api, capsys):
    cases(*numbered(3))
    api.echo_key = True
    api.fault("POST /chat/completions", "400", message="No.")
    said = fails()
    assert api.key not in said + "".join(capsys.readouterr())
    for path in Path().iterdir():
        assert api.key not in path.read_text(encoding="utf-8"), path
