"""extras/: the report page, the judge, the loss curve, clean-up, leaks, dirt. Each is run as a reader runs it."""

import json
import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from chromium import CHROMIUM, Chromium, brightness
from fake_api import FakeAPI

import prepare_training_data
import test_model
from conftest import ROOT

sys.path.insert(0, str(ROOT / "extras"))
import clean_up
import find_dirt
import find_leaks
import judge_answers
import plot_loss
import report_page
from report_page import OUTCOMES

JUDGE, BASE, TUNED = "judge", "smollm2-135m-instruct", "ft:smollm2-135m-instruct:local::a1"
RATINGS = {"tone": 4, "format": 5, "helpful": 2, "next_steps": 1}
needs_browser = pytest.mark.skipif(not CHROMIUM or os.name == "nt", reason="there is no chromium on this machine")


@pytest.fixture
def api(tmp_path, monkeypatch):
    with FakeAPI() as api:
        monkeypatch.chdir(tmp_path)
        for name, value in api.env().items():
            monkeypatch.setenv(name, value)
        api.add_model(JUDGE)
        yield api


def failure(script, *arguments) -> str:
    """Run a page that gives up, and return its last words."""
    with pytest.raises(SystemExit) as end:
        script.main(list(arguments))
    assert isinstance(end.value.code, str) and FakeAPI.key not in end.value.code
    return end.value.code


# --- what holds for all of them ---


def test_where_nothing_is_there_yet_the_step_before_is_named(api):
    assert "run python test_model.py first" in failure(report_page)
    assert "run python test_model.py first" in failure(judge_answers, JUDGE)
    assert "name a job" in failure(clean_up)
    assert "name a job" in failure(plot_loss)


# --- test results ---


def one_answer(passed: bool, **fields) -> dict:
    check = {"check": "matches", "name": None, "value": r"\bHi\b", "passed": passed}
    check["problem"] = "" if passed else r"does not match /\bHi\b/"
    return {"passed": passed, "error": None, "finish_reason": "stop", "checks": [check], **fields}


def one_result(name: str, base: bool, tuned: bool, **fields) -> dict:
    outcome = OUTCOMES[2 * (base == tuned) + tuned]
    texts = {"question": f"Tea {name}?", "expected": "Yes.", "generated": "Yes!", "base_generated": "No."}
    result = {"id": name, "category": "all", "system": None, "history": [], "outcome": outcome, **texts}
    return {**result, "base": one_answer(base), "fine_tuned": one_answer(tuned), **fields}


def document_of(results: list[dict], criteria: list[dict] | None = None) -> dict:
    def counts(rows: list[dict]) -> dict:
        return {side: {"passed": sum(row[side]["passed"] for row in rows), "cases": len(rows)}
                for side in ("base", "fine_tuned")}  # fmt: skip

    categories = dict.fromkeys(result["category"] for result in results)
    summary = {
        "model": TUNED,
        "base_model": BASE,
        "cases_file": "cases.json",
        "verdict": "better",
        "sentence": "Lucky.",
    }
    summary |= {**counts(results), "criteria": criteria or []}
    summary["categories"] = {name: counts([row for row in results if row["category"] == name]) for name in categories}
    return {"summary": summary, "results": results}


def write(document: dict, path: str = "test_results.json") -> None:
    Path(path).write_text(json.dumps(document), encoding="utf-8")


def read(path: str = "test_results.json") -> dict:
    return json.loads(Path(path).read_text("utf-8"))


# --- judge_answers.py ---


def judged(api, reply, results=None, criteria=None) -> dict:
    """Let a judge that always replies so rate two cases, and return test_results.json."""
    api.answer = lambda model, messages: reply
    write(document_of(results or [one_result("a", False, True), one_result("b", True, True)], criteria))
    judge_answers.main([JUDGE])
    return read()


