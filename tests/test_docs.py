"""The documents say what the code does: commands, exit codes, error sentences, figures, links, file tree.

README's commands are run, and what it shows of them is compared, in test_tutorial.py.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import test_examples as datasets

import prepare_training_data
import test_model
from conftest import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import make

DOCS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/*.md"), *ROOT.glob("local_api/*.md")]
)
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in DOCS}
README = TEXTS["README.md"]
EXIT_CODES = {0, 1, 2, 3, 4, 130}
TECHFLOW = ROOT / "examples" / "techflow_support"


def prose(text: str) -> str:
    """Return a document without its code blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a document."""
    titles = re.findall(r"^#+ +(.+)$", prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


# ---------------------------------------------------------------- shape


def test_readme_has_the_parts_of_the_guide_in_order():
    titles = re.findall(r"^##+ (.+)$", prose(README), flags=re.MULTILINE)
    steps = [title for title in titles if re.match(r"Step \d", title)]
    assert [title.split(":")[0] for title in steps] == [f"Step {number}" for number in range(1, 9)]
    others = [title for title in titles if title not in steps]
    assert others == [
        "Two commands",
        "What fine-tuning is, and when not to",
        "How the pieces fit",
        "The lab",
        "Where it runs",
        "Costs",
        "Your own dataset",
        "Troubleshooting",
        "For contributors",
        "Key takeaways",
    ]
    assert README.count("\n") <= 440


def test_every_question_has_its_answer_and_every_answer_its_question():
    lab = README[README.index("## The lab") : README.index("## Where it runs")]
    asked = dict(re.findall(r"\((\d\.\d)\) ([^(]+?\?)(?=\s|$)", " ".join(lab.split())))
    answered = dict(re.findall(r"\*\*(\d\.\d) (.+?)\*\*", " ".join(TEXTS["docs/answers.md"].split())))
    assert asked == answered and {number[0] for number in asked} == set("12345678")


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    text, folder = TEXTS[name], (ROOT / name).parent
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(text))
    for link in links:
        path, _, anchor = link.partition("#")
        target = (folder / path).resolve() if path else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text("utf-8")), link


def test_every_page_of_docs_is_reached_from_the_readme():
    reached, waiting = set(), ["README.md"]
    while waiting:
        name = waiting.pop()
        if name in reached or name not in TEXTS:
            continue
        reached.add(name)
        for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", TEXTS[name]):
            target = ((ROOT / name).parent / link).resolve()
            waiting.append(target.relative_to(ROOT).as_posix())
    assert {name for name in TEXTS if name.startswith("docs/")} - reached == set()


def test_the_file_tree_names_what_is_there():
    tree = re.findall(r"^([\w./*]+)  +\S", README[README.index("## For contributors") :], flags=re.MULTILINE)
    assert [path for path in tree if not list(ROOT.glob(path))] == []
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    folders = {f"{path.split('/')[0]}/" for path in listed if "/" in path and not path.startswith(".")}
    assert folders <= set(tree)
    pieces = README[README.index("## How the pieces fit") : README.index("## The lab")]
    assert all(f"{name}.py" in pieces for name in make.SCRIPTS)


# ---------------------------------------------------------------- commands, exit codes, sentences


def test_the_page_of_commands_is_that_of_the_parsers():
    assert TEXTS["docs/commands.md"] == make.commands_page(), "run: make docs"


def test_every_flag_beside_a_script_s_name_is_one_of_its_flags():
    known = {name: set(importlib.import_module(name).build_parser()._option_string_actions) for name in make.SCRIPTS}
    wrong, found = [], 0
    for name, text in TEXTS.items():
        text = re.sub(r"^\| ….+$", "", text, flags=re.MULTILINE)  # error sentences
        for script, rest in re.findall(r"\b(\w+)\.py\b([^\n`|]*)", text):
            for flag in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", rest.split(".py")[0] if script in known else ""):
                found += 1
                wrong += [(name, script, flag)] * (flag not in known[script])
    assert wrong == [] and found > 30


def documented_codes(text: str) -> set[int]:
    """Return the exit codes of a list such as "0 done, 1 below (..), 130 interrupted"."""
    return {int(code) for code in re.findall(r"(?:^|[,;·|] *|\n)`?(\d+)`? [a-z-]", text)}


def used_codes(script: str) -> set[int]:
    """Return the exit codes that a script's code names: in StepError, in what main() and run() return, in exits."""
    codes = {2}  # argparse
    for node in ast.walk(ast.parse((ROOT / f"{script}.py").read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name in ("main", "run"):
            returned = [part for part in ast.walk(node) if isinstance(part, ast.Return) and part.value is not None]
            codes |= {value for part in returned for value in numbers(part.value)}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "StepError" and len(node.args) > 1:
            codes |= numbers(node.args[1])
    return codes & EXIT_CODES


def numbers(node: ast.AST) -> set[int]:
    return {part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and type(part.value) is int}


@pytest.mark.parametrize("script", make.SCRIPTS)
def test_the_docstring_documents_each_exit_code_that_the_script_uses(script):
    text = re.search(rf"^## {script}\.py\n.+?^Exit codes: (.+?)$", TEXTS["docs/commands.md"], re.DOTALL | re.MULTILINE)
    assert text and used_codes(script) <= documented_codes(text[1]) <= EXIT_CODES, text and text[1]


def test_readme_s_exit_codes_are_those_of_the_scripts():
    row = re.search(r"^\| exit code \| (.+?) \|$", README, flags=re.MULTILINE)
    assert row and documented_codes(row[1]) == EXIT_CODES == set().union(*map(used_codes, make.SCRIPTS))


def sentence(node: ast.AST) -> str:
    """Return a string expression as text, with … for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(sentence(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return sentence(node.left) + sentence(node.right)
    return "…"


def sentences_in(script: str) -> set[str]:
    """Return the error sentences of a script: those of StepError, of bad options, of test cases that cannot be read."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{script}.py").read_text("utf-8"))):
        if isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in ("StepError", "ArgumentTypeError", "error"):
                found.add(sentence(node.args[0]))
            elif name == "fault" and script == "test_model":
                found.add(sentence(node.args[-1]))
        elif isinstance(node, ast.FunctionDef) and node.name == "server_errors_explained":
            parts = [part for statement in node.body[1:] for part in ast.walk(statement)]
            filled = {id(piece) for part in parts if isinstance(part, ast.JoinedStr) for piece in part.values}
            texts = [part.value for part in parts if isinstance(part, ast.Constant) and id(part) not in filled]
            found |= {text for text in texts if isinstance(text, str) and text.count(" ") > 1}
    return {plain(text) for text in found if re.search(r"[a-z]{4}", text)}


