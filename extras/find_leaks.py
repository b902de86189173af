"""Find the test cases whose questions stand in the training data: they test memory, not skill.

Needs   the training file of step 1 and the test cases of step 5, a .json or .jsonl file.
Leaves  everything as it is.
Omits   questions that are alike without being the same.

    python extras/find_leaks.py
    python extras/find_leaks.py my_data.jsonl --cases my_cases.jsonl
"""

import argparse
import json
import sys
from pathlib import Path

CASES = Path(__file__).parent.parent / "examples" / "techflow_support" / "test_cases.json"


def read_rows(path: Path) -> list[dict]:
    """Return the rows of JSON Lines, or the cases of {"cases": [...]}."""
    text = path.read_text("utf-8")
    if path.suffix == ".json":
        cases = json.loads(text)
        return cases["cases"] if isinstance(cases, dict) else cases
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def last_question(row: dict) -> str:
    """Return what is asked last in a case or a chat row, without blanks and case."""
    question = row.get("question")
    for message in row.get("messages", []):
        if message["role"] == "user":
            question = message["content"]
    return " ".join(str(question).casefold().split())


def find_leaks(training_file: Path, cases_file: Path) -> list[tuple[int, str]]:
    """Return (line of the training file, question) of each test case that was trained on."""
    lines = {last_question(row): n for n, row in enumerate(read_rows(training_file), start=1)}
    questions = map(last_question, read_rows(cases_file))
    return [(lines[question], question) for question in questions if question in lines]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Find test cases that were trained on.")
    add = parser.add_argument
    add("training_file", nargs="?", type=Path, default="training_data.jsonl", help="of step 1")
    add("--cases", type=Path, default=CASES, metavar="FILE", help="default: TechFlow's")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    try:
        leaks = find_leaks(args.training_file, args.cases)
    except (OSError, ValueError, LookupError) as error:
        sys.exit(f"{args.training_file} or {args.cases} cannot be read: {error!r}.")
    for line, question in leaks:
        print(f"{args.training_file}:{line}: a test case asks this, too: {question:.60}")
    if leaks:
        sys.exit(f"Delete these {len(leaks)} rows, or write other test cases.")
    print("No test case stands in the training data.")


if __name__ == "__main__":
    main()