def test_the_ratings_stand_beside_the_answers_and_their_means_in_the_summary(api, capsys):
    criteria = [{"name": "Tone", "judge": "tone", "min_judge_mean": 4.5, "met": True, "passed": 2, "cases": 2}]
    document = judged(api, json.dumps(RATINGS), criteria=criteria)
    summary, answer = document["summary"], document["results"][0]["fine_tuned"]
    for name, rating in RATINGS.items():
        assert answer[f"judge_{name}"] == rating == summary["base"][f"judge_{name}"]
    assert summary["judge_model"] == JUDGE and summary["fine_tuned"]["answers_judged"] == 2
    assert (summary["criteria"][0]["judge_mean"], summary["criteria"][0]["met"]) == (4, False)
    assert re.search(r"fine_tuned +judge_tone +4\.00", capsys.readouterr().out)
    asked = [request.body for request in api.requests]
    assert len(asked) == 4 and all("temperature" not in body for body in asked)
    assert all(body["max_completion_tokens"] == 1000 for body in asked), "a small model may write on for ever"
    data = [json.loads(body["messages"][1]["content"]) for body in asked]
    assert {"system": None, "history": [], "question": "Tea a?", "expected": "Yes.", "answer": "Yes!"} in data


def test_a_milder_judge_decides_the_criterion_anew(api):
    criteria = [{"name": "Tone", "judge": "tone", "min_judge_mean": 4.0, "met": True, "passed": 2, "cases": 2}]
    assert not judged(api, json.dumps(RATINGS | {"tone": 1}), criteria=criteria)["summary"]["criteria"][0]["met"]
    api.add_model("mild"), setattr(api, "answer", lambda model, messages: json.dumps(RATINGS))
    judge_answers.main(["mild"])
    assert read()["summary"]["criteria"][0]["met"] and read()["summary"]["judge_model"] == "mild"


def test_the_judge_reads_every_language(api):
    texts = {"question": "茶要泡多久？", "expected": "三分钟。", "generated": "五分钟。", "base_generated": ""}
    judged(api, json.dumps(RATINGS), [one_result("zh", False, True, **texts)])
    assert len(api.requests) == 1, "an answer that is not there is not rated"
    prompt = api.requests[0].body["messages"][1]["content"]
    assert "茶要泡多久？" in prompt and "五分钟。" in prompt and "\\u" not in prompt


@pytest.mark.parametrize(
    "reply",
    [
        json.dumps(RATINGS),
        f"I think:\n```json\n{json.dumps(RATINGS, indent=2)}\n```\nThat is all.",
        json.dumps({"reason": "it writes {name} and } and {", **RATINGS}),
        json.dumps({name: float(rating) for name, rating in RATINGS.items()}),
        json.dumps({name: str(rating) for name, rating in RATINGS.items()}),
        json.dumps({"ratings": RATINGS, "reason": {"tone": "kind"}}),
        f"<think>As in {json.dumps(dict.fromkeys(RATINGS, 3))}? No.</think>{json.dumps(RATINGS)}",
        "好的：" + json.dumps({"理由": "很好", **RATINGS}, ensure_ascii=False),
    ],
    ids=["plain", "code block", "braces in a field", "4.0", '"4"', "nested", "after thinking", "Chinese"],
)
def test_every_usual_reply_is_a_rating(reply):
    assert judge_answers.read_ratings(reply) == {f"judge_{name}": rating for name, rating in RATINGS.items()}


@pytest.mark.parametrize(
    "reply", ["", "{", "no JSON", "[4, 4, 4, 4]", json.dumps(RATINGS | {"tone": 6}), '{"tone": 4}', "null"]
)
def test_a_reply_that_is_no_rating_is_shown_and_not_paid_for_twice(api, reply, capsys):
    document = judged(api, reply)
    assert document["summary"]["base"]["answers_judged"] == 0
    assert document["results"][0]["base"]["judged"] == 0 and "judge_tone" not in document["results"][0]["base"]
    assert f"No rating of a, base: the judge said {reply!r}" in capsys.readouterr().out
    judge_answers.main([JUDGE])
    assert len(api.requests) == 4


def test_what_the_judge_has_said_before_an_error_is_kept(api):
    api.fault(2, "400", message="The prompt is too long")
    api.answer = lambda model, messages: json.dumps(RATINGS)
    results = [one_result(f"c{number}", True, True, base_generated=f"No {number}.") for number in range(20)]
    write(document_of(results))
    assert "The prompt is too long" in failure(judge_answers, JUDGE)
    kept = len(Path("judge_replies.jsonl").read_text("utf-8").splitlines())
    before = len(api.requests)
    assert 0 < kept == before - 1 < 20, "and after it no further call begins"
    judge_answers.main([JUDGE])
    assert read()["summary"]["fine_tuned"]["answers_judged"] == 20