def plain(text: str) -> str:
    return re.sub(r"…+", "…", text.replace("`", "").replace("\\", "")).strip()


def documented_sentences() -> set[str]:
    page = TEXTS["docs/troubleshooting.md"]
    page = page[page.index("## What the scripts say") : page.index("## Data problems")]
    return {plain(row) for row in re.findall(r"^\| (.+?) \| \d", page, flags=re.MULTILINE)}


def test_every_error_sentence_is_documented_and_every_documented_one_exists():
    in_code = set().union(*map(sentences_in, make.SCRIPTS))
    assert in_code - documented_sentences() == set(), "not in docs/troubleshooting.md"
    assert documented_sentences() - in_code == set(), "in docs/troubleshooting.md alone"


def test_the_codes_of_failed_jobs_are_documented():
    in_code = set()
    for module in ("train", "validation", "worker"):
        text = (ROOT / "local_api" / f"{module}.py").read_text("utf-8")
        in_code |= set(re.findall(r'JobFailed\(\s*"(\w+)"', text))
        if 'JobFailed(f"invalid_{param}"' in text:
            in_code |= {"invalid_training_file", "invalid_validation_file"}
    page = TEXTS["docs/troubleshooting.md"]
    table = page[page.index("## Failed jobs") : page.index("## Data problems")]
    cells = re.findall(r"^\| (`.+?) \|", table, flags=re.MULTILINE)
    assert {code for cell in cells for code in re.findall(r"`(\w+)`", cell)} == in_code


# ---------------------------------------------------------------- figures


def kept(name: str) -> dict:
    return json.loads((ROOT / "docs" / "run" / name).read_text("utf-8"))


def one_spaced(text: str) -> str:
    return re.sub(r" +", " ", text)


def test_readme_shows_the_results_that_are_kept(capsys):
    run = kept("test_results.json")
    test_model.print_report(run["summary"], run["results"])
    printed = [one_spaced(line).strip() for line in capsys.readouterr().out.splitlines()]
    start = README[README.index("```text\npassed") + 8 :]
    step_5 = README[README.index("```bash\npython test_model.py\n```") :]
    step_5 = step_5[step_5.index("```text\n") + 8 :]
    for shown in (start, step_5):
        lines = [one_spaced(line).strip() for line in shown[: shown.index("\n```")].splitlines()]
        lines = [line for line in lines if line not in ("[...]", "") and not line.startswith(("Results:", "Next:"))]
        assert len(lines) >= 5 and [line for line in lines if line not in printed] == []


def test_readme_s_question_and_answers_are_those_of_the_kept_run():
    shown = re.search(r"```text\nQuestion: +(.+?)\n\nBase model:\n(.+?)\n\nFine-tuned:\n(.+?)\n```", README, re.DOTALL)
    assert shown
    question, base, tuned = (" ".join(text.split()) for text in shown.groups())
    case = next(row for row in kept("test_results.json")["results"] if row["question"] == question)
    assert (base, tuned) == (" ".join(case["base_generated"].split()), " ".join(case["generated"].split()))


