"""Judges a job's files by the rules of prepare_training_data.py, the tutorial's first step: one source, not two."""

from pathlib import Path
from typing import Any

NAMES = {"training_file": "Training file", "validation_file": "Validation file"}


class JobFailed(Exception):
    """A job cannot go on; `error` is what it shows, in the API's fields."""

    def __init__(self, code: str, message: str, param: str | None = None):
        super().__init__(message)
        self.error: dict[str, Any] = {"code": code, "message": message, "param": param}


def validate(path: Path, param: str) -> None:
    """Raise JobFailed, with the API's code and a sentence, if a job cannot use this file.

    param: "training_file" or "validation_file", whichever the file is.
    """
    # The rules live in a script beside this package; imported here, since they cost nothing until the first job.
    from prepare_training_data import MIN_EXAMPLES, StepError, check_training_file

    try:
        report = check_training_file(str(path))
    except StepError as error:
        raise JobFailed(f"invalid_{param}", str(error).replace(str(path), NAMES[param]), param) from None
    errors = [problem for problem in report.problems if problem.level == "error"]
    in_lines = [problem for problem in errors if problem.line is not None]
    if in_lines:
        first, more = in_lines[0], f" (and {len(in_lines) - 1} more)" if len(in_lines) > 1 else ""
        raise JobFailed(f"invalid_{param}", f"Invalid file format. Line {first.line}: {first.message}{more}", param)
    if param == "training_file" and report.examples < MIN_EXAMPLES:
        few = f"Training file has {report.examples} example(s), but must have at least {MIN_EXAMPLES} examples"
        raise JobFailed("invalid_n_examples", few, param)
    if report.examples == 0 or (errors and report.examples >= MIN_EXAMPLES):
        raise JobFailed(f"invalid_{param}", f"Invalid file format. {(errors or report.problems)[0].message}", param)
