"""The datasets under examples/ keep what their READMEs promise: counts, form, facts, and no leak into the tests."""

import itertools
import json
import re
import unicodedata
from pathlib import Path

import pytest

import test_model
from prepare_training_data import SYSTEM_PROMPT

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TECHFLOW = EXAMPLES / "techflow_support"
EDUCATION = EXAMPLES / "education"
DATASETS = [pytest.param(TECHFLOW, id="techflow"), pytest.param(EDUCATION, id="education")]

# TechFlow's fixed strings, as its README defines them.
OPENERS = (
    "Hi there! I can help you ",
    "Hi there! I can help with ",
    "Hi there! Thanks for asking about ",
    "Hi there! I'm sorry about ",
)
STEPS_HEADING = "**Quick Steps:**"
CLOSINGS = (
    "Is there anything else I can help you with?",
    "Let me know if that doesn't fix it, and I'll help further.",
    "Is there anything else I can help with while you wait?",
)
ESCALATION = "Let me connect you with a human"
# What the shingle comparison leaves out: the fixed strings, and the numbers of the steps.
LATER_OPENERS = tuple(opener.replace("Hi there!", "Hi again!") for opener in OPENERS)
FIXED = (*OPENERS, *LATER_OPENERS, STEPS_HEADING, *CLOSINGS, ESCALATION)
# UTF-8 that was read as Latin-1 or Windows-1252 on the way, or could not be read at all.
MOJIBAKE = re.compile("[\u00c3\u00c2\u00e2][\u0080-\u00bf\u20ac\u2122\u0153\u017e\u2018-\u2022\u203a]|\ufffd")
STANDARD = re.compile(
    r"(?P<greeting>Hi (?:there|again)! [^\n]+)\n\n(?:(?P<context>[^\n*]+)\n\n)?"
    r"\*\*Quick Steps:\*\*\n(?P<steps>1\. [^\n]+\n2\. [^\n]+\n3\. [^\n]+(?:\n4\. [^\n]+)?)\n\n(?P<closing>[^\n]+)"
)
PLAIN = re.compile(r"(?P<greeting>Hi (?:there|again)! [^\n]+)\n\n(?P<body>[^\n]+)\n\n(?P<closing>[^\n]+)")
REFUSAL = re.compile(r"\bI can't\b")
STOP_WORDS = frozenset(
    re.findall(
        r"\S+",
        "a about after again all already am an and any anymore are as at be because been before but by can can't "
        "did do does don't for from get getting give gone got had has have hello help her hi his how i i'd i'm "
        "i've if in instead into is it it's its just keep like make me my need no not now of off ok on one only or "
        "our out over own please so some still stop that the their them then there they this to up us want was way "
        "we we're what what's when where which who will with without would you your yours",
    )
)
TEXTS = (str, list)
CHECKS = {"contains": TEXTS, "not_contains": TEXTS, "matches": TEXTS, "max_chars": int}


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def rows(dataset):
    return load(dataset / "qa_pairs.json")


def cases(dataset):
    return load(dataset / "test_cases.json")["cases"]


def turns(row):
    """The messages of a training row or of a test case, a question and its answer included."""
    if "messages" in row:
        return row["messages"]
    return [
        *row.get("history", []),
        {"role": "user", "content": row["question"]},
        {"role": "assistant", "content": row["answer"]},
    ]


def said(row, role):
    return [turn["content"] for turn in turns(row) if turn["role"] == role]


def words(text):
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)?", text.lower().replace("\u2019", "'"))


def as_list(value):
    return [value] if isinstance(value, str) else value


def patterns(checks):
    """The regular expressions of a case's or a criterion's checks; each has a name that a reader is shown."""
    return [entry["pattern"] for entry in checks.get("matches", [])]


def overlap(first, second):
    """Share of the shorter answer's five-word shingles that stand in the other one too, from 0 to 1."""
    return len(first & second) / max(1, min(len(first), len(second)))