def test_readme_s_rounds_are_those_of_the_kept_runs():
    step_6 = README[README.index("### Step 6") : README.index("### Step 7")]
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in step_6.splitlines() if line[:1] == "|"]
    rounds = kept("rounds.json")  # name of a column -> {"cases": summary, "fresh": summary}
    header, _, *rows = shown
    assert header[2:] == [*rounds]
    for name, *cells in rows:
        of_round_1, of_later = [], []
        for run in rounds.values():
            summary = run["fresh" if name.startswith("fresh") else "cases"]
            figures = summary["categories"].get(name, summary)
            of_round_1.append(f"{figures['base']['passed']} of {figures['base']['cases']}")
            of_later.append(f"{figures['fine_tuned']['passed']} of {figures['fine_tuned']['cases']}")
        assert len(set(of_round_1)) == 1 and cells == [of_round_1[0], *of_later], name
    assert [name for name, *_ in rows] == ["format", "escalation", "decline", "multi-turn", "all", "fresh cases"]


def listed(numbers) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}"


def test_readme_s_figures_of_other_seeds_are_those_of_the_kept_runs():
    text, seeds = " ".join(README.split()), kept("seeds.json")
    passed = listed(summary["fine_tuned"]["passed"] for summary in seeds)
    forms = listed(summary["categories"]["format"]["fine_tuned"]["passed"] for summary in seeds)
    assert len(seeds) == 4 and "Trained four times more with other seeds" in text
    assert f"gave {passed} of 42, and the format in {forms} of 24" in text
    assert f"with four other seeds, {passed} passed" in text
    turns = [summary["categories"]["multi-turn"] for summary in (kept("test_results.json")["summary"], *seeds)]
    before = listed(side["fine_tuned"]["passed"] for side in turns)
    later = (run["cases"]["categories"]["multi-turn"]["fine_tuned"] for run in kept("rounds.json").values())
    assert f"{before} passed before, {listed(side['passed'] for side in later)} after" in text
    third, hard = kept("rounds.json")["round 3"], ("escalation", "decline", "multi-turn")
    looked_at = [third["cases"]["categories"][name]["fine_tuned"] for name in hard]
    passed, cases = (sum(side[key] for side in looked_at) for key in ("passed", "cases"))
    fresh = third["fresh"]["fine_tuned"]
    assert f"{passed} of the {cases} that we had looked at, and {fresh['passed']} of these {fresh['cases']}" in text


def test_readme_s_figures_of_the_own_dataset_are_those_of_the_kept_run():
    summary = kept("education.json")
    passed = f"passes {summary['fine_tuned']['passed']} of the {summary['cases']} test cases, its base model none"
    assert passed in " ".join(README.split()) and summary["base"]["passed"] == 0


def test_the_loss_curve_is_that_of_the_kept_result_file():
    assert (ROOT / "docs" / "loss.svg").read_text("utf-8") == make.loss_svg(), "run: make docs"


def test_the_report_is_made_of_the_kept_results(tmp_path):
    summary = kept("test_results.json")["summary"]
    assert summary["sentence"].split(",")[0] in make.report_html()
    assert (ROOT / "docs" / "report.png").read_bytes().startswith(b"\x89PNG")
    if not make.photograph(make.report_html(), tmp_path / "report.png"):
        pytest.skip("no Chromium here")
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_costs_are_computed_from_the_script_s_prices():
    tokens = int(re.search(r"^  billed +([\d,]+)", README, re.MULTILINE)[1].replace(",", ""))
    costs = README[README.index("## Costs") : README.index("## Your own dataset")]
    assert prepare_training_data.PRICES_DATE in costs and f"{tokens:,} tokens" in costs
    shown = re.findall(r"^\| `(.+?)` \| \$([\d.]+) \|.*\| \$([\d.]+) \|$", costs, flags=re.MULTILINE)
    prices = prepare_training_data.PRICES
    assert shown == [(name, f"{price:.2f}", f"{tokens * price / 1e6:.2f}") for name, price in prices.items()]


def test_the_dates_of_the_wind_down_stand_in_one_place():
    row = re.search(r"^\| OpenAI \|.+$", README, flags=re.MULTILINE)[0]
    for day in ("2026-05-07", "2026-07-02", "2027-01-06", "2027-01-14"):
        found = [name for name, text in TEXTS.items() if day in re.sub(r"^\| ….+$", "", text, flags=re.MULTILINE)]
        assert day in row and found == ["README.md"], day