def test_a_server_that_repeats_the_key_does_not_get_it_printed(api):
    api.echo_key = True
    write(document_of([one_result("a", True, True)]))
    assert "[key]" in failure(judge_answers, "no-such-judge")


# --- plot_loss.py ---


def numbers_of(root: ElementTree.Element, kind: str) -> int:
    """Return how many points the curve of a kind has, 0 if there is no such curve."""
    paths = [path.get("d", "") for path in root if path.get("class") == kind and path.tag.endswith("path")]
    return sum(path.count(",") for path in paths)


def test_the_picture_names_its_axes_and_marks_each_epoch(api):
    job = api.add_job()
    for step in range(1, 31):
        api.add_step(job["id"], step, 30, valid_loss=1.5 if step % 10 == 0 else None)
    api.features.discard("results")
    api.finish(job["id"])
    plot_loss.main([job["id"]])
    root = ElementTree.parse("loss.svg").getroot()
    assert [numbers_of(root, kind) for kind in ("dots", "train", "valid", "epoch")] == [30, 30, 3, 6]
    texts = {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}
    named = {"loss", "training step", "a step", "average", "validation", f"Loss of {job['id']}"}
    assert named | {"epoch 1", "epoch 2", "epoch 3", "10", "20", "30"} <= texts


@pytest.mark.parametrize("encoded", [True, False], ids=["Base64", "plain"])
def test_the_result_file_of_the_latest_job_is_drawn(api, encoded):
    if not encoded:
        api.features.discard("base64 results")
    job = api.add_job()
    for step in range(1, 13):
        api.add_step(job["id"], step, 12)
    api.finish(job["id"])
    Path("fine_tune_job.json").write_text(json.dumps({"job_id": job["id"]}))
    plot_loss.main(["--output", "mine.svg"])
    assert numbers_of(ElementTree.parse("mine.svg").getroot(), "dots") == 12
    assert api.calls("GET /fine_tuning/jobs/*/events") == 0


@pytest.mark.parametrize("missing", [None, "", "NaN", float("nan"), -1, "-1.0"], ids=repr)
def test_a_missing_loss_is_left_out(missing):
    steps = [{"step": step, "train_loss": 2.0, "valid_loss": missing} for step in range(1, 5)]
    steps[1]["train_loss"] = missing
    root = ElementTree.fromstring(plot_loss.draw("Loss", steps, 2))
    assert (numbers_of(root, "dots"), numbers_of(root, "valid")) == (3, 0)


@pytest.mark.parametrize("steps", [[(0, 2.5)], [(1, 0.0)], [(1, "2.5"), (2, "0.0")]], ids=["step 0", "loss 0", "texts"])
def test_odd_figures_can_be_drawn(steps):
    rows = [{"step": step, "train_loss": loss} for step, loss in steps]
    assert numbers_of(ElementTree.fromstring(plot_loss.draw("Loss", rows, "auto")), "dots") == len(rows)


def test_a_running_job_leaves_room_for_its_other_steps(api):
    api.job_plan = ["running"]
    job = api.add_job(hyperparameters={"n_epochs": 3})
    api.add_step(job["id"], 1, 30)
    api.add_step(job["id"], 2, 30)
    plot_loss.main([job["id"]])
    assert "epoch 3" in Path("loss.svg").read_text("utf-8") and ">30<" in Path("loss.svg").read_text("utf-8")


def test_nothing_to_plot(api):
    api.job_plan = ["queued"]
    assert "no loss to draw yet" in failure(plot_loss, api.add_job()["id"])
    assert "NotFoundError" in failure(plot_loss, "ftjob-gone")
    assert not Path("loss.svg").exists()


# --- clean_up.py ---


def finished_job(api, **files) -> dict:
    training = api.add_file("a.jsonl", b"x")
    return api.finish(api.add_job(training_file=training["id"], **files)["id"])