def shingles(answer):
    for fixed in FIXED:
        answer = answer.replace(fixed, " ")
    found = words(re.sub(r"^\d+\. ", "", answer, flags=re.MULTILINE))
    return {tuple(found[i : i + 5]) for i in range(len(found) - 4)}


def jaccard(first, second):
    first, second = set(words(first)), set(words(second))
    return len(first & second) / len(first | second)


# ---------------------------------------------------------------- both datasets


@pytest.mark.parametrize("dataset", DATASETS)
def test_files_are_plain_utf8(dataset):
    for path in sorted(dataset.iterdir()):
        raw = path.read_bytes()
        text = raw.decode("utf-8")
        assert not raw.startswith(b"\xef\xbb\xbf"), f"{path.name} has a byte order mark"
        assert b"\r" not in raw and raw.endswith(b"\n"), path.name
        assert text == unicodedata.normalize("NFC", text), path.name
        assert not MOJIBAKE.search(text) and not re.search(r"[\x00-\x08\x0b-\x1f]", text), path.name


@pytest.mark.parametrize("dataset", DATASETS)
def test_training_rows_have_the_documented_shape(dataset):
    records = rows(dataset)
    ids = [row["id"] for row in records]
    assert len(ids) == len(set(ids))
    for row in records:
        assert set(row) in ({"id", "category", "question", "answer"}, {"id", "category", "messages"}), row["id"]
        messages = turns(row)
        roles = [turn["role"] for turn in messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2), row["id"]
        assert all(turn["content"] == turn["content"].strip() != "" for turn in messages), row["id"]
        assert not any(re.search(r"  |[ \t]\n|\n{3}", turn["content"]) for turn in messages), row["id"]


