"""Judges training files: for a job, whose `validating_files` this is, and alone, by `python -m local_api --check FILE`.

Only what the file itself says counts here. What the base model makes of it, its length in the model's own tokens and
whether the chat template can express it, the trainer sees when it reads the file (local_api/encoding.py).
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from .rows import Fault, read_rows
from .rules import ADVISED_EXAMPLES, MIN_EXAMPLES, WARNINGS, judge


class JobFailed(Exception):
    """A job cannot go on; `error` is what it shows, in the API's fields."""

    def __init__(self, code: str, message: str, param: str | None = None):
        super().__init__(message)
        self.error: dict[str, Any] = {"code": code, "message": message, "param": param}


class Problem(NamedTuple):
    line: int | None  # None: of the file as a whole
    kind: str
    message: str

    @property
    def level(self) -> str:
        return "warning" if self.kind in WARNINGS else "error"


def judge_file(path: Path) -> tuple[int, list[Problem]]:
    """Return how many examples of a JSON Lines file can be trained on, and its problems. OSError: it cannot be read."""
    examples, problems = 0, []
    for line, value in read_rows(path):
        try:
            found = [Problem(line, *fault) for fault in judge(value)]
        except RecursionError:
            found = [Problem(line, *Fault("invalid-json", "the row is nested too deeply; make it flatter"))]
        examples += all(problem.level == "warning" for problem in found)
        problems += found
    return examples, problems


def validate(path: Path, param: str) -> None:
    """Raise JobFailed, with the API's code and a sentence, if a job cannot use this file.

    param: "training_file" or "validation_file", whichever the file is.
    """
    examples, problems = judge_file(path)
    errors = [problem for problem in problems if problem.level == "error"]
    if errors:
        first, more = errors[0], f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise JobFailed(f"invalid_{param}", f"Invalid file format. Line {first.line}: {first.message}{more}", param)
    if param == "training_file" and examples < MIN_EXAMPLES:
        few = f"Training file has {examples} example(s), but must have at least {MIN_EXAMPLES} examples"
        raise JobFailed("invalid_n_examples", few, param)


def check(path: Path) -> int:
    """Print every problem of a training file, a line each, and what follows from them; return the exit code."""
    examples, problems = judge_file(path)
    if examples < MIN_EXAMPLES:
        few = f"{examples} valid examples; training takes {MIN_EXAMPLES} or more"
        problems.append(Problem(None, "too-few-examples", few))
    elif examples < ADVISED_EXAMPLES:
        few = f"{examples} examples; with fewer than {ADVISED_EXAMPLES} little is learnt"
        problems.append(Problem(None, "few-examples", few))
    for problem in problems:
        place = path if problem.line is None else f"{path}:{problem.line}"
        print(f"{place}: {problem.level}: {problem.kind}: {problem.message}")
    errors = sum(problem.level == "error" for problem in problems)
    verdict = "This file cannot be trained on as it is."
    if not errors:
        verdict = "It can be uploaded; the job also looks at its length, and whether its base model knows tools."
    print(f"{path}: valid examples {examples:,}, errors {errors:,}, warnings {len(problems) - errors:,}. {verdict}")
    return 1 if errors else 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m local_api", description="Judge a training file, with no server.")
    parser.add_argument("--check", metavar="FILE", type=Path, required=True, help="JSON Lines, as it will be uploaded")
    args = parser.parse_args(argv)
    try:
        return check(args.check)
    except OSError as error:
        parser.error(f"{args.check}: {error.strerror}")
