"""Step 5: is the fine-tuned model better than its base model, and how sure are we?

Needs   a server (.env), the job's record (steps 2 and 3), and test cases that were not trained on.
Leaves  test_results.json: every answer, check and figure. test_answers.jsonl: the answers alone, so
        that a run that was stopped goes on, and a repetition is free; delete it to ask anew.
Omits   similarity by embeddings; a judge model and a web page of the results are in extras/.

    python test_model.py                                    # the model of the latest job
    python test_model.py --cases my_cases.jsonl             # cases of your own
    python test_model.py ftjob-abc123 --min-pass-rate 0.9   # an earlier job's model; for CI
"""

try:
    import argparse
    import json
    import math
    import os
    import re
    import sys
    from concurrent.futures import ThreadPoolExecutor
    from difflib import get_close_matches
    from pathlib import Path
    from threading import Lock

    import openai
    from dotenv import load_dotenv
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is missing: activate .venv, or pip install -r requirements.txt")
except KeyboardInterrupt:  # the imports take half a second
    raise SystemExit(130) from None

CASES_FILE = Path(__file__).parent / "examples" / "techflow_support" / "test_cases.json"
JOURNAL = Path("test_answers.jsonl")
PARAMETERS: dict = {"temperature": 0, "seed": 42, "max_tokens": 400}  # the likeliest words
AT_ONCE_LOCALLY, AT_ONCE = 16, 6  # the local API writes sixteen answers in one batch
CASE_KEYS = {"id", "category", "system", "history", "question", "answer", "messages", "checks"}
# The checks that a case may have: does the answer pass, and what is said of it if not.
CHECKS: dict[str, tuple] = {
    "contains": (lambda answer, text: text.lower() in answer.lower(), 'does not contain "{}"'),
    "not_contains": (lambda answer, text: text.lower() not in answer.lower(), 'contains "{}"'),
    "matches": (lambda answer, regex: re.search(regex, answer, re.I | re.M), "does not match /{}/"),
    "max_chars": (lambda answer, most: len(answer) <= most, "is longer than {} characters"),
}
NO_ANSWER = {"text": "", "finish_reason": None, "error": None}
UNFINISHED = {"length": "was cut off at max_tokens", "content_filter": "was cut by a filter"}
SIDES = ("base", "fine_tuned")
OUTCOMES = {(1, 0): "broken", (0, 1): "fixed", (0, 0): "still failing", (1, 1): "still passing"}


# --- The same in the four scripts that talk to a server (a test keeps it the same) ---
def connect(**options) -> openai.OpenAI:
    """Return a client of the server that .env or the environment names."""
    load_dotenv()
    key, url = os.environ.get("OPENAI_API_KEY"), os.environ.get("OPENAI_BASE_URL")
    if not key and not url:
        sys.exit("No server is named: copy .env.example to .env, or set OPENAI_API_KEY (OpenAI).")
    return openai.OpenAI(api_key=key or "-", base_url=url or "https://api.openai.com/v1", **options)


def explain(error: Exception) -> str:
    """Return one sentence: what the server answered and the cure, without the key."""
    host, key = os.environ.get("OPENAI_BASE_URL") or "OpenAI", os.environ.get("OPENAI_API_KEY", "")
    if isinstance(error, openai.APIConnectionError):
        return f"No answer from {host}. Is it running? (Local API: python -m local_api)"
    said, code = str(error), getattr(error, "status_code", "nonsense, or a file here is broken")
    if isinstance(body := getattr(error, "body", None), dict):
        said = str(body.get("message") or said)
    said = said.replace(key, "[key]") if len(key) > 8 else said  # "local" is no secret
    cures: dict = {401: "check OPENAI_API_KEY", 404: "check name and URL", 429: "see your limits"}
    return f"{host} answered {code}: {said} ({cures.get(code, 'mend that, or try again')})"


def read_job(name: str | None = None) -> dict:
    """Return the record of the job with this id or model, or of the latest job; {}: none."""
    latest, earlier = Path().glob("fine_tune_job.json"), Path().glob("fine_tune_jobs/*.json")
    for path in [*latest, *(sorted(earlier) if name else [])]:
        job = json.loads(path.read_text("utf-8"))
        if name in (None, job["job_id"], job["fine_tuned_model"], *job.get("checkpoints", [])):
            return job
    return {}


