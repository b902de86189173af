"""The documents say what the code does: commands, exit codes, error sentences, figures, links, file tree.

README's commands are run, and what it shows of them is compared, in test_tutorial.py.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import test_examples as datasets

import fine_tune
import test_model
from conftest import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import make

DOCS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/*.md"), *ROOT.glob("local_api/*.md")]
)
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in DOCS}
README = TEXTS["README.md"]
NO_KINDS = {"user", "-o", "input", "instruction", "name", "prompt", "question", "system", "text", "true", "messages"}
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
        "Your own dataset",
        "Where it runs, and what it costs",
        "Troubleshooting",
        "For contributors",
    ]
    assert len(README.splitlines()) <= 300


def test_no_id_of_a_run_stands_in_a_command():
    for name, text in TEXTS.items():
        for block in re.findall(r"```bash\n(.+?)```", text, re.DOTALL):
            assert not re.search(r"ftjob-\w|ft:\S", block), name


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


def test_readme_names_the_folders_and_the_scripts():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    folders = {f"{path.split('/')[0]}/" for path in listed if "/" in path and not path.startswith(".")}
    contributors = README[README.index("## For contributors") :]
    assert {folder for folder in folders if f"`{folder}`" not in contributors} == set()
    pieces = README[README.index("## How the pieces fit") : README.index("## The lab")]
    assert all(f"{name}.py" in pieces for name in make.SCRIPTS)


def test_the_map_of_the_local_api_names_each_module():
    table = TEXTS["local_api/README.md"].split("## Map")[1].split("##")[0]
    modules = {path.name for path in (ROOT / "local_api").glob("*.py")} - {"__init__.py"}
    assert {name for name in modules if f"`{name}`" not in table} == set()


# ---------------------------------------------------------------- commands, exit codes, sentences


def test_the_page_of_commands_is_that_of_the_parsers():
    assert TEXTS["docs/commands.md"] == make.commands_page(), "run: make docs"


def flags_of(page: str) -> set[str]:
    return set(re.findall(r'"(--?[a-z][a-z-]*)"', (ROOT / f"{page}.py").read_text("utf-8"))) | {"-h", "--help"}


def test_every_flag_beside_a_script_s_name_is_one_of_its_flags():
    known = {page.split("/")[-1]: flags_of(page) for page in make.PAGES}
    wrong, found = [], 0
    figures = {"docs/make_figures.py": (ROOT / "docs" / "make_figures.py").read_text("utf-8")}
    for name, text in {**TEXTS, **figures}.items():
        for script, rest in re.findall(r"\b(\w+)\.py\b([^\n`|]*)", text):
            for flag in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", rest.split(".py")[0] if script in known else ""):
                found += 1
                wrong += [(name, script, flag)] * (flag not in known[script])
    assert wrong == [] and found > 30


def used_codes(page: str) -> set[int]:
    """Return the exit codes that a page names: 1 where it exits with a sentence, 2 is argparse's."""
    codes = {0, 2}
    for node in ast.walk(ast.parse((ROOT / page).read_text("utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "sys.exit" and node.args:
            value = node.args[0]
            codes.add(value.value if isinstance(value, ast.Constant) and isinstance(value.value, int) else 1)
    return codes


def test_readme_s_exit_codes_are_those_of_the_scripts():
    row = re.search(r"^Exit codes of all scripts: (.+)$", README, flags=re.MULTILINE)
    assert row and {int(code) for code in re.findall(r"(?:^|· )(\d+) ", row[1])} == {0, 1, 2, 130}
    assert set().union(*(used_codes(f"{page}.py") for page in make.PAGES)) == {0, 1, 2, 130}


def test_each_kind_of_data_problem_is_documented_and_each_documented_one_exists():
    in_code = set()
    told = r'(?:fault\(|Fault\(|Problem\(None, |\()\s*"([a-z-]+)",\s(?=\s*lambda|f?["\']|advice|str)|error: ([a-z-]+): '
    for name in ("prepare_training_data.py", *(f"local_api/{module}.py" for module in ("rules", "rows", "validation"))):
        found = re.findall(told, (ROOT / name).read_text("utf-8"))
        in_code |= {one or other for one, other in found} - NO_KINDS
    dirt = (ROOT / "extras" / "find_dirt.py").read_text("utf-8")
    in_code |= {
        kind
        for pair in re.findall(r'^        "(\w+)",|"([a-z]+-[a-z]+): ', dirt, re.MULTILINE)
        for kind in pair
        if kind
    }
    page = TEXTS["docs/troubleshooting.md"]
    cells = re.findall(r"^\| (`.+?) \|", page[page.index("## Data problems") :], re.MULTILINE)
    assert {kind for cell in cells for kind in re.findall(r"`([a-z-]+)`", cell)} == in_code


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
    return re.sub(r" +", " ", text).strip()


def test_readme_shows_the_results_that_are_kept(capsys):
    run = kept("test_results.json")
    test_model.print_report(run["summary"], run["results"])
    printed = [one_spaced(line) for line in capsys.readouterr().out.splitlines()]
    start = README[README.index("```text\npassed") + 8 :]
    step_5 = README[README.index("```bash\npython test_model.py\n```") :]
    step_5 = step_5[step_5.index("```text\n") + 8 :]
    for shown in (start, step_5):
        lines = [one_spaced(line) for line in shown[: shown.index("\n```")].splitlines()]
        lines = [line for line in lines if line not in ("[...]", "") and not line.startswith(("Results:", "Next:"))]
        assert len(lines) >= 2 and [line for line in lines if line not in printed] == []


def test_readme_s_question_and_answer_are_those_of_the_kept_run():
    question, answer = re.search(r'Asked "(.+?)", the base model said: "(.+?)"', " ".join(README.split())).groups()
    case = next(row for row in kept("test_results.json")["results"] if row["question"] == question)
    assert answer == " ".join(case["base_generated"].split())


def rounds_table(rounds: dict[str, dict]) -> list[list[str]]:
    """Return the table of the rounds, as the documents show it: passed cases by category and round."""
    rows = [["passed", "round 1", *rounds]]
    first = next(iter(rounds.values()))["cases"]
    for name in [*first["categories"], "all", "fresh cases"]:
        summaries = [run["fresh" if name == "fresh cases" else "cases"] for run in rounds.values()]
        figures = [summary["categories"].get(name, summary) for summary in summaries]
        sides = [figures[0]["base"], *(of["fine_tuned"] for of in figures)]
        rows.append([name, *(f"{side['passed']} of {side['cases']}" for side in sides)])
    return rows


def tables_in(text: str) -> list[list[list[str]]]:
    found = re.findall(r"(?:^\|.+\|\n)+", text, flags=re.MULTILINE)
    tables = [[[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()] for table in found]
    return [[row for row in table if not row[0] or not set(row[0]) <= set("-: ")] for table in tables]


def test_the_rounds_are_those_of_the_kept_runs():
    rounds = kept("rounds.json")
    assert rounds_table(rounds) in tables_in(TEXTS["docs/iterating.md"])
    step_6 = README[README.index("### Step 6") : README.index("### Step 7")]
    assert rounds_table({"round 2": rounds["round 2"]}) in tables_in(step_6)


def test_the_figures_of_other_seeds_are_those_of_the_kept_runs():
    summaries = [kept("test_results.json")["summary"], *kept("seeds.json")]
    table = [["", "README's run", *(f"seed {number}" for number in range(1, 5))]]
    of_format = [summary["categories"]["format"]["fine_tuned"] for summary in summaries]
    table.append(["format", *(f"{side['passed']} of {side['cases']}" for side in of_format)])
    table.append(["all", *(f"{of['fine_tuned']['passed']} of {of['cases']}" for of in summaries)])
    assert table in tables_in(TEXTS["docs/iterating.md"])
    assert all(side["passed"] >= 0.9 * side["cases"] for side in of_format), "the format holds with every seed"


def test_readme_s_figures_of_the_second_dataset_are_those_of_the_kept_run():
    summary = kept("education.json")
    sides = [f"{summary[side]['passed']} of {summary['cases']}" for side in ("fine_tuned", "base")]
    text = " ".join((README + TEXTS["examples/education/README.md"]).split())
    assert text.count(f"passes {sides[0]} test cases, its base model {sides[1]}") == 2


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
    billed = int(re.search(r"^Examples +204, of ([\d,]+) tokens", README, re.MULTILINE)[1].replace(",", "")) * 3
    costs = TEXTS["docs/providers.md"]
    costs = costs[costs.index("## What it costs") :]
    assert f"{billed:,} tokens" in costs and "2026-07" in costs
    shown = re.findall(r"^\| `(.+?)` \| \$([\d.]+) \|.*\| \$([\d.]+) \|$", costs, flags=re.MULTILINE)
    prices = {name: price for name, price in fine_tune.PRICES.items() if price}
    assert shown == [(name, f"{prices[name]:.2f}", f"{billed * prices[name] / 1e6:.2f}") for name in sorted(prices)]


def test_the_snippets_of_the_steps_run(tiny_api, tmp_path, monkeypatch, capsys):
    """README's plain SDK lines, one after the other, as one program that does not wait as long between two looks."""
    lab = README[README.index("## The lab") : README.index("## Your own dataset")]
    code = "import json, time\nfrom openai import OpenAI\n\nclient = OpenAI()\n"
    code += "".join(re.findall(r"```python\n(.+?)```", lab, re.DOTALL)).replace("smollm2-135m-instruct", "tiny")
    assert "time.sleep(5)" in code
    rows = (ROOT / "training_data.jsonl").read_bytes().splitlines(keepends=True)[:10]
    (tmp_path / "training_data.jsonl").write_bytes(b"".join(rows))
    monkeypatch.chdir(tmp_path)
    for name, value in tiny_api.settings("tiny").items():
        monkeypatch.setenv(name, value)
    exec(code.replace("time.sleep(5)", "time.sleep(0.1)"), {})
    out = capsys.readouterr().out
    assert "ft:tiny:" in out and "fails" in out
    assert json.loads((tmp_path / "rows.jsonl").read_text("utf-8"))["messages"]


def test_the_dates_of_the_wind_down_stand_in_one_place():
    row = re.search(r"\*\*OpenAI\*\* is ending\s+it.+?2027-01-14", README, flags=re.DOTALL)[0]
    for day in ("2026-05-07", "2026-07-02", "2027-01-06", "2027-01-14"):
        found = [name for name, text in TEXTS.items() if day in re.sub(r"^\| ….+$", "", text, flags=re.MULTILINE)]
        assert day in row and found == ["README.md"], day


def test_providers_are_the_same_everywhere():
    example = (ROOT / ".env.example").read_text("utf-8")
    assert len(set(re.findall(r"OPENAI_BASE_URL=(\S+)", example))) == 4
    titles = re.findall(r"^## (.+)$", TEXTS["docs/providers.md"], flags=re.MULTILINE)
    providers = titles[: titles.index("Others")]
    assert len(providers) == 5
    for title in providers:
        assert title.split(",")[0].lower() in example.lower(), title


def test_hyperparameters_page_states_the_trainer_s_numbers():
    from local_api import step, train

    page = " ".join(TEXTS["docs/hyperparameters.md"].split())
    assert f"batch size {train.AUTO_BATCH_SIZE}, multiplier {train.AUTO_LEARNING_RATE_MULTIPLIER}" in page
    assert f"a learning rate of {step.BASE_LEARNING_RATE}" in page and f"rank {step.LORA['r']}" in page
    assert f"the first {step.WARMUP_SHARE:.0%} of the steps" in page


# ---------------------------------------------------------------- code and data in the documents


def test_the_example_of_an_application_runs(tiny_api, monkeypatch, capsys):
    page = TEXTS["docs/deployment.md"]
    code = re.search(r"<!-- run by the tests -->\n```python\n(.+?)```", page, re.DOTALL)[1]
    assert datasets.SYSTEM_PROMPT in code
    for name, value in {
        **tiny_api.settings("tiny"),
        "FINE_TUNED_MODEL": "ft:tiny:local::gone",
        "FALLBACK_MODEL": "tiny",
    }.items():
        monkeypatch.setenv(name, value)
    exec(code, {"__name__": "__main__"})
    first, *answer = capsys.readouterr().out.splitlines()
    assert first.startswith("ft:tiny:local::gone: ") and "404" in first and answer


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
    cases, _ = test_model.read_cases(TECHFLOW / "fresh_cases.json")  # it refuses a case whose own answer fails
    assert all(case["checks"] for case in cases)
    trained = [row for name in ("qa_pairs.json", *LATER_ROUNDS) for row in load(name)]
    seen = [text for row in [*trained, *datasets.cases(TECHFLOW)] for text in datasets.said(row, "user")]
    for case, text in itertools.product(load("fresh_cases.json")["cases"], seen):
        assert all(datasets.jaccard(asked, text) < 0.6 for asked in datasets.said(case, "user")), (case["id"], text)


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
