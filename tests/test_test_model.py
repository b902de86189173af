"""test_model.py: its statistics, its case files, its journal, its verdict and its files."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from fake_api import FakeAPI
from hypothesis import given, settings
from hypothesis import strategies as st

import test_model as step5

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "test_model.py"
BASE = "smollm2-135m-instruct"
TUNED = f"ft:{BASE}:acme::0001"


@pytest.fixture
def api(tmp_path, monkeypatch):
    """A server with one finished job, recorded in fine_tune_job.json."""
    with FakeAPI() as api:
        monkeypatch.chdir(tmp_path)
        for name, value in api.env().items():
            monkeypatch.setenv(name, value)
        job = api.finish(api.add_job(model=BASE)["id"])
        assert job["fine_tuned_model"] == TUNED
        write_record(api)
        yield api


def write_record(api, **more):
    record = {"job_id": "ftjob-0001", "base_url": api.base_url, "model": BASE, "system_prompt": "Be kind.", **more}
    Path("fine_tune_job.json").write_text(json.dumps(record), encoding="utf-8")


def write_cases(count, **more):
    rows = [
        {
            "id": f"c{number}",
            "question": f"Question {number}?",
            "answer": "right",
            "checks": {"contains": "right"},
            **more,
        }
        for number in range(count)
    ]
    Path("cases.json").write_text(json.dumps(rows), encoding="utf-8")


def pass_these(api, base, tuned):
    """Let the base model pass the cases in `base`, and the fine-tuned one those in `tuned` (collections of numbers)."""

    def answer(model, messages):
        number = int(messages[-1]["content"].split()[1].rstrip("?"))
        return "It is right." if number in (tuned if model == TUNED else base) else "Wrong."

    api.answer = answer


def run(*arguments):
    return step5.main(["--cases", "cases.json", *arguments])


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
        (5, 10, 0.2366, 0.7634),
    ],
)
def test_wilson_intervals_are_the_published_ones(passed, cases, low, high):
    assert step5.wilson_interval(passed, cases) == pytest.approx((low, high), abs=6e-5)


def test_wilson_of_no_case_says_nothing():
    assert step5.wilson_interval(0, 0) == (0.0, 1.0)


def coverage(cases, rate):
    return sum(
        math.comb(cases, k) * rate**k * (1 - rate) ** (cases - k)
        for k in range(cases + 1)
        if step5.wilson_interval(k, cases)[0] <= rate <= step5.wilson_interval(k, cases)[1]
    )


@pytest.mark.parametrize("cases", [10, 20, 42, 100])
def test_wilson_intervals_hold_the_true_rate_95_times_in_100(cases):
    covered = [coverage(cases, rate / 100) for rate in range(1, 100)]  # exact, not sampled
    assert 0.94 < sum(covered) / len(covered) < 0.965
    assert min(covered) > 0.82  # the known dip close to 0 and 1


@pytest.mark.parametrize(
    ("fixed", "broken", "p"),
    [
        (6, 0, 0.03125),
        (5, 0, 0.0625),
        (0, 6, 0.03125),
        (9, 1, 0.021484375),
        (8, 2, 0.109375),
        (0, 0, 1.0),
        (3, 3, 1.0),
        (5, 15, 0.041389465),
    ],
)
def test_mcnemar_known_values(fixed, broken, p):
    assert step5.mcnemar_exact(fixed, broken) == pytest.approx(p)


def test_mcnemar_is_the_two_sided_binomial_test_and_does_not_overflow():
    for fixed in range(13):
        for broken in range(13):
            tosses = fixed + broken
            likely = [Fraction(math.comb(tosses, k), 2**tosses) for k in range(tosses + 1)]
            two_sided = sum(chance for chance in likely if chance <= likely[fixed])
            assert step5.mcnemar_exact(fixed, broken) == pytest.approx(float(two_sided))
    assert step5.mcnemar_exact(3000, 0) == 0.0
    assert 0.5 < step5.mcnemar_exact(1500, 1510) <= 1


def test_equal_models_are_called_different_less_than_5_times_in_100():
    for cases, changing in ((20, 0.5), (42, 0.3), (100, 0.2)):
        wrong = 0.0
        for changed in range(cases + 1):
            chance = math.comb(cases, changed) * changing**changed * (1 - changing) ** (cases - changed)
            for fixed in range(changed + 1):
                if step5.give_verdict(fixed, changed - fixed, cases)["verdict"] in ("better", "worse"):
                    wrong += chance * math.comb(changed, fixed) / 2**changed
        assert 0 < wrong < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("fixed", "broken"), [(0.15, 0.05), (0.3, 0.1), (0.25, 0.02), (0.2, 0.1)])
def test_the_recommended_number_of_cases_shows_the_difference_8_times_in_10(fixed, broken):
    cases = step5.cases_needed(round(1000 * fixed), round(1000 * broken), 1000)
    source = random.Random(7)
    shown = 0
    for _ in range(4000):
        outcomes = Counter(
            "f" if (draw := source.random()) < fixed else "b" if draw < fixed + broken else "-" for _ in range(cases)
        )
        shown += step5.give_verdict(outcomes["f"], outcomes["b"], cases)["verdict"] == "better"
    assert 0.7 < shown / 4000 < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 0.83, 0.97])
def test_wilson_coverage_by_simulation(rate):
    source, held = random.Random(11), 0
    for _ in range(20_000):
        low, high = step5.wilson_interval(sum(source.random() < rate for _ in range(42)), 42)
        held += low <= rate <= high
    assert 0.92 < held / 20_000 < 0.99


@pytest.mark.parametrize(
    ("fixed", "broken", "cases", "verdict"),
    [
        (6, 0, 20, "better"),
        (0, 6, 20, "worse"),
        (5, 0, 20, "not enough cases"),
        (0, 0, 3, "not enough cases"),
        (0, 0, 100, "no difference shown"),
        (10, 10, 40, "no difference shown"),
        (3, 1, 1000, "no difference shown"),
        (0, 0, 0, "not enough cases"),
    ],
)
def test_the_verdict_in_words(fixed, broken, cases, verdict):
    given_verdict = step5.give_verdict(fixed, broken, cases)
    assert given_verdict["verdict"] == verdict
    needed = given_verdict["cases_needed"]
    if (fixed, cases) == (0, 100):
        assert (
            needed is None and "a difference of ten in a hundred would probably have shown" in given_verdict["sentence"]
        )
    elif verdict not in ("better", "worse"):
        assert needed > cases and f"about {needed} cases" in given_verdict["sentence"]


@pytest.mark.parametrize(
    ("fixed", "broken", "cases", "needed"),
    [(8, 3, 22, 74), (1, 2, 42, 77), (12, 4, 200, 390), (3, 1, 1000, 7_847), (0, 0, 100, None), (0, 0, 3, 77)],
)
def test_a_small_difference_counts_as_ten_in_a_hundred_until_that_is_ruled_out(fixed, broken, cases, needed):
    assert step5.cases_needed(fixed, broken, cases) == (needed and pytest.approx(needed, rel=0.02))


# --- the scores ---


@pytest.mark.parametrize(
    ("answer", "expected", "f1"),
    [
        ("The cat sat.", "a cat sat", 1.0),
        ("cat", "dog", 0.0),
        ("b b", "b", 2 / 3),
        ("x y", "x y z w", 2 / 3),
        ("the the", "a", 1.0),
        ("", "word", 0.0),
        ("$29 a month", "29 month", 1.0),
        ("Rhine-Main", "rhinemain", 1.0),
    ],
)
def test_token_f1_is_squads(answer, expected, f1):
    assert step5.token_f1(answer, expected) == pytest.approx(f1)


FACTS = {
    "prices": ["$8", "$1,500"],
    "urls": ["https://help.x.example/start"],
    "plans": ["Pro"],
    "limits": ["5 users", "10 business days", "30%"],
}


@pytest.mark.parametrize(
    ("answer", "unknown"),
    [
        ("It costs $8, or $1500 a year.", []),
        ("It costs $9.", ["$9"]),
        ("Pay 20 dollars.", ["20 dollars"]),
        ("See help.x.example/start.", []),
        ("See https://help.x.example/other.", ["https://help.x.example/other"]),
        ("See **https://help.x.example/start**", []),
        ("Go to evil.com now", ["evil.com"]),
        ("Mail us: a@b.io", ["a@b.io"]),
        ("The Pro plan", []),
        ("Take the Gold plan", ["Gold"]),
        ("Your plan. Change plan", []),
        ("up to 5 users", []),
        ("a 5-user team", []),
        ("up to 6 users", ["6 users"]),
        ("30 percent or 30%", []),
        ("in 10 business days", []),
        ("in 11 business days", ["11 business days"]),
        ("in 4 working days", ["4 working days"]),
        ("with 9 backup codes", ["9 backup codes"]),
        ("1. Open it\n2. Click it", []),
        ("You said 7 days?", []),
        ("within 7 days of your $44", []),
    ],
)
def test_only_known(tmp_path, answer, unknown):
    (tmp_path / "facts.json").write_text(json.dumps(FACTS))
    case = {"question": "I paid $44 and waited 7 days.", "system": None, "history": []}
    problem = step5.unknown_statements(answer, step5.known_statements(case, step5.read_facts(tmp_path / "facts.json")))
    assert problem == (f"states what facts.json does not: {', '.join(unknown)}" if unknown else "")


@pytest.mark.parametrize(
    ("checks", "answer", "passed"),
    [
        ({"contains": ["Hello"]}, "say hello", True),
        ({"contains": ["Hello"]}, "hallo", False),
        ({"not_contains": ["AI"]}, "said", False),
        ({"matches": [r"^\d\. \w+$"]}, "Do:\n1. go", True),
        ({"matches": ["a", "b"]}, "a", False),
        ({"max_chars": [3]}, "abc", True),
        ({"max_chars": [3]}, "abcd", False),
        ({"only_known": [False]}, "$99", True),
        ({"only_known": [True]}, "$99", False),
    ],
)
def test_checks(checks, answer, passed):
    outcomes = step5.apply_checks(checks, answer, set())
    assert all(outcome["passed"] for outcome in outcomes) is passed
    assert len(outcomes) == sum(map(len, checks.values()))


@pytest.mark.parametrize("dataset", ["techflow_support", "education"])
def test_the_datasets_own_answers_pass_their_checks(dataset):
    case_file = step5.CaseFile(ROOT / "examples" / dataset / "test_cases.json")
    for case in case_file.cases:
        answer = step5.NO_ANSWER | {"text": case["answer"], "error": None}
        scored = step5.score(case, answer, case_file.facts)
        assert scored["passed"], (case["id"], step5.what_is_wrong(scored))


# --- the case files ---

QUESTION = {"question": "Why?", "answer": "So."}


def read(tmp_path, text, name="cases.json"):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return step5.CaseFile(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cases.json", json.dumps([QUESTION])),
        ("cases.json", json.dumps([QUESTION], indent=2).replace("\n", "\r\n")),
        ("cases.json", "\ufeff" + json.dumps({"cases": [QUESTION]})),
        ("cases.json", json.dumps(QUESTION)),
        ("cases.jsonl", json.dumps(QUESTION) + "\n\n"),
        ("cases.jsonl", json.dumps(QUESTION)),
        (
            "cases.json",
            json.dumps([{"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}]),
        ),
    ],
)
def test_every_shape_of_file_gives_the_same_case(tmp_path, name, text):
    assert read(tmp_path, text, name).cases == [
        {"id": "case-1", "category": "all", "system": None, "history": [], "checks": {}, **QUESTION}
    ]


def test_chat_rows_shared_parts_and_own_parts(tmp_path):
    turns = [
        {"role": role, "content": text}
        for role, text in (
            ("system", "S"),
            ("user", "a"),
            ("assistant", "b"),
            ("user", "c"),
            ("assistant", "d"),
            ("user", "thanks"),
        )
    ]
    document = {
        "system": "shared",
        "checks": {"contains": "x", "max_chars": 9},
        "cases": [
            {"messages": turns, "checks": {"contains": ["y"], "max_chars": 5}},
            {**QUESTION, "system": "own"},
            QUESTION,
        ],
    }
    first, second, third = read(tmp_path, json.dumps(document)).cases
    assert (first["system"], first["question"], first["answer"], first["history"]) == ("S", "c", "d", turns[1:3])
    assert first["checks"] == {"contains": ["x", "y"], "max_chars": [9, 5]}
    assert (second["system"], third["system"], third["checks"]) == (
        "own",
        "shared",
        {"contains": ["x"], "max_chars": [9]},
    )


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"answer": "a"}, "no question"),
        ({"question": " ", "answer": "a"}, "question must be text"),
        ({"question": 3}, "question must be text"),
        ({"question": "q"}, "nothing is expected"),
        ({"question": "q", "checks": {"contains": [], "matches": None}}, "nothing is expected"),
        ({**QUESTION, "checks": {"contain": "x"}}, "contain is no check"),
        ({**QUESTION, "checks": {"contains": 3}}, "contains must be text"),
        ({**QUESTION, "checks": {"contains": ["x", ""]}}, "contains must be text"),
        ({**QUESTION, "checks": {"matches": "(("}}, "matches must be a regular expression: missing )"),
        ({**QUESTION, "checks": {"matches": "a{99999999999999}"}}, "matches must be a regular expression"),
        ({**QUESTION, "checks": {"matches": 3}}, "matches must be a regular expression"),
        ({**QUESTION, "checks": "x"}, "checks must be an object"),
        ({**QUESTION, "checks": {"max_chars": "3"}}, "max_chars must be a whole number"),
        ({**QUESTION, "checks": {"max_chars": True}}, "max_chars must be a whole number"),
        ({**QUESTION, "checks": {"only_known": 1}}, "only_known must be true or false"),
        ({**QUESTION, "checks": {"only_known": True}}, "only_known needs a facts.json"),
        ({**QUESTION, "history": "x"}, "history must be an object"),
        ({**QUESTION, "history": [{"role": "bot", "content": "x"}]}, "role must be one of system, developer, user"),
        ({**QUESTION, "history": [{"role": "user"}]}, "role and content"),
        ({"messages": [{"role": "user", "content": None}]}, "role and content"),
        ("text", "case 2 must be an object"),
        ({**QUESTION, "id": 4}, "id must be text"),
        ({"messages": []}, "no question"),
        ({"question": "\ud800", "answer": "a"}, "question must be text"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "no question"),
    ],
)
def test_every_fault_is_named_with_its_line(tmp_path, row, sentence):
    text = '[\n {"question": "q",\n  "answer": "a"},\n\n ' + json.dumps(row) + ',\n {"question": ""}\n]'
    with pytest.raises(step5.StepError) as caught:
        read(tmp_path, text)
    first, second = str(caught.value).splitlines()[0], str(caught.value).splitlines()[-1]
    line = 5 if isinstance(row, dict) else 1
    assert first.startswith(f"{tmp_path / 'cases.json'}:{line}: ") and sentence in first
    assert ":6: question must be text" in second
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("value", [False, None])
def test_only_known_needs_no_facts_where_it_is_off(tmp_path, value):
    assert read(tmp_path, json.dumps([{**QUESTION, "checks": {"only_known": value}}])).cases


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("cases.json", '[\n{"question": "q" "answer": "a"}]', ":2: this is not JSON"),
        ("cases.jsonl", json.dumps(QUESTION) + "\n{\n" + json.dumps(QUESTION), ":2: this is not JSON"),
        ("cases.json", "[]", "no case"),
        ("cases.json", "", "no case"),
        ("cases.json", '{"cases": []}', "no case"),
        ("cases.json", b"\xff\xfe", ":1: this is not JSON"),
        (
            "cases.json",
            b'[{"question": "\xff", "answer": "a"}]',
            ":1: question must be text: it is empty, or not UTF-8",
        ),
        ("cases.json", "[" * 100_000, ":1: this is not JSON"),
        ("cases.json", json.dumps([{**QUESTION, "id": "x"}] * 2, indent=1), ":7: the id 'x' stands above already"),
        ("cases.jsonl", json.dumps(QUESTION) + "\n\n3\n3", ":3: case 2 must be an object"),
        ("cases.jsonl", json.dumps(QUESTION) + "\n\n3\n3", ":4: case 3 must be an object"),
        (
            "cases.json",
            '{"cases": [{"question": "q", "answer": "a"}],\n "criteria": [\n{"name": 3}]}',
            ":3: name must be text",
        ),
        (
            "cases.json",
            '{"cases": [{"question": "q", "answer": "a"}],\n "criteria": [{"name": "n", "judge": "x"}]}',
            ":2: judge must be one of tone, format, helpful, next_steps",
        ),
        ("cases.json", json.dumps({"cases": [QUESTION], "criteria": 5}), ":1: criteria must be an object"),
        *(
            (
                "cases.json",
                json.dumps({"cases": [QUESTION], "criteria": [{"name": "n", "category": category}]}),
                ":1: category must be text",
            )
            for category in (5, 0, {"a": 1}, [1])
        ),
        ("cases.json", "[\n" + "1" * 5000 + "]", ":1: this is not JSON"),
    ],
)
def test_faults_of_the_file(tmp_path, name, text, fault):
    with pytest.raises(step5.StepError) as caught:
        read(tmp_path, text, name)
    assert fault in str(caught.value)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "cases",
                    "question",
                    "answer",
                    "checks",
                    "messages",
                    "history",
                    "role",
                    "content",
                    "id",
                    "system",
                    "contains",
                    "matches",
                    "max_chars",
                    "only_known",
                    "criteria",
                    "category",
                    "name",
                    "user",
                ]
            )
            | st.text(max_size=3),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=60) | JSON_VALUES.map(lambda value: json.dumps(value, indent=1).encode()),
    st.sampled_from([".json", ".jsonl"]),
)
def test_no_file_makes_a_traceback_and_every_line_named_exists(tmp_path_factory, content, suffix):
    path = tmp_path_factory.mktemp("cases") / f"cases{suffix}"
    path.write_bytes(content)
    try:
        assert step5.CaseFile(path).cases
    except step5.StepError as error:
        for fault in str(error).splitlines():
            if fault.startswith(f"{path}:"):
                assert 1 <= int(fault.removeprefix(f"{path}:").split(":")[0]) <= content.count(b"\n") + 1


# --- a whole run ---


def test_what_it_leaves_behind(api, capsys):
    write_cases(
        10,
        category="format",
        system="Be brief.",
        history=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    )
    pass_these(api, base=range(2), tuned=range(1, 9))
    assert run() == 0
    summary, by_id = results()
    assert summary["fixed"] == [f"c{n}" for n in range(2, 9)] and summary["broken"] == ["c0"]
    assert summary["still passing"] == ["c1"] and summary["still failing"] == ["c9"]
    assert (
        summary["p_value"] == pytest.approx(step5.mcnemar_exact(7, 1)) and summary["verdict"] == "no difference shown"
    )
    assert (summary["base"]["passed"], summary["fine_tuned"]["passed"], summary["cases"]) == (2, 8, 10)
    one = by_id["c0"]
    assert (one["question"], one["expected"], one["generated"], one["base_generated"]) == (
        "Question 0?",
        "right",
        "Wrong.",
        "It is right.",
    )
    assert one["outcome"] == "broken" and one["base"]["passed"] and not one["fine_tuned"]["passed"]
    assert one["fine_tuned"]["checks"] == [
        {"check": "contains", "value": "right", "passed": False, "problem": 'does not contain "right"'}
    ]
    assert one["base"]["usage"]["completion_tokens"] == 3 and one["base"]["seconds"] > 0 and one["base"]["f1"] == 0.5
    request = min(asked(api), key=lambda body: body["messages"][-1]["content"])
    assert [message["content"] for message in request["messages"]] == ["Be brief.", "a", "b", "Question 0?"]
    assert (request["temperature"], request["seed"], request["max_tokens"]) == (0, 42, 400)
    assert {body["model"] for body in asked(api)} == {BASE, TUNED} and len(asked(api)) == 20

    out = capsys.readouterr().out
    assert out.index("Broken: 1") < out.index("Fixed: 7") < out.index("Verdict: no difference shown")
    assert "Results: test_results.json" in out
    assert out.splitlines()[-1] == "Next: python test_model.py --cases cases.json --report report.html"


def test_the_system_prompt_is_the_cases_else_the_files_else_the_recorded_one(api):
    for document, expected in (
        ({"system": "file's", "cases": [{**QUESTION, "system": "case's"}]}, "case's"),
        ({"system": "file's", "cases": [QUESTION]}, "file's"),
        ([QUESTION], "Be kind."),
    ):
        Path("cases.json").write_text(json.dumps(document))
        assert run() == 0
        assert asked(api)[-1]["messages"][0] == {"role": "system", "content": expected}


@pytest.mark.parametrize(
    ("arguments", "pair"),
    [
        ([], (TUNED, BASE)),
        (["ftjob-0001"], (TUNED, BASE)),
        (["ft:gpt-4.1:a::b"], ("ft:gpt-4.1:a::b", "gpt-4.1")),
        (["mine"], ("mine", BASE)),
        (["mine", "--base-model", "theirs"], ("mine", "theirs")),
    ],
)
def test_which_models_are_compared(api, arguments, pair):
    for name in ("ft:gpt-4.1:a::b", "gpt-4.1", "mine", "theirs"):
        api.add_model(name)
    write_cases(1)
    assert run(*arguments) == 0
    assert (results()[0]["model"], results()[0]["base_model"]) == pair


def test_another_job_s_model_is_not_tested_with_the_recorded_job_s_prompt_and_data(api):
    other = api.finish(api.add_job(model=BASE)["id"])["id"]
    write_cases(1)
    Path("train.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Question 0?"}]}) + "\n")
    write_record(api, training_file_path="train.jsonl")
    assert run(other) == 0
    assert [message["role"] for message in asked(api)[-1]["messages"]] == ["user"]
    assert "not at hand" in results()[0]["training_file"]


def test_the_base_model_may_come_from_the_environment(api, monkeypatch):
    Path("fine_tune_job.json").unlink()
    write_cases(1)
    monkeypatch.setenv("FINE_TUNE_MODEL", BASE)
    api.add_model("mine")
    assert run("mine") == 0 and results()[0]["base_model"] == BASE


@pytest.mark.parametrize(
    ("arguments", "record", "code", "sentence"),
    [
        ([], {"job_id": None}, 2, "python fine_tune.py"),
        ([], {"base_url": "http://127.0.0.1:9/v1"}, 2, "OPENAI_BASE_URL"),
        ([BASE], {}, 2, "needs another model to be compared with"),
        (["mine"], {"model": None}, 2, "--base-model"),
        (["ft:x:y"], {}, 2, "answered 404"),
        (["ftjob-0002"], {}, 3, "is running: python check_fine_tune_status.py ftjob-0002 --wait"),
        (["ftjob-0003"], {}, 1, "is failed: python check_fine_tune_status.py ftjob-0003"),
        (["--output", "cases.json"], {}, 2, "different files"),
        (["--report", "test_answers.jsonl"], {}, 2, "different files"),
        (["--cases", "."], {}, 2, ".: Is a directory"),
        (["--concurrency", "x"], {}, 2, "invalid"),
        (["--concurrency", "0"], {}, 2, "0 is not at least 1"),
        (["--min-pass-rate", "x"], {}, 2, "invalid"),
        (["--min-pass-rate", "nan"], {}, 2, "nan is not between 0 and 1"),
        (["--min-pass-rate", "1.1"], {}, 2, "1.1 is not between 0 and 1"),
        (["--min-pass-rate", "-1"], {}, 2, "-1 is not between 0 and 1"),
    ],
)
def test_mistakes_get_one_sentence(api, capsys, arguments, record, code, sentence):
    api.job_plan = ["running"]
    api.jobs["ftjob-0002"] = {
        **api.jobs["ftjob-0001"],
        "id": "ftjob-0002",
        "status": "running",
        "fine_tuned_model": None,
    }
    api.jobs["ftjob-0003"] = {**api.jobs["ftjob-0002"], "id": "ftjob-0003", "status": "failed"}
    write_record(api, **record)
    write_cases(2)
    cases = Path("cases.json").read_bytes()
    try:
        assert run(*arguments) == code
    except SystemExit as end:  # argparse
        assert end.code == code
    err = capsys.readouterr().err
    assert sentence in err.splitlines()[-1] and "Traceback" not in err and Path("cases.json").read_bytes() == cases


@pytest.mark.parametrize("flag", ["--output", "--report", "--failures"])
@pytest.mark.parametrize("path", ["no/such/x.json", "."])
def test_a_file_that_cannot_be_written_is_told_before_any_call(api, capsys, flag, path):
    write_cases(2)
    assert run(flag, path) == 2
    assert capsys.readouterr().err.startswith(f"Cannot write {path}: ") and not api.requests
    assert not Path("test_answers.jsonl").exists()


def test_a_run_that_fails_at_once_leaves_no_journal(api):
    write_cases(2)
    api.fault("*", "401")
    assert run() == 2 and not Path("test_answers.jsonl").exists()


def test_a_server_that_stops_on_the_way_loses_no_answer(api, capsys, monkeypatch):
    def stop(request):
        if len(asked(api)) == 5:
            api.server.socket.close()
            api.fault("*", "drop before", times=99)  # on the connection that is still open

    monkeypatch.setattr(step5.time, "sleep", lambda seconds: None)
    write_cases(8)
    api.after = stop
    assert run("--concurrency", "1") == 4
    err = capsys.readouterr().err
    assert "Cannot reach" in err and "test_answers.jsonl holds the answers so far; the same command goes on" in err


def test_the_recorded_server_may_have_its_other_name(api):
    write_cases(1)
    write_record(api, base_url=api.base_url.replace("127.0.0.1", "localhost"))
    assert run() == 0


def test_the_last_next_line_keeps_the_model_that_was_named(api, capsys):
    write_cases(1)
    assert run(TUNED, "--report", "r.html", "--failures", "f.jsonl") == 0
    assert capsys.readouterr().out.endswith(f"Next: python use_fine_tuned_model.py {TUNED}\n")


def test_an_interrupted_fresh_run_does_not_go_back_to_the_old_answers(api):
    write_cases(3)
    api.answer = lambda model, messages: "old"
    assert run() == 0
    fresh = step5.Journal("test_answers.jsonl", fresh=True)
    assert fresh.answers == {} and len(step5.Journal("test_answers.jsonl").answers) == 7  # the job's model, too
    fresh.add("one", "new")
    assert step5.Journal("test_answers.jsonl").answers == {"one": "new"}


def test_fresh_is_no_part_of_what_goes_on(api, capsys, monkeypatch):
    write_cases(1)
    assert run("--fresh") == 0
    assert capsys.readouterr().out.endswith("Next: python test_model.py --cases cases.json --report report.html\n")
    monkeypatch.setattr(step5, "run", lambda args, words: os.kill(os.getpid(), signal.SIGINT) or time.sleep(5))
    assert run("--fresh") == 130
    assert "the same command without --fresh goes on" in capsys.readouterr().err


def test_nobody_listens_there(api, capsys, monkeypatch):
    write_cases(50)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    start = time.monotonic()
    assert run(TUNED) == 4
    assert "python -m local_api" in capsys.readouterr().err and time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("base", "tuned", "arguments", "code"),
    [
        ((), range(10), [], 0),
        ((), range(10), ["--require-better", "--min-pass-rate", "1"], 0),
        (range(10), (), [], 1),
        ((), range(8), ["--min-pass-rate", "0.9"], 1),
        ((), range(9), ["--min-pass-rate", "0.9"], 0),
        ((1,), (1,), ["--require-better"], 3),
        ((1,), (1, 2), ["--require-better"], 3),
        ((1,), (1,), [], 0),
        (range(10), (), ["--require-better"], 1),
    ],
)
def test_exit_codes(api, base, tuned, arguments, code):
    write_cases(10)
    pass_these(api, base, tuned)
    assert run(*arguments) == code


# --- failed calls ---


def test_failed_calls_are_failed_cases_in_the_headline_and_the_exit_code(api, capsys, monkeypatch):
    write_cases(12)
    pass_these(api, (), range(12))
    api.fault("POST /chat/completions", "400", message="This one is refused.")
    assert run("--min-pass-rate", "1", "--concurrency", "1") == 4  # before 1
    summary, by_id = results()
    assert summary["failed_calls"] == summary["base"]["failed_calls"] == 1 and summary["verdict"] == "incomplete"
    assert by_id["c0"]["base_generated"] == "" and "This one is refused." in by_id["c0"]["base"]["error"]
    assert summary["base"]["cases"] == 12
    assert "Verdict: incomplete" in (out := capsys.readouterr().out) and "1 of the calls failed" in out
    before = len(asked(api))
    assert run() == 0 and len(asked(api)) == before + 1  # only the failed one is asked again
    assert results()[0]["verdict"] == "better"


def test_a_missing_answer_lowers_the_pass_rate_and_the_f1(api):
    Path("cases.json").write_text(json.dumps([{"question": f"q{n}", "answer": "right"} for n in range(4)]))
    api.answer = lambda model, messages: "right"
    api.fault("POST /chat/completions", "400", times=2)
    assert run("--concurrency", "1") == 4
    base = results()[0]["base"]
    assert (base["pass_rate"], base["f1"], base["exact_match"], base["median_chars"]) == (0.75, 0.75, 0.75, 5)


@pytest.mark.parametrize(
    "fault", ["500 before", "500 after", "drop before", "drop after", "malformed", "html", "truncated"]
)
def test_passing_faults_are_asked_again(api, monkeypatch, fault):
    monkeypatch.setattr(step5.time, "sleep", lambda seconds: None)
    write_cases(3)
    pass_these(api, (), range(3))
    api.fault("POST /chat/completions", fault)
    assert run() == 0
    assert len(asked(api)) == 7 and results()[0]["failed_calls"] == 0


@pytest.mark.parametrize(
    "body",
    [
        [1],
        None,
        "x",
        b"plain text",
        {"choices": []},
        {"choices": [{"message": None, "finish_reason": "stop"}]},
        {"choices": [{"message": {"content": [{"type": "text", "text": "a"}]}, "finish_reason": "stop"}]},
        {"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}], "usage": 5},
        {"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}], "usage": {"completion_tokens": "many"}},
    ],
)
def test_an_answer_that_is_no_chat_completion_is_a_failed_call(api, monkeypatch, body):
    monkeypatch.setattr(step5.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(api, "chat", lambda request: body)
    write_cases(1)
    assert run() == 4
    summary, by_id = results()
    assert summary["failed_calls"] == 2 and "cannot be read" in by_id["c0"]["base"]["error"]
    assert len(Path("test_answers.jsonl").read_text().splitlines()) == 1  # the job's


@pytest.mark.parametrize("fault", ["500 before", "drop after", "malformed", "truncated"])
def test_lasting_faults_end_in_failed_calls(api, monkeypatch, fault):
    monkeypatch.setattr(step5.time, "sleep", lambda seconds: None)
    write_cases(3)
    api.fault("POST /chat/completions", fault, times=999)
    assert run() == 4
    assert results()[0]["failed_calls"] == 6 and len(asked(api)) == 18


@pytest.mark.parametrize(
    ("fault", "how", "code"),
    [("401", {}, 2), ("403", {}, 2), ("429", {"code": "insufficient_quota"}, 4), ("429", {"retry_after": 4000}, 4)],
)
def test_what_would_fail_every_call_ends_the_run_and_keeps_what_came(api, capsys, fault, how, code):
    write_cases(20)
    pass_these(api, (), range(20))
    api.after = lambda request: len(asked(api)) >= 11 and api.fault("POST /chat/completions", fault, times=99, **how)
    assert run("--concurrency", "4") == code
    assert f"answered {fault}" in capsys.readouterr().err and not Path("test_results.json").exists()
    kept = len(Path("test_answers.jsonl").read_text().splitlines()) - 1  # one line is the job's
    assert kept >= 10
    api.faults.clear()
    api.after = lambda request: None
    before = len(asked(api))
    assert run() == 0 and len(asked(api)) == before + 40 - kept


def test_an_empty_answer_passes_nothing(api):
    Path("cases.json").write_text(json.dumps([{"question": "q", "checks": {"not_contains": "x"}}]))
    api.answer = lambda model, messages: " \n"
    assert run() == 0 and results()[0]["fine_tuned"]["passed"] == 0


def test_a_rate_limit_slows_down_and_says_so(api, capsys):
    write_cases(20)
    pass_these(api, (), range(20))
    api.fault("POST /chat/completions", "429", times=6, retry_after=0.3)
    start = time.monotonic()
    assert run("--concurrency", "8") == 0
    assert time.monotonic() - start > 0.3
    assert "limits the rate; asking again in 0.3 s, 4 at a time" in capsys.readouterr().err
    assert len(asked(api)) == 46 and results()[0]["failed_calls"] == 0  # 40 answers, no answer twice


def test_a_rate_limit_ends_the_round_at_once(api, capsys):
    write_cases(20)
    api.fault("POST /chat/completions", "429", times=1, retry_after=0.1)
    assert run("--concurrency", "2") == 0
    assert "asking again in 0.1 s, 1 at a time" in capsys.readouterr().err
    order = [request.answered for request in api.requests if request.path == "/chat/completions"]
    assert "429" in order[:2] and len(order) == 41


# --- the journal ---


def test_a_finished_run_costs_nothing_and_does_not_import_openai(api):
    write_cases(5)
    assert run() == 0
    before = len(api.requests)
    code = "import sys, test_model\ncode = test_model.main(sys.argv[1:])\nprint('openai' in sys.modules, code)"
    done = subprocess.run(
        [sys.executable, "-c", code, "--cases", "cases.json"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.splitlines()[-1] == "False 0", done.stderr
    assert len(api.requests) == before


def test_help_and_bad_arguments_do_not_import_openai(api):
    code = (
        "import sys, test_model\ntry: test_model.main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print('openai' in sys.modules)"
    )
    for arguments in (["--help"], ["--concurrency", "none"], ["--cases", "nowhere.json"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_what_makes_an_answer_another_answer(api):
    write_cases(1)
    for arguments, calls in (
        ([], 2),
        ([], 0),
        (["--max-tokens", "50"], 2),
        (["--fresh"], 2),
        ([], 0),
        ([BASE, "--base-model", TUNED], 0),
    ):
        before = len(asked(api))
        assert run(*arguments) in (0, 1)
        assert len(asked(api)) == before + calls, arguments
    write_cases(1, system="Another prompt.")
    assert run() == 0 and len(asked(api)) == 8


def test_the_same_question_twice_is_asked_once(api):
    Path("cases.json").write_text(json.dumps([QUESTION, QUESTION]))
    assert run() == 0 and len(asked(api)) == 2


@pytest.mark.parametrize("rubbish", [b'{"key": "x", "val', b"\x00\xff\n[]\n3\nnull\n{}\n", b"\n\n"])
def test_a_torn_or_spoilt_journal_loses_nothing_else(api, rubbish):
    write_cases(3)
    assert run() == 0
    with open("test_answers.jsonl", "ab") as file:
        file.write(rubbish)
    write_cases(4)
    assert run() == 0 and len(asked(api)) == 8
    assert run() == 0 and len(asked(api)) == 8  # the lines after the torn one are whole


def kill_at(api, request, signal_sent, delay=0.0):
    """Run the script, kill it while the request of this number is answered, run it again; check what was asked."""
    write_cases(8)
    pass_these(api, (), range(8))
    command = [sys.executable, str(SCRIPT), "--cases", "cases.json", "--concurrency", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def kill(played):
        if len(asked(api)) == request and process.poll() is None:
            time.sleep(delay)
            process.send_signal(signal_sent)
            process.wait(30)

    api.after = kill
    process.communicate(timeout=60)
    api.after = lambda played: None
    first = Counter(json.dumps(body, sort_keys=True) for body in asked(api))
    journal = Path("test_answers.jsonl").read_text(encoding="utf-8") if Path("test_answers.jsonl").exists() else ""
    kept = {entry["asked"] for entry in map(json.loads, journal.splitlines())}
    assert run() == 0
    total = Counter(json.dumps(body, sort_keys=True) for body in asked(api))
    again = [json.loads(body) for body, times in total.items() if times > 1]
    assert len(total) == 16 and len(again) <= 2  # at most those that were under way when it died
    assert not kept & {json.dumps([api.base_url, body], sort_keys=True) for body in again}  # none that had been kept
    assert sum(first.values()) - len(kept) <= 2 + 1  # answered but not kept: the ones under way (and the job's line)
    assert results()[0]["fine_tuned"]["passed"] == 8
    return process.returncode


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("request_number", [1, 7])
def test_sigkill_and_resume(api, request_number):
    assert kill_at(api, request_number, signal.SIGKILL) == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("delay", [0.0, 0.003])
@pytest.mark.parametrize("request_number", range(1, 17))
def test_sigkill_at_every_request(api, request_number, delay):
    assert kill_at(api, request_number, signal.SIGKILL, delay) == -signal.SIGKILL


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_says_how_to_go_on(api):
    write_cases(8)
    api.answer = lambda model, messages: time.sleep(5) or "late"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--cases", "cases.json"], stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    while not asked(api):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and b"same command goes on" in err and b"Traceback" not in err
    assert time.monotonic() - start < 3  # it does not wait for the answers under way


# --- training data, criteria, judge ---


def test_cases_that_stand_in_the_training_file_are_scored_apart(api, capsys):
    write_cases(8)
    pass_these(api, (), range(8))
    rows = [
        {"messages": [{"role": "user", "content": "question 3"}, {"role": "assistant", "content": "a"}]},
        {
            "messages": [
                {"role": "user", "content": "Before"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "Question 5?"},
                {"role": "assistant", "content": "c"},
            ]
        },
    ]
    Path("train.jsonl").write_text(
        "not json\n" + "".join(json.dumps(row) + "\n" for row in rows) + '{"messages": [3]}\n'
    )
    write_record(api, training_file_path="train.jsonl")
    assert run() == 0
    summary, by_id = results()
    assert summary["in_training_data"]["cases"] == ["c3"] and by_id["c3"]["in_training_data"]
    assert summary["cases"] == summary["fine_tuned"]["passed"] == 7  # c5 is another conversation, and counts
    assert summary["in_training_data"]["fine_tuned"]["passed"] == 1
    assert "In the training data, and not counted above: c3" in capsys.readouterr().out


def test_the_success_criteria(api, capsys):
    document = {
        "cases": [
            {
                "id": f"c{n}",
                "category": "format" if n < 6 else "tone",
                "question": f"Question {n}?",
                "checks": {"contains": "right"},
            }
            for n in range(10)
        ],
        "criteria": [
            {"name": "Format", "category": "format", "min_pass_rate": 0.5, "min_cases": 6},
            {"name": "Too few", "category": "tone", "min_pass_rate": 0.0, "min_cases": 5},
            {"name": "Own check", "checks": {"max_chars": 6}, "min_pass_rate": 0.7},
            {"name": "All", "min_pass_rate": 0.31},
        ],
    }
    Path("cases.json").write_text(json.dumps(document))
    pass_these(api, (), range(3))
    assert run() == 0
    rows = {row["name"]: (row["met"], row["passed"], row["cases"]) for row in results()[0]["criteria"]}
    assert rows == {
        "Format": (True, 3, 6),
        "Too few": (False, 0, 4),
        "Own check": (True, 7, 10),
        "All": (False, 3, 10),
    }
    out = capsys.readouterr().out
    assert "✓ met      Format" in out and "✗ not met  Too few" in out and "50%" in out


RATINGS = {"tone": 4, "format": 5, "helpful": 2, "next_steps": 1}


def judged(api, reply, *arguments, count=2):
    document = {
        "cases": [{"id": f"c{n}", "question": f"Question {n}?", "answer": "right"} for n in range(count)],
        "criteria": [{"name": "Tone", "checks": {"max_chars": 99}, "judge": "tone", "min_judge_mean": 4.5}],
    }
    Path("cases.json").write_text(json.dumps(document))
    api.add_model("judge")
    api.answer = lambda model, messages: reply if model == "judge" else f"Answer of {model}"
    return run("--judge", "judge", *arguments)


def test_the_judge_rates_both_models_and_is_named(api, capsys):
    assert judged(api, f"I think:\n{json.dumps(RATINGS)}") == 0
    summary, by_id = results()
    assert summary["judge_model"] == "judge" and summary["base"]["answers_judged"] == 2
    for name, rating in RATINGS.items():
        assert summary["fine_tuned"][f"judge_{name}"] == summary["base"][f"judge_{name}"] == rating
        assert by_id["c0"]["fine_tuned"][f"judge_{name}"] == rating
    prompts = [body["messages"] for body in asked(api) if body["model"] == "judge"]
    assert len(prompts) == 4 and all(f"{name}: " in prompts[0][0]["content"] for name in step5.JUDGE_CRITERIA)
    data = [json.loads(messages[1]["content"]) for messages in prompts]
    conversation = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Question 0?"}]
    assert {"conversation": conversation, "expected_answer": "right", "answer": f"Answer of {BASE}"} in data
    assert summary["criteria"][0]["judge_mean"] == 4 and not summary["criteria"][0]["met"]
    assert "judge 4.0 (asked: 4.5)" in capsys.readouterr().out
    before = len(api.requests)
    assert judged(api, "anything") == 0 and len(api.requests) == before  # verdicts are in the journal, too


@pytest.mark.parametrize(
    "reply",
    [
        "no JSON",
        "{",
        "[4, 4, 4, 4]",
        json.dumps({**RATINGS, "tone": 6}),
        json.dumps({**RATINGS, "tone": True}),
        json.dumps({**RATINGS, "tone": "4"}),
        json.dumps({"tone": 4}),
        "",
    ],
)
def test_a_judge_that_fails_is_no_score(api, reply, capsys):
    assert judged(api, reply) == 0
    summary, by_id = results()
    assert summary["base"]["answers_judged"] == 0 and summary["base"]["judge_tone"] is None
    assert "judge_tone" not in by_id["c0"]["fine_tuned"] and summary["criteria"][0]["judge_mean"] is None
    assert summary["criteria"][0]["met"]  # decided by its checks alone
    assert "4 of 4 replies of judge are no ratings." in capsys.readouterr().err
    assert judged(api, json.dumps(RATINGS)) == 0 and results()[0]["base"]["answers_judged"] == 2  # asked again


def test_a_judge_whose_calls_fail_is_reported(api, monkeypatch):
    monkeypatch.setattr(step5.time, "sleep", lambda seconds: None)
    api.after = lambda request: (
        request.path == "/chat/completions"
        and len(asked(api)) == 4
        and api.fault("POST /chat/completions", "400", times=1)
    )
    assert judged(api, json.dumps(RATINGS), "--concurrency", "1") == 4
    summary, _ = results()
    assert (summary["failed_calls"], summary["base"]["answers_judged"], summary["fine_tuned"]["answers_judged"]) == (
        1,
        1,
        2,
    )
    assert summary["verdict"] != "incomplete"  # the checks are all there


# --- files and terminal ---


def test_the_failing_cases_become_rows_that_step_1_accepts(api, tmp_path):
    write_cases(12, system="Be brief.")
    pass_these(api, (), (0,))
    assert run("--failures", "failing.jsonl") == 0
    rows = [json.loads(line) for line in Path("failing.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"c{n}" for n in range(1, 12)]
    assert rows[0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Question 1?"},
        {"role": "assistant", "content": "right"},
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "prepare_training_data.py"), "failing.jsonl", "-o", "new.jsonl"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OPENAI_BASE_URL": ""},
    )
    assert done.returncode == 0 and len(Path("new.jsonl").read_text().splitlines()) == 11, done.stderr


def test_rows_that_someone_edited_are_not_overwritten(api, capsys):
    write_cases(2)
    assert run("--failures", "failing.jsonl") == 0
    api.answer = lambda model, messages: "It is right." if "0" in messages[-1]["content"] else "Wrong."
    assert run("--failures", "failing.jsonl", "--fresh") == 0  # our own rows, though other ones now: fine
    assert len(Path("failing.jsonl").read_text().splitlines()) == 1
    Path("failing.jsonl").write_text("my edits")
    capsys.readouterr()
    assert run("--failures", "failing.jsonl") == 2
    out, err = capsys.readouterr()
    assert Path("failing.jsonl").read_text() == "my edits" and "your edits" in err
    assert "Verdict: " in out and "Results: test_results.json\n" in out
    assert run("--failures", "failing.jsonl", "--min-pass-rate", "1") == 1
    assert run("--failures", "failing.jsonl", "--require-better") == 3


NASTY = "\x1b]0;x\x07\x1b[31m\x9b\x00\r\u202e [/bold] \ud83d </script><script>alert(1)</script> {{model}} 😀"


def test_markup_and_control_characters_reach_the_files_whole_and_the_terminal_harmless(api, capsys):
    nasty = NASTY.replace("\ud83d", "")
    Path("cases.json").write_text(
        json.dumps(
            [{"id": nasty, "category": nasty, "question": nasty, "answer": nasty, "checks": {"not_contains": "alert"}}]
        )
    )
    api.answer = lambda model, messages: NASTY if model == TUNED else "harmless"
    assert run("--report", "report.html", "--failures", "f.jsonl") == 0
    result = json.loads(Path("test_results.json").read_text(encoding="utf-8"))["results"][0]
    assert result["generated"] == NASTY and result["question"] == nasty
    out = capsys.readouterr().out
    assert not set(out) & {"\x1b", "\x07", "\x9b", "\x00", "\r", "\u202e"} and "�]0;x" in out
    page = Path("report.html").read_text(encoding="utf-8")
    assert page.count("<script") == 2 and "\\u003cscript>alert(1)" in page and "{{model}}" in page


def test_a_closed_pipe_does_not_lose_the_results(api):
    write_cases(30)
    pass_these(api, (), ())
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--cases", "cases.json", "--min-pass-rate", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 1 and err == b"" and len(results()[1]) == 30


def test_results_are_written_whole_or_not_at_all(api, monkeypatch, capsys):
    write_cases(2)
    assert run() == 0
    before = Path("test_results.json").read_bytes()

    def fail(source, target):
        raise OSError(28, "No space left on device", target)

    monkeypatch.setattr(step5.os, "replace", fail)
    write_cases(3)
    assert run() == 2
    assert capsys.readouterr().err == "test_results.json: No space left on device\n"
    assert Path("test_results.json").read_bytes() == before


def test_the_key_is_in_no_file_and_no_output(api, capsys):
    write_cases(3)
    api.echo_key = True
    api.fault("POST /chat/completions", "400")
    assert run("--report", "report.html") == 4
    assert api.key not in "".join(capsys.readouterr())
    for path in Path().iterdir():
        assert api.key not in path.read_text(encoding="utf-8"), path


def test_for_other_code(api):
    tester = step5.ModelTester(TUNED, BASE)
    assert tester.generate_answer("Hi", system="S") == "You said: Hi"
    cases = step5.CaseFile(ROOT / "examples" / "education" / "test_cases.json").cases
    results = tester.run_test_cases(cases)
    assert [result["id"] for result in results] == [case["id"] for case in cases]
    api.fault("POST /chat/completions", "400")
    with pytest.raises(step5.StepError, match="400"):
        tester.generate_answer("Another")


def test_a_missing_package_is_named_with_the_cure(api, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openai", None)
    write_cases(1)
    assert run() == 2
    err = capsys.readouterr().err
    assert "openai" in err and "virtual environment" in err and "python -m pip install -r requirements.txt" in err


def test_only_known_is_switched_off_by_false_and_is_then_no_expectation(api, capsys):
    Path("facts.json").write_text('{"prices": ["$8"]}')
    case = {"question": "Question 0?", "answer": "right", "checks": {"only_known": False}}
    Path("cases.json").write_text(json.dumps({"checks": {"only_known": True}, "cases": [case]}))
    api.answer = lambda model, messages: "It costs $9."
    assert run() == 0 and results()[1]["case-1"]["fine_tuned"]["checks"] == []
    assert not results()[1]["case-1"]["fine_tuned"]["passed"]
    Path("cases.json").write_text(json.dumps([{**case, "answer": None}]))
    assert run() == 2 and "nothing is expected" in capsys.readouterr().err


def test_weights_of_chat_rows_are_not_sent(api):
    turns = [("user", "a"), ("assistant", "b"), ("user", "Question 0?"), ("assistant", "right")]
    messages = [{"role": role, "content": text} | ({"weight": 0} if text == "b" else {}) for role, text in turns]
    Path("cases.json").write_text(json.dumps([{"messages": messages}]))
    assert run() == 0
    assert all(message.keys() == {"role", "content"} for message in asked(api)[-1]["messages"])