def test_providers_are_the_same_everywhere():
    example = (ROOT / ".env.example").read_text("utf-8")
    table = README[README.index("## Where it runs") : README.index("## Costs")]
    pages = TEXTS["docs/providers.md"]
    addresses = set(re.findall(r"OPENAI_BASE_URL=(\S+)", pages))
    assert addresses == set(re.findall(r"`(https?://\S+)`", table))
    assert addresses <= set(re.findall(r"OPENAI_BASE_URL=(\S+)", example))
    names = set(re.findall(r"^#? ?([A-Z_]+)=", example, flags=re.MULTILINE))
    assert set(re.findall(r"^([A-Z_]+)=", pages, flags=re.MULTILINE)) <= names


def test_hyperparameters_page_states_the_trainer_s_numbers():
    from local_api import step, train

    page = " ".join(TEXTS["docs/hyperparameters.md"].split())
    assert f"batch size {train.AUTO_BATCH_SIZE}, multiplier {train.AUTO_LEARNING_RATE_MULTIPLIER}" in page
    assert f"a learning rate of {step.BASE_LEARNING_RATE}" in page and f"rank {step.LORA['r']}" in page
    assert f"the first {step.WARMUP_SHARE:.0%} of the steps" in page
    assert prepare_training_data.auto_epochs(25) > prepare_training_data.auto_epochs(26) == 3
    assert prepare_training_data.auto_epochs(8333) == 3 > prepare_training_data.auto_epochs(8334)


# ---------------------------------------------------------------- code and data in the documents


def test_the_example_of_an_application_runs(tiny_api, tmp_path):
    page = TEXTS["docs/deployment.md"]
    code = re.search(r"<!-- run by the tests -->\n```python\n(.+?)```", page, re.DOTALL)[1]
    assert datasets.SYSTEM_PROMPT in code
    environment = {**tiny_api.environment("tiny"), "FINE_TUNED_MODEL": "ft:tiny:local::gone", "PYTHONUTF8": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    first, *answer = done.stdout.splitlines()
    assert first.startswith("ft:tiny:local::gone: ") and "404" in first and answer, done.stdout


def load(name: str) -> list[dict]:
    return json.loads((TECHFLOW / name).read_text("utf-8"))


LATER_ROUNDS = ("round_2.json", "round_3.json")


def test_rows_of_the_later_rounds_keep_the_rules_of_the_first(monkeypatch):
    new = [row for name in LATER_ROUNDS for row in load(name)]
    monkeypatch.setattr(datasets, "rows", lambda dataset: [*load("qa_pairs.json"), *new])
    for test in (
        datasets.test_training_rows_have_the_documented_shape,
        datasets.test_no_question_is_asked_twice,
        datasets.test_no_test_question_stands_in_the_training_data,
        datasets.test_no_two_answers_share_half_of_their_shingles,
    ):
        test(TECHFLOW)
    datasets.test_every_techflow_answer_has_one_of_the_documented_forms()
    datasets.test_techflow_greetings_take_up_a_word_of_the_request()
    datasets.test_techflow_answers_are_short()
    datasets.test_techflow_later_answers_refer_back()
    datasets.test_every_fact_in_a_techflow_answer_is_known()


def test_fresh_cases_are_fresh_and_can_be_passed():
    fresh, _ = test_model.read_cases(TECHFLOW / "fresh_cases.json")  # which ends if an answer fails its own checks
    trained = [row for name in ("qa_pairs.json", *LATER_ROUNDS) for row in load(name)]
    seen = [text for row in [*trained, *datasets.cases(TECHFLOW)] for text in datasets.said(row, "user")]
    for case in fresh:
        for text in seen:
            assert datasets.jaccard(case["question"], text) < 0.6, (case["id"], text)
        assert any(case["checks"]), case["id"]


def test_the_education_dataset_s_readme_has_the_commands_of_the_readme():
    def commands(text: str) -> str:
        return re.search(r"```bash\n(python prepare_training_data.py examples/education/.+?)\n```", text, re.DOTALL)[1]

    assert commands(TEXTS["examples/education/README.md"]) == commands(README)


def test_the_dataset_s_readme_counts_the_later_rounds():
    text = TEXTS["examples/techflow_support/README.md"]
    for name in (*LATER_ROUNDS, "fresh_cases.json"):
        records = load(name)
        count = len(records["cases"] if isinstance(records, dict) else records)
        assert re.search(rf"^\| `{name}` \| {count} ", text, flags=re.MULTILINE), name


# ---------------------------------------------------------------- continuous integration


def test_the_workflow_runs_what_the_project_promises():
    import yaml

    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))
    linux = workflow["jobs"]["linux"]
    assert linux["strategy"]["matrix"]["python"] == ["3.10", "3.11", "3.12", "3.13", "3.14"]
    assert linux["steps"][-1]["run"] == "bash .ci/run"
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step.get("uses", "a/b@" + "0" * 40))
            for path in re.findall(r"(?:tests|examples)/\S+\.py", step.get("run", "")):
                assert Path(ROOT / path).is_file(), path