# --- End of what is the same. ---


def read_cases(path: Path) -> tuple[list[dict], list[dict]]:
    """Return the test cases and the success criteria of a .json file (a list of cases, or an object
    with `cases` and what they share), or of a .jsonl file (a case or a chat row a line)."""
    if path.suffix == ".csv":
        sys.exit(f"{path} is a table: python prepare_training_data.py {path} -o cases.jsonl first.")
    try:
        text = path.read_text("utf-8-sig").strip()
        if path.suffix == ".jsonl":  # read as one list, so that an error names its line
            text = "[" + re.sub(r"\n(?=[ \t]*\S)", ",\n", text) + "]"
        rows = json.loads(text)
        shared = rows if "cases" in rows else {"cases": rows}
        for of in shared.get("criteria", []):  # so that slips are found before anything is asked
            apply_checks([of.get("checks", {})], f"{of['name']}, {of['min_pass_rate']:.0%}")
    except (OSError, ValueError, AttributeError, KeyError, TypeError, re.error) as error:
        sys.exit(f"{path} cannot be read ({error!r}). Name a file of test cases with --cases.")
    cases, unknown, unchecked = [], set(), 0
    for number, row in enumerate(shared["cases"], 1):
        try:
            case = read_case(row, shared, f"case-{number}")
            graded = grade(case, {**NO_ANSWER, "text": case["expected"] or ""})
        except (AttributeError, IndexError, KeyError, TypeError, re.error) as error:
            known = f"{', '.join(sorted(CASE_KEYS))}; checks: {', '.join(CHECKS)}"
            sys.exit(f"{path}: case {number} cannot be read ({error!r}). `cases` have: {known}.")
        if graded["problem"] and (case["expected"] or not graded["checks"]):
            sys.exit(f"{path}: the expected answer of {case['id']} itself {graded['problem']}.")
        unchecked += not graded["checks"]  # True counts as 1
        unknown |= row.keys() - CASE_KEYS
        cases.append(case)
    if unknown:
        print(f"Ignored keys, which mean nothing in a test case: {', '.join(sorted(unknown))}")
    if unchecked:
        print(f'{unchecked} cases pass only word for word: add "checks" to judge them by more.')
    return cases, shared.get("criteria", [])


def read_case(row: dict, shared: dict, name: str) -> dict:
    """Return a case, or a chat row, in the one form that the rest of this script knows."""
    turns = list(row.get("messages", row.get("history", [])))
    case = {"id": str(row.get("id", name)), "category": row.get("category", "all")}
    case |= {"system": row.get("system", shared.get("system")), "expected": row.get("answer")}
    if "question" in row:
        turns.append({"role": "user", "content": row["question"]})
    if turns[0]["role"] in ("system", "developer"):
        case["system"] = turns.pop(0)["content"]
    if turns[-1]["role"] == "assistant":  # a chat row's last answer is the expected one
        case["expected"] = turns.pop()["content"]
    # Only role and content are sent: servers refuse a training row's weight.
    turns = [{"role": turn["role"], "content": turn["content"].strip()} for turn in turns]
    checks = [shared.get("checks", {}), row.get("checks", {})]
    return {**case, "history": turns[:-1], "question": turns[-1]["content"], "checks": checks}