def test_clean_up_shows_first_and_deletes_with_yes(api, capsys):
    job = finished_job(api, validation_file=api.add_file("b.jsonl", b"y")["id"])
    Path("fine_tune_job.json").write_text(json.dumps({"job_id": job["id"]}))
    clean_up.main([])
    shown = capsys.readouterr().out
    for what, name in [
        ("training file", job["training_file"]),
        ("validation file", job["validation_file"]),
        ("result file", job["result_files"][0]),
        ("model", job["fine_tuned_model"]),
    ]:
        assert re.search(f"^{what} +there +{re.escape(name)}$", shown, re.MULTILINE), shown
    assert shown.endswith(f"Next: python extras/clean_up.py {job['id']} --yes\n")
    assert api.calls("DELETE *") == 0 and Path("fine_tune_job.json").exists()
    clean_up.main(["--yes"])
    assert re.search(r"^record +deleted +fine_tune_job\.json$", capsys.readouterr().out, re.MULTILINE)
    assert api.files == {} and job["fine_tuned_model"] not in api.models
    assert not Path("fine_tune_job.json").exists(), "step 2 would report the deleted job's model"
    clean_up.main([job["id"], "--yes"])
    again = capsys.readouterr().out
    assert again.count("gone already") == 4 and "deleted" not in again


def test_clean_up_forgets_the_job_that_was_named_and_no_other(api):
    latest, earlier = finished_job(api), finished_job(api)
    Path("fine_tune_jobs").mkdir()
    for path, job in (("fine_tune_job.json", latest), (f"fine_tune_jobs/{earlier['id']}.json", earlier)):
        Path(path).write_text(json.dumps({"job_id": job["id"]}))
    clean_up.main([earlier["id"], "--yes"])
    assert Path("fine_tune_job.json").exists() and list(Path("fine_tune_jobs").iterdir()) == []
    assert latest["fine_tuned_model"] in api.models and latest["training_file"] in api.files


@pytest.mark.parametrize("status", ["queued", "running", "notRunning"])
def test_clean_up_keeps_what_a_job_under_way_reads(api, status):
    job = finished_job(api)
    other = api.add_job(training_file=job["training_file"], status=status)
    assert f"Job {other['id']} is {status}" in failure(clean_up, job["id"], "--yes")
    assert api.calls("DELETE *") == 0


def test_clean_up_of_a_failed_job(api, capsys):
    training = api.add_file("a.jsonl", b"x")
    job = api.add_job(training_file=training["id"], status="Failed")
    clean_up.main([job["id"], "--yes"])
    assert "training file     deleted" in capsys.readouterr().out and api.files == {}


def test_clean_up_of_an_unknown_job_says_what_the_server_said(api):
    api.echo_key = True
    assert "No such object: ftjob-gone (key: [key])" in failure(clean_up, "ftjob-gone")


# --- report_page.py ---

ATTACK = (
    "</pre></script><script>window.hacked = 1</script>"
    '<img src="http://127.0.0.1:9/x" onerror="window.hacked = 1"> \x1b[31m $model'
)


def test_the_page_says_what_was_tested_when_and_what_was_asked(api):
    criteria = [{"name": "Says hi", "met": False, "passed": 1, "cases": 2, "min_pass_rate": 0.9, "min_cases": 5}]
    criteria += [{**criteria[0], "judge": "tone", "judge_mean": 4.25, "min_judge_mean": 4.5}]
    write(document_of([one_result("a", False, True), one_result("b", True, False)], criteria))
    os.utime("test_results.json", (1_800_000_000, 1_800_000_000))
    report_page.main([])
    page = Path("report.html").read_text("utf-8")
    assert "2 cases of cases.json, results of 2027-01-15" in page
    assert f"base model {BASE}" in page and f"fine-tuned {TUNED}" in page
    assert "Says hi, 1 of 2 (asked: 90% of at least 5 cases)</li>" in page
    assert "Says hi, 1 of 2 (asked: 90% of at least 5 cases); tone rated 4.2 (asked: 4.5)</li>" in page


def test_of_two_fine_tuned_models_none_is_called_the_base_model(api):
    document = document_of([one_result("a", False, True)])
    document["summary"]["base_model"] = "ft:tiny:local:round-1:Ab"
    write(document)
    report_page.main([])
    page = Path("report.html").read_text("utf-8").lower()
    assert "other model ft:tiny:local:round-1:ab" in page and "<h3>other model: " in page and "base model" not in page


def test_a_check_s_name_is_shown_instead_of_its_pattern(api):
    result = one_result("a", False, False)
    result["fine_tuned"]["checks"][0]["name"] = "refers to the project"
    write(document_of([result]))
    report_page.main([])
    page = Path("report.html").read_text("utf-8")
    assert '<p class="bad">refers to the project</p>' in page
    assert page.count("does not match") == 1, "the base model's check has no name"