@pytest.mark.parametrize("dataset", DATASETS)
def test_test_cases_have_the_documented_shape(dataset):
    document = load(dataset / "test_cases.json")
    assert set(document) <= {"system", "checks", "criteria", "cases"} and document["system"].strip()
    ids = [case["id"] for case in document["cases"]]
    assert len(ids) == len(set(ids))
    for case in document["cases"]:
        assert {"id", "category", "question", "answer"} <= set(case), case["id"]
        assert set(case) <= {"id", "category", "question", "answer", "checks", "history", "system"}, case["id"]
        roles = [turn["role"] for turn in case.get("history", [])]
        assert roles == ["user", "assistant"] * (len(roles) // 2), case["id"]
    for checks in [part.get("checks", {}) for part in (document, *document.get("criteria", []), *document["cases"])]:
        for name, value in checks.items():
            assert isinstance(value, CHECKS[name]), (name, value)
        for pattern in patterns(checks):
            re.compile(pattern)


@pytest.mark.parametrize("dataset", DATASETS)
def test_criteria_can_be_measured(dataset):
    document = load(dataset / "test_cases.json")
    for criterion in document.get("criteria", []):
        asked = [c for c in document["cases"] if criterion.get("category") in (None, c["category"])]
        assert len(asked) >= criterion.get("min_cases", 1), criterion["name"]
        assert 0 < criterion["min_pass_rate"] <= 1, criterion["name"]


@pytest.mark.parametrize("dataset", DATASETS)
def test_expected_answers_pass_their_own_checks(dataset):
    """Read plainly here, apart from the script's own reading below."""
    document = load(dataset / "test_cases.json")
    for case in document["cases"]:
        answer = case["answer"]
        for checks in (document.get("checks", {}), case.get("checks", {})):
            for text in as_list(checks.get("contains", [])):
                assert text.lower() in answer.lower(), (case["id"], text)
            for text in as_list(checks.get("not_contains", [])):
                assert text.lower() not in answer.lower(), (case["id"], text)
            for pattern in patterns(checks):
                assert re.search(pattern, answer, re.IGNORECASE | re.MULTILINE), (case["id"], pattern)
            assert len(answer) <= checks.get("max_chars", len(answer)), case["id"]


@pytest.mark.parametrize("dataset", DATASETS)
def test_step_5_passes_every_expected_answer_and_criterion(dataset):
    asked, criteria = test_model.read_cases(dataset / "test_cases.json")  # which ends if an answer fails its own checks
    for case in asked:
        own = [
            criterion.get("checks", {})
            for criterion in criteria
            if criterion.get("category") in (None, case["category"])
        ]
        outcomes = test_model.apply_checks([*case["checks"], *own], case["expected"])
        assert outcomes and [outcome for outcome in outcomes if not outcome["passed"]] == [], case["id"]


@pytest.mark.parametrize("dataset", DATASETS)
def test_no_question_is_asked_twice(dataset):
    questions = [" ".join(words(said(row, "user")[0])) for row in [*rows(dataset), *cases(dataset)]]
    assert len(questions) == len(set(questions))


@pytest.mark.parametrize("dataset", DATASETS)
def test_no_test_question_stands_in_the_training_data(dataset):
    trained = [(row["id"], text) for row in rows(dataset) for text in said(row, "user")]
    near = [
        (case["id"], row_id, round(jaccard(asked, text), 2))
        for case in cases(dataset)
        for asked in said(case, "user")
        for row_id, text in trained
        if jaccard(asked, text) >= 0.6
    ]
    assert near == []


@pytest.mark.parametrize("dataset", DATASETS)
def test_no_two_answers_share_half_of_their_shingles(dataset):
    records = [*rows(dataset), *cases(dataset)]
    answers = [(row["id"], shingles(text)) for row in records for text in said(row, "assistant")]
    assert all(found for _, found in answers)
    pairs = itertools.combinations(answers, 2)
    near = [(a, b, round(overlap(x, y), 2)) for (a, x), (b, y) in pairs if overlap(x, y) > 0.5]
    assert near == []


def test_shingle_and_word_measures():
    same = "Open the project and press Share, then type the email of your guest."
    assert overlap(shingles(same), shingles(f"{OPENERS[0]}{same}\n\n{CLOSINGS[0]}")) == 1
    assert overlap(shingles(same), shingles("Press Stop when you are done, or type the minutes.")) == 0
    assert jaccard("Where is my invoice?", "where is my refund") == pytest.approx(3 / 5)


# ---------------------------------------------------------------- education


def test_education_counts():
    records = rows(EDUCATION)
    assert len(records) >= 60
    practice = {"teaching practice", "assessment", "curriculum standards"}
    about_teaching = [row for row in records if row["category"].replace("-", " ").replace("_", " ") in practice]
    assert len(about_teaching) >= 12
    assert {row["category"].replace("-", " ").replace("_", " ") for row in about_teaching} == practice
    asked = [case["question"].lower() for case in cases(EDUCATION)]
    assert len(asked) >= 12
    assert any("photosynthesis" in question for question in asked)
    assert any("newton" in question and "first law" in question for question in asked)


# ---------------------------------------------------------------- TechFlow


def kind(row):
    answer = said(row, "assistant")[-1]
    if ESCALATION in answer:
        return "escalation"
    return "standard" if STEPS_HEADING in answer else "decline"


def test_techflow_training_counts():
    records = rows(TECHFLOW)
    assert len(records) >= 100
    categories = [row["category"] for row in records]
    assert set(categories) == {"account", "billing", "features", "bugs"}
    assert all(categories.count(name) >= 25 for name in set(categories))
    kinds = [kind(row) for row in records]
    assert kinds.count("escalation") >= 14
    assert kinds.count("decline") >= 10
    assert kinds.count("standard") > len(records) * 0.6
    assert sum(len(turns(row)) > 2 for row in records) >= 12
    for first, second, third in zip(categories, categories[1:], categories[2:], strict=False):
        assert not first == second == third, "rows of a category stand in a block"


def test_techflow_test_case_counts():
    asked = [case["category"] for case in cases(TECHFLOW)]
    assert set(asked) == {"format", "escalation", "decline", "multi-turn"}
    least = {"format": 22, "escalation": 6, "decline": 4, "multi-turn": 4}
    assert {name: asked.count(name) for name in least if asked.count(name) < least[name]} == {}
    assert all(("history" in case) == (case["category"] == "multi-turn") for case in cases(TECHFLOW))


def techflow_answers():
    for row in [*rows(TECHFLOW), *cases(TECHFLOW)]:
        messages = turns(row)
        for i in range(1, len(messages), 2):
            yield row, i > 1, messages[i - 1]["content"], messages[i]["content"]


def test_every_techflow_answer_has_one_of_the_documented_forms():
    for row, is_later, _, answer in techflow_answers():
        assert answer.startswith(LATER_OPENERS if is_later else OPENERS), (row["id"], answer)
        if STEPS_HEADING in answer:
            form = STANDARD.fullmatch(answer)
            assert form and form["closing"] in CLOSINGS[:2] and ESCALATION not in answer, (row["id"], answer)
        else:
            form = PLAIN.fullmatch(answer)
            assert form, (row["id"], answer)
            is_escalation = answer.count(ESCALATION) == 1
            assert is_escalation != bool(REFUSAL.search(form["body"])), (row["id"], answer)
            assert form["closing"] == CLOSINGS[2 if is_escalation else 0], (row["id"], answer)
        assert answer.isascii(), row["id"]


def test_techflow_greetings_take_up_a_word_of_the_request():
    for row, _, question, answer in techflow_answers():
        greeting = answer.split("\n")[0]
        for opener in FIXED:
            greeting = greeting.removeprefix(opener)
        assert (set(words(greeting)) & set(words(question))) - STOP_WORDS, (row["id"], question, greeting)


def test_techflow_answers_are_short():
    lengths = [len(said(row, "assistant")[-1].split()) for row in [*rows(TECHFLOW), *cases(TECHFLOW)]]
    assert min(lengths) >= 45 and max(lengths) <= 95
    assert sum(lengths) / len(lengths) <= 70


def test_techflow_format_checks_use_words_of_their_question():
    for case in cases(TECHFLOW):
        if case["category"] != "format":
            continue
        greeting, steps, closing = patterns(case["checks"])
        named = re.fullmatch(r".*\\b\(([\w'|]+)\)", greeting)[1].split("|")
        asked = words(case["question"])
        for word in named:
            assert any(other.startswith(word.lower()) for other in asked), (case["id"], word)
            assert word.lower() not in STOP_WORDS and len(word) > 2, (case["id"], word)
        # The checks must be able to fail: on a greeting without the word, steps as bullets, no closing offer.
        flags = re.IGNORECASE | re.MULTILINE
        assert not re.search(greeting, f"Hi there! I can help.\n\n{case['question']}", flags), case["id"]
        assert not re.search(greeting, case["question"], flags), case["id"]
        assert not re.search(steps, f"{STEPS_HEADING}\n- One\n- Two", flags), case["id"]
        assert not re.search(closing, f"{case['answer']}\n\nGoodbye.", flags), case["id"]


def test_techflow_later_answers_refer_back():
    for case in cases(TECHFLOW):
        if case["category"] == "multi-turn":
            pattern = patterns(case["checks"])[0]
            assert re.search(pattern, case["history"][0]["content"]), case["id"]
            assert not re.search(pattern, case["question"], re.IGNORECASE), case["id"]
    for row in rows(TECHFLOW):
        messages = turns(row)
        if len(messages) > 2:
            earlier = {w for turn in messages[:-2] if turn["role"] == "user" for w in words(turn["content"])}
            taken_up = set(words(messages[-1]["content"])) & earlier - set(words(messages[-2]["content"])) - STOP_WORDS
            assert taken_up, row["id"]


# How facts look in an answer. A limit is a number with its unit.
UNITS = (
    r"members|projects|seats|users|guests|people|tasks per page|requests per minute|runs per month|rows|columns|"
    r"KB|MB|GB|TB|seconds|minutes|hours?|(?:business |working )?days?|weeks?|months?|years?|"
    r"backup codes|wrong passwords"
)
PRICE = re.compile(r"[$€£]\s?\d[\d,]*(?:\.\d+)?")
URL = re.compile(r"https?://[^\s)]+|\b(?:[\w-]+\.)*techflow\.example\b")
PLAN = re.compile(r"\b([A-Z]\w+)(?:(?:, | and | or )([A-Z]\w+))* plans?\b")
LIMIT = re.compile(rf"\d[\d,.]*(?:%| (?:{UNITS})\b)")
NOT_PLANS = {"Every", "Your", "Any", "The", "That", "This", "Each"}


def claims(answer):
    """Every price, URL, plan and limit in an answer, as (list of facts.json, text)."""
    found = [("prices", price) for price in PRICE.findall(answer)]
    found += [("urls", url.rstrip(".,;:")) for url in URL.findall(answer)]
    found += [("plans", plan) for match in PLAN.finditer(answer) for plan in re.findall(r"\b[A-Z]\w+", match[0])]
    found += [("limits", limit) for limit in LIMIT.findall(answer)]
    return [(name, text) for name, text in found if text not in NOT_PLANS]


def test_claims_are_found():
    answer = "The Free and Gold plans cost $9.50 for 3 days. See https://techflow.example/x, up to 4 GB and 20%."
    assert claims(answer) == [
        ("prices", "$9.50"), ("urls", "https://techflow.example/x"), ("plans", "Free"), ("plans", "Gold"),
        ("limits", "3 days"), ("limits", "4 GB"), ("limits", "20%"),
    ]  # fmt: skip


def test_every_fact_in_a_techflow_answer_is_known():
    facts = load(TECHFLOW / "facts.json")
    assert set(facts) == {"plans", "prices", "urls", "limits"}
    stated = 0
    for row in [*rows(TECHFLOW), *cases(TECHFLOW)]:
        asked = " ".join(said(row, "user"))
        for answer in said(row, "assistant"):
            for name, text in claims(answer):
                stated += 1
                # What the customer wrote first is not the assistant's claim.
                assert text in facts[name] or text in asked, (row["id"], name, text)
    assert stated > 100


def test_techflow_readme_holds_the_same_facts_and_strings():
    readme = (TECHFLOW / "README.md").read_text(encoding="utf-8")
    one_line = " ".join(readme.replace("\n> ", "\n").split())
    document = load(TECHFLOW / "test_cases.json")
    for known in load(TECHFLOW / "facts.json").values():
        assert [text for text in known if not re.search(rf"(?<![\w,.]){re.escape(text)}(?!\w|,\d)", one_line)] == []
    for text in (document["system"], STEPS_HEADING, ESCALATION, *CLOSINGS, *(opener.strip() for opener in OPENERS)):
        assert text in one_line, text
    kinds = [kind(row) for row in rows(TECHFLOW)]
    categories = [row["category"] for row in rows(TECHFLOW)]
    behaviours = [case["category"] for case in document["cases"]]
    for text in (
        f"{len(categories)} training rows: "
        + ", ".join(f"{name} {categories.count(name)}" for name in ("account", "billing", "features", "bugs")),
        f"{len(behaviours)} test cases, none of them in the training rows: "
        + ", ".join(f"{name} {behaviours.count(name)}" for name in ("format", "escalation", "decline", "multi-turn")),
        f"**Standard answer** ({kinds.count('standard')} rows)",
        f"**Escalation** ({kinds.count('escalation')} rows)",
        f"**Decline** ({kinds.count('decline')} rows)",
    ):
        assert text in one_line, text
    for criterion in document["criteria"]:
        assert criterion["name"] in readme, criterion["name"]
    # A figure on the fact sheet that facts.json lacks would be a fact no answer may use.
    facts = load(TECHFLOW / "facts.json")
    sheet = one_line.split("## The product's facts")[1].split("## The test cases")[0]
    assert [(name, text) for name, text in claims(sheet) if text not in facts[name]] == []


def test_techflow_system_prompt_leaves_the_format_to_the_training():
    assert load(TECHFLOW / "test_cases.json")["system"] == SYSTEM_PROMPT
    assert len(SYSTEM_PROMPT.split()) <= 45
    assert not re.search(r"step|greet|number|format|connect|human|offer", SYSTEM_PROMPT, re.IGNORECASE)


# What an answer may state, as patterns: the criterion "No invented facts" of the case files is made of facts.json.
UNIT = (
    "%|percent|[KMGT]B|(?:(?:business|working|backup|wrong) )?(?:minute|hour|day|week|month|year|user|member|guest|"
    "seat|project|row|run|request|task|password|code)s?"
)


def only_known(facts, asked):
    """The named patterns of "No invented facts": what facts.json lists, and what the customers themselves state."""

    def one_of(texts):
        written = (re.escape(text).replace("\\ ", "[ -]").removesuffix("s") for text in sorted(texts, reverse=True))
        return "|".join(written)

    prices = one_of({price[1:] for price in facts["prices"]} | set(re.findall(r"[$€£] ?(\d[\d,.]*\d|\d)", asked)))
    urls = one_of({url.split("://")[-1] for url in facts["urls"]})
    limits = one_of({*facts["limits"], *re.findall(rf"\d[\d,.]*[ -](?:{UNIT})\b", asked)})
    found = {
        "states only known prices": rf"[$€£] ?(?!(?:{prices})(?![\d,.]*\d))\d",
        "states only known addresses": rf"https?://(?!(?:{urls})(?![\w/]))",
        "states only known limits": rf"(?<![\d,.$])(?!(?:{limits})(?!\w*[a-rt-z]))\d[\d,.]*[ -]?(?:{UNIT})(?!\w)",
    }
    return [{"pattern": rf"\A(?![\s\S]*{pattern})", "name": name} for name, pattern in found.items()]


@pytest.mark.parametrize("name", ["test_cases.json", "fresh_cases.json"])
def test_no_invented_facts_is_made_of_the_facts(name):
    document = load(TECHFLOW / name)
    asked = "\n".join(text for case in document["cases"] for text in said(case, "user"))
    criterion = next(one for one in document["criteria"] if one["name"] == "No invented facts")
    assert criterion["checks"] == {"matches": only_known(load(TECHFLOW / "facts.json"), asked)}


@pytest.mark.parametrize(
    ("answer", "failed"),
    [
        ("It costs $8, or $150 a year.", []),
        ("It costs $9.", ["states only known prices"]),
        ("See https://app.techflow.example/reset.", []),
        ("See https://app.techflow.example/other", ["states only known addresses"]),
        ("See **https://evil.example**", ["states only known addresses"]),
        ("up to 5 members, a 5-member team, 10 business days", []),
        ("up to 6 members", ["states only known limits"]),
        ("in 11 business days", ["states only known limits"]),
        ("30%, not 31%", ["states only known limits"]),
        ("1. Open it\n2. Click it", []),
        ("within 14 days of your $2,400", []),  # which a customer of the test cases states
    ],
)
def test_invented_facts_are_found(answer, failed):
    document = load(TECHFLOW / "test_cases.json")
    checks = next(one["checks"] for one in document["criteria"] if one["name"] == "No invented facts")
    outcomes = test_model.apply_checks([checks], answer)
    assert [outcome["name"] for outcome in outcomes if not outcome["passed"]] == failed