class ModelTester:
    """Asks two models the same cases (as read_cases() returns them) and grades their answers."""

    def __init__(self, model: str, base_model: str):
        self.model, self.base_model, self.answers, self.lock = model, base_model, {}, Lock()
        # 300 seconds: a laptop writes sixteen answers at a time. The SDK retries what may recover.
        self.client = connect(timeout=300, max_retries=4)
        if JOURNAL.exists():
            for line in JOURNAL.read_text("utf-8").splitlines():
                entry = json.loads(line)
                self.answers[entry["asked"]] = entry["answer"]

    def run_test_cases(self, cases: list[dict]) -> list[dict]:
        """Return one result a case, as in test_results.json."""
        # One model after the other, so that a local server fills its batches with one of them.
        base_answers = self.ask_all(self.base_model, cases)
        answers = self.ask_all(self.model, cases)
        results = []
        for case, base_answer, answer in zip(cases, base_answers, answers, strict=True):
            base, tuned = grade(case, base_answer), grade(case, answer)
            outcome = OUTCOMES[base["passed"], tuned["passed"]]  # True counts as 1
            texts = {"generated": tuned.pop("text"), "base_generated": base.pop("text")}
            results.append({**case, **texts, "outcome": outcome, "fine_tuned": tuned, "base": base})
        return results

    def generate_answer(self, question: str, system: str | None = None) -> str:
        """Return the fine-tuned model's answer to one question."""
        return self.ask(self.model, {"question": question, "system": system, "history": []})["text"]

    def ask_all(self, model: str, cases: list[dict]) -> list[dict]:
        """Return a model's answers to the cases, in their order, asked for several at a time."""
        print(f"Asking {model} ...", flush=True)
        before = len(self.answers)
        is_local = re.match(r"https?://(localhost|127\.)", str(self.client.base_url))
        pool = ThreadPoolExecutor(AT_ONCE_LOCALLY if is_local else AT_ONCE)
        answers = list(pool.map(lambda case: self.ask(model, case), cases))
        asked = len(self.answers) - before + sum(answer["error"] is not None for answer in answers)
        print(f"  {len(cases) - asked} answers from {JOURNAL}, {asked} asked")
        return answers

    def ask(self, model: str, case: dict) -> dict:
        """Return {"text", "finish_reason", "error"}, from the journal or from the model."""
        messages = [*case["history"], {"role": "user", "content": case["question"]}]
        if case["system"]:
            messages.insert(0, {"role": "system", "content": case["system"]})
        request = {"model": model, "messages": messages, **PARAMETERS}
        key = json.dumps([str(self.client.base_url), request], sort_keys=True)
        if key in self.answers:
            return self.answers[key]
        try:
            completion = self.client.chat.completions.create(**request)
        except openai.APIStatusError as error:
            if error.status_code in (401, 403, 404, 429):  # every other call would fail alike
                raise
            return {**NO_ANSWER, "error": explain(error)}
        text = completion.choices[0].message.content or ""  # null where a server filtered it
        answer = {**NO_ANSWER, "text": text, "finish_reason": completion.choices[0].finish_reason}
        with self.lock, JOURNAL.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"asked": key, "answer": answer}) + "\n")
            self.answers[key] = answer
        return answer


def apply_checks(groups: list[dict], answer: str) -> list[dict]:
    """Return [{"check", "name", "value", "passed", "problem"}], one for each entry of a check."""
    results = []
    for group in groups:
        for check, items in group.items():
            passes, sentence = CHECKS[check]
            for item in items if isinstance(items, list) else [items]:
                name, value, problem = None, item, sentence.format(item)
                if isinstance(item, dict):  # {"pattern": ..., "name": "refers to the project"}
                    name, value, problem = item["name"], item["pattern"], f"fails: {item['name']}"
                passed = bool(passes(answer, value))
                result = {"check": check, "name": name, "value": value, "passed": passed}
                results.append({**result, "problem": "" if passed else problem})
    return results


def grade(case: dict, answer: dict) -> dict:
    """Return the answer with "passed", "problem" (why not), and "checks" added."""
    # A model that thinks aloud is graded by what it says after that.
    text = re.sub(r"(?s)\A(\s*<think>)?.*?</think>\s*", "", answer["text"])
    checks = apply_checks(case["checks"], text)
    problems = [answer["error"], UNFINISHED.get(answer["finish_reason"])]
    said, expected = text.casefold().split(), (case["expected"] or "").casefold().split()
    earlier = [turn["content"].casefold().split() for turn in case["history"]]
    repeated = get_close_matches(said, earlier, n=1, cutoff=0.85)  # nearly the same words
    if repeated and not get_close_matches(expected, earlier, n=1, cutoff=0.85):
        problems.append("repeats an earlier turn")
    if not checks and said != expected:  # blanks and capitals do not count, signs do: -5 is no 5
        problems.append("is not the expected answer, word for word")
    if not text.strip():
        problems.append("is empty")
    problem = "; ".join(filter(None, problems + [check["problem"] for check in checks]))
    return {**answer, "text": text, "passed": not problem, "problem": problem, "checks": checks}