def test_ratings_and_whatever_else_is_wrong_stand_beside_the_answer(api):
    result = one_result("a", True, False)
    result["fine_tuned"] |= {"problem": "was cut off", "judged": 1, "judge_tone": 4, "judge_format": 2}
    result["base"] |= {"judged": 0, "judge_tone": None}
    write(document_of([result]))
    report_page.main(["--output", "r.html"])
    page = Path("r.html").read_text("utf-8")
    assert "was cut off" in page and page.count("(judge: tone 4, format 2)") == page.count("judge:") == 1


def test_half_a_character_can_be_written(api):
    write(document_of([one_result("a", True, False, generated="\ud83d")]))
    report_page.main([])
    assert "<pre>\\ud83d</pre>" in Path("report.html").read_text("utf-8")


def test_the_page_is_made_of_what_step_5_leaves_and_the_judge_adds(api, tmp_path):
    """test_model.py, judge_answers.py and report_page.py agree on test_results.json."""
    api.answer = lambda model, messages: {JUDGE: json.dumps(RATINGS), BASE: "No."}.get(model, "Yes, three minutes.")
    api.add_model(TUNED)
    case = {"id": "zh", "question": "茶要泡多久？", "answer": "Three minutes."}
    case["checks"] = {"contains": ["three minutes"]}
    Path("cases.json").write_text(json.dumps({"cases": [case]}), encoding="utf-8")
    test_model.main([TUNED, "--base-model", BASE, "--cases", "cases.json"])
    judge_answers.main([JUDGE])
    report_page.main([])
    page = Path("report.html").read_text("utf-8")
    assert "茶要泡多久？" in page and "1 of 1 (100%)" in page and page.count("(judge: tone 4,") == 2


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report of 12 cases, three a category; their texts try to break out of the page."""
    results = []
    for number in range(12):
        base, tuned = number % 4 in (0, 3), number % 4 in (1, 3)
        history = [{"role": "user", "content": ATTACK}, {"role": "assistant", "content": ATTACK}]
        texts = {"question": f"{number} {ATTACK}", "history": history, "expected": ATTACK, "generated": ATTACK * 3}
        texts |= {"base_generated": "word " * 200, "category": f"kind {number // 3} <&\"'>"}
        results.append(one_result(f"case-{number}", base, tuned, **texts))
        results[-1]["fine_tuned"]["checks"][0]["problem"] = ATTACK
    criteria = [{"name": ATTACK, "met": True, "passed": 12, "cases": 12, "min_pass_rate": 1.0}]
    document = document_of(results, criteria)
    document["summary"] |= {"model": f"ft:{ATTACK}", "sentence": ATTACK, "cases_file": ATTACK}
    document["summary"]["base"]["passed"] = 0
    folder = tmp_path_factory.mktemp("report")
    write(document, str(folder / "results.json"))
    report_page.main([str(folder / "results.json"), "--output", str(folder / "report.html")])
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium, page):
    set_width(chromium, 1200)
    chromium.call("Emulation.setEmulatedMedia", features=[])
    chromium.open(page)
    return chromium


def set_width(browser, width: int) -> None:
    mobile = width < 500
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=mobile)


SHOWN = (
    "[...document.querySelectorAll('main > details')].filter(one => !one.hidden)"
    ".map(one => one.querySelector('summary .dim').textContent.trim())"
)


@needs_browser
def test_nothing_is_fetched_nothing_fails_and_no_text_becomes_markup(browser, page):
    assert browser("typeof window.hacked") == "undefined"
    assert browser("document.scripts.length") == 1 and browser("document.images.length") == 0
    assert {request["request"]["url"] for request in browser.named("Network.requestWillBeSent")} <= {page}
    assert not browser.named("Runtime.exceptionThrown") and not browser.named("Log.entryAdded")
    assert not browser.named("Runtime.consoleAPICalled")
    assert browser("document.querySelector('main section:nth-child(2) pre').textContent") == ATTACK * 3


@needs_browser
def test_the_page_may_fetch_nothing(browser):
    browser("document.body.append(Object.assign(document.createElement('img'), { src: 'http://127.0.0.1:9/x' }))")
    while not browser.named("Log.entryAdded"):
        browser("0")
    assert "Content Security Policy" in browser.named("Log.entryAdded")[0]["entry"]["text"]


@needs_browser
def test_the_filters(browser):
    assert browser("count.textContent.trim()") == "12 of 12"
    browser("buttons.find(one => one.value === 'broken').click()")
    assert browser(SHOWN) == ["case-0", "case-4", "case-8"]
    assert browser("document.querySelector('button[aria-pressed=true]').textContent") == "broken"
    browser("select.selectedIndex = 2; select.dispatchEvent(new Event('change'))")
    assert browser(SHOWN) == ["case-4"] and browser("count.textContent.trim()") == "1 of 12"
    browser("buttons[0].click()")
    assert browser(SHOWN) == ["case-4", "case-5", "case-3"]  # broken, fixed, still passing


@needs_browser
def test_broken_cases_come_first_and_stand_open(browser):
    outcomes = browser(
        "[...document.querySelectorAll('main > details')]"
        ".map(one => [one.querySelector('summary').firstChild.textContent.trim(), one.open])"
    )
    assert [outcome for outcome, _ in outcomes] == [name for name in OUTCOMES for _ in range(3)]
    assert all(is_open == (outcome == "broken") for outcome, is_open in outcomes)


@needs_browser
def test_the_keyboard_reaches_everything(browser):
    browser.press("Tab")
    assert browser("document.activeElement.textContent") == "all"
    assert browser("getComputedStyle(document.activeElement).outlineStyle") != "none"
    browser.press("Tab")
    browser.press("Tab")
    browser.press("Enter", text="\r")
    assert browser("document.querySelector('button[aria-pressed=true]').textContent") == "fixed"
    for _ in range(3):
        browser.press("Tab")
    assert browser("document.activeElement.tagName") == "SELECT"
    browser.press("Tab")
    assert browser("document.activeElement.tagName") == "SUMMARY"
    assert not browser("document.activeElement.parentNode.open")
    browser.press("Enter", text="\r")
    assert browser("document.activeElement.parentNode.open")


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_and_each_outcome_has_its_colour(browser, scheme):
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    back = brightness(browser("getComputedStyle(document.body).backgroundColor"))
    assert (back < 0.1) is (scheme == "dark")
    colours = []
    for selector in ("h1", "h3", ".good", ".bad", "pre", *(f"summary .{kind.replace(' ', '-')}" for kind in OUTCOMES)):
        colours.append(browser(f"getComputedStyle(document.querySelector({selector!r})).color"))
        lighter, darker = max(brightness(colours[-1]), back), min(brightness(colours[-1]), back)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, selector  # WCAG AA
    assert len(set(colours[-4:])) == 4


@needs_browser
@pytest.mark.parametrize("width", [320, 390, 1200])
def test_it_fits_a_phone(browser, width):
    set_width(browser, width)
    assert browser("document.documentElement.scrollWidth") <= width
    left, right = browser(
        "[...document.querySelectorAll('details[open] section')].slice(0, 2)"
        ".map(one => one.getBoundingClientRect().left)"
    )
    assert (left < right) is (width == 1200)  # the answers side by side, or one under the other
    numbers = "[...document.querySelectorAll('.pair span')].map(one => one.getBoundingClientRect().height)"
    assert max(browser(numbers)) < 30, "no number breaks into two lines"


@needs_browser
@pytest.mark.parametrize("width", [390, 1200])
def test_the_bars_show_the_pass_rates_in_pairs(browser, width):
    set_width(browser, width)
    bars = browser(
        "[...document.querySelectorAll('.pair i')].map(one => [one.style.width, one.getBoundingClientRect()])"
        ".map(([share, box]) => [share, box.width, box.top, box.bottom])"
    )
    assert len(bars) == 10, "four categories and all, both models"
    assert [share for share, *_ in bars[-2:]] == ["0%", "50%"]
    assert bars[-2][1] == 0, "nothing passed, nothing is drawn"
    assert bars[-1][1] > 90
    within = [lower[2] - upper[3] for upper, lower in zip(bars[::2], bars[1::2], strict=True)]
    between = [below[2] - above[3] for above, below in zip(bars[1::2], bars[2::2], strict=False)]
    assert max(within) * 1.5 < min(between)


# --- find_leaks.py ---


def test_test_cases_that_were_trained_on_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "So."}]} for q in ("A?", "B?")
    ]
    Path("training_data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("cases.json").write_text(json.dumps({"cases": [{"question": " b? "}, {"question": "C?"}]}))
    assert "Delete these 1 rows" in failure(find_leaks, "--cases", "cases.json")
    assert "training_data.jsonl:2: a test case asks this, too: b?" in capsys.readouterr().out
    Path("cases.jsonl").write_text(json.dumps(rows[0] | {"messages": rows[0]["messages"][1:]}) + "\n")
    find_leaks.main(["--cases", "cases.jsonl"])
    assert "No test case stands in the training data." in capsys.readouterr().out
    assert "cannot be read" in failure(find_leaks, "--cases", "none.json")


def test_the_tutorial_s_cases_were_not_trained_on(capsys):
    find_leaks.main([str(ROOT / "training_data.jsonl")])
    assert "No test case" in capsys.readouterr().out


# --- find_dirt.py ---

OWN_DATA = Path(__file__).parent / "data" / "own_data"
ANSWER = "This answer has nothing in it that should not be there, number "


def trained(path: Path, *answers: str) -> Path:
    """Write a training file, a row an answer."""
    turns = [("user", "What is it, number {}?"), ("assistant", "{}")]
    rows = []
    for n, answer in enumerate(answers):
        texts = [turns[0][1].format(n), answer]
        rows.append({"messages": [{"role": turns[at][0], "content": text} for at, text in enumerate(texts)]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(("name", "parts"), [
    ("5a_separators.jsonl", [r"common-mark: each question has '\n\n###\n\n'", "' END'", "each answer has ' '"]),
    ("5b_dirt.csv", ["placeholder-answer", "html", "mojibake"]),
])  # fmt: skip
def test_dirt_in_one_s_own_data_is_found(tmp_path, monkeypatch, capsys, name, parts):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_training_data, "MIN_EXAMPLES", 1)
    prepare_training_data.main([str(OWN_DATA / name)])
    capsys.readouterr()
    assert "Mend your data" in failure(find_dirt)
    out = capsys.readouterr().out
    assert all(part in out for part in parts), out


@pytest.mark.parametrize(("answer", "kind"), [
    ("#N/A", "placeholder-answer"), (" TBD", "placeholder-answer"),
    (f"{ANSWER}&nbsp;x", "html"), (f"{ANSWER}<br/>x", "html"),
    (f"{ANSWER}<a href=x>y</a>", "html"), (f"{ANSWER}Itâ€™s", "mojibake"), (f"{ANSWER}schÃ¶n", "mojibake"),
    (f"{ANSWER}StraÃŸe", "mojibake"), (f"{ANSWER}<strong>x", "html"), (f"{ANSWER}f&uuml;r", "html"),
])  # fmt: skip
def test_a_kind_of_dirt_is_told_once_with_its_lines(tmp_path, capsys, answer, kind):
    path = trained(tmp_path / "rows.jsonl", ANSWER + "1", *[answer] * 5)
    failure(find_dirt, str(path))
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1 and f"warning: {kind}: " in out and out.endswith("(5 rows: lines 2, 3, 4, ...)\n")
    failure(find_dirt, str(path), "--all")
    assert capsys.readouterr().out.endswith("(5 rows: lines 2, 3, 4, 5, 6)\n")


def test_what_is_near_dirt_is_none(tmp_path, capsys):
    near = ["a<b and b>c", "R&D", "AT&T; x", "none of these", "München, Ça va, â bon", "<|", "if x < a: pass"]
    find_dirt.main([str(trained(tmp_path / "rows.jsonl", *[f"{ANSWER}{text}" for text in near]))])
    assert "no dirt in 7 rows" in capsys.readouterr().out
    find_dirt.main([str(trained(tmp_path / "rows.jsonl", "A long WEEKEND", "THE LEGEND", "Two lines\u2028of one"))])
    find_dirt.main([str(ROOT / "training_data.jsonl")])
    assert "no dirt in 204 rows" in capsys.readouterr().out
    assert "cannot be read" in failure(find_dirt, str(tmp_path / "none.jsonl"))
    (tmp_path / "list.jsonl").write_text('[{"question": "Q?"}]')
    assert "cannot be read" in failure(find_dirt, str(tmp_path / "list.jsonl"))