def wilson_interval(passed: int, cases: int) -> tuple[float, float]:
    """Return the 95 % interval of a pass rate (Wilson 1927): right for few cases, too."""
    if not cases:
        return 0.0, 1.0
    rate, z2 = passed / cases, 1.959964**2
    middle = (rate + z2 / (2 * cases)) / (1 + z2 / cases)
    half = math.sqrt(z2 * (rate * (1 - rate) / cases + z2 / (4 * cases**2))) / (1 + z2 / cases)
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar_exact(fixed: int, broken: int) -> float:
    """Return McNemar's two-sided p-value: only cases that one model passes and the other fails tell
    them apart; were both as good, each would be a coin toss, and p says how often coins do that."""
    tail = sum(math.comb(fixed + broken, k) for k in range(min(fixed, broken) + 1))
    return min(1.0, 2 * tail / 2 ** (fixed + broken))


def measure(results: list[dict]) -> dict:
    """Return the figures of both models; a missing answer is a failed case."""
    figures = {}
    for side in SIDES:
        passed, cases = sum(result[side]["passed"] for result in results), len(results)
        figures[side] = {"passed": passed, "cases": cases, "pass_rate": passed / max(1, cases)}
        figures[side]["interval"] = wilson_interval(passed, cases)
    return figures


def summarise(results: list[dict], criteria: list[dict]) -> dict:
    """Return the summary of test_results.json: the verdict, and the figures behind it."""
    outcomes: dict[str, list] = {name: [] for name in OUTCOMES.values()}
    categories: dict[str, list] = {}
    for result in results:
        outcomes[result["outcome"]].append(result["id"])
        categories.setdefault(result["category"], []).append(result)
    for criterion in criteria:
        wanted, passed = criterion.get("category"), 0
        chosen = categories.get(wanted, []) if wanted else results
        for result in chosen:  # a criterion's own checks count instead of the case's
            checks = [criterion["checks"]] if "checks" in criterion else result["checks"]
            answer = {**result["fine_tuned"], "text": result["generated"]}
            passed += grade({**result, "checks": checks}, answer)["passed"]
        enough = len(chosen) >= criterion.get("min_cases", 1)
        met = enough and passed >= criterion["min_pass_rate"] * len(chosen)
        criterion |= {"passed": passed, "cases": len(chosen), "met": met}
    errors = [r[side]["error"] for r in results for side in SIDES if r[side]["error"]]
    fixed, broken = len(outcomes["fixed"]), len(outcomes["broken"])
    p, verdict, why = mcnemar_exact(fixed, broken), "no difference shown", "this can be luck"
    if fixed + broken < 6:  # p < 0.05 is out of reach, even if all of them fall on one side
        verdict, why = "not enough cases", "fewer than six changes cannot show a difference"
    if p < 0.05:
        verdict, why = "better" if fixed > broken else "worse", "this is more than luck"
    if errors:
        verdict, why = "incomplete", f"{len(errors)} calls failed: {errors[0]}"
    counts = f"{fixed} fixed and {broken} broken of {len(results)} cases, p = {p:.2g}"
    summary: dict = {"verdict": verdict, "sentence": f"{counts} (McNemar's exact test): {why}."}
    summary |= {"p_value": p, "failed_calls": len(errors), "cases": len(results), **outcomes}
    by_category = {name: measure(rows) for name, rows in categories.items()}
    return {**summary, **measure(results), "categories": by_category, "criteria": criteria}


def print_report(summary: dict, results: list[dict]) -> None:
    """Print the pass rates, what broke and why, the verdict, and the success criteria."""
    other = "other model" if summary["base_model"].startswith("ft:") else "base model"
    print(f"\n{'passed':<16}{other:>20}{'fine-tuned':>20}")
    for name, of in {**summary["categories"], "all": summary}.items():
        base, tuned = ("{passed} of {cases} {pass_rate:>5.0%}".format(**of[side]) for side in SIDES)
        print(f"{name:<16}{base:>20}{tuned:>20}")
    base, tuned = ("{:.0%} to {:.0%}".format(*summary[side]["interval"]) for side in SIDES)
    print(f"{'95% interval':<16}{base:>20}{tuned:>20}\n")
    for r in results:
        if r["outcome"] == "broken":
            print(f"Broken: {r['id']}: {r['question']:.60}\n    {r['fine_tuned']['problem']:.75}")
    print(f"Verdict: {summary['verdict']}. {summary['sentence']}\n")
    for of in summary["criteria"]:
        met, asked = "✓ met    " if of["met"] else "✗ not met", f"asked: {of['min_pass_rate']:.0%}"
        print(f"  {met}  {of['name']:<36}{of['passed']:>3} of {of['cases']} ({asked})")


def evaluate(args: argparse.Namespace) -> None:
    """Compare the two models, write what came of it, and say what to do next."""
    job = read_job(args.model)
    model, base_model = args.model, args.base_model or job.get("model")
    if model in (None, job.get("job_id")):
        model = job.get("fine_tuned_model")
    if not (model and base_model):
        sys.exit("No finished job is recorded: run steps 2 and 3, or MODEL --base-model NAME.")
    tester = ModelTester(model, base_model)
    cases, criteria = read_cases(args.cases)
    recorded = job.get("system_prompt")
    foreign = [case["system"] for case in cases if case["system"] not in (None, recorded)]
    if not recorded:
        print("System prompt: none recorded for this model; only that of the cases is sent.")
    elif foreign:
        print(f"Warning: {args.cases.name} is for another model: {foreign[0]:.60}...")
        print(f"    This one was trained for: {recorded:.60}... (--cases FILE)")
    for case in cases:
        case["system"] = case["system"] or recorded  # recorded: the one it was trained with
    results = tester.run_test_cases(cases)
    summary = {"model": model, "base_model": base_model, "parameters": PARAMETERS}
    summary |= {"cases_file": str(args.cases), **summarise(results, criteria)}
    document = json.dumps({"summary": summary, "results": results}, indent=2, ensure_ascii=False)
    Path(args.output).write_text(document + "\n", "utf-8")
    print_report(summary, results)
    print(f"\nResults: {args.output}")
    failing = [result for result in results if not result["fine_tuned"]["passed"]]
    if args.failures:
        lines = [json.dumps(result, ensure_ascii=False) + "\n" for result in failing]
        Path(args.failures).write_text("".join(lines), "utf-8")
        print(f"Failing cases: {args.failures}, to look at, never to train on")
    step_6 = "new rows for what fails, if anything (README, step 6), or docs/deployment.md"
    ask_for_them = "the same command with --failures failing_cases.jsonl (README, step 6)"
    print("Next:", ask_for_them if failing and not args.failures else step_6)
    if summary["failed_calls"]:
        sys.exit("The verdict is incomplete: the same command asks for the missing answers again.")
    if summary["fine_tuned"]["pass_rate"] < args.min_pass_rate:
        sys.exit(f"The pass rate is below --min-pass-rate {args.min_pass_rate}.")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare two models on test cases.")
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="model name or job id (default: the latest job)")
    add("--base-model", metavar="NAME", help="the other model (default: the job's base model)")
    add("--cases", type=Path, default=CASES_FILE, metavar="FILE", help="default: TechFlow's cases")
    add("--output", default="test_results.json", metavar="FILE", help="default: %(default)s")
    add("--failures", metavar="FILE", help="write the failing cases: to look at, never to train on")
    add("--min-pass-rate", type=float, metavar="R", default=0, help="0 to 1: below it, exit with 1")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    try:
        evaluate(args)
    except (openai.APIError, json.JSONDecodeError, AttributeError) as error:
        if isinstance(error, AttributeError) and not isinstance(error.obj, str | list | None):
            raise  # a slip in this script; only a server's nonsense gives a str, list or None
        sys.exit(explain(error))
    except KeyboardInterrupt:
        print(f"\nInterrupted. The same command goes on, from {JOURNAL}.", file=sys.stderr)
        os._exit(130)  # sys.exit() would wait for the calls under way


if __name__ == "__main__":
    main()
