"""Find what a model should not learn to write: leftovers of other formats in the training data.

Needs   the training file of step 1.
Leaves  everything as it is; the original data is what you mend.
Omits   what step 1 calls an error, and what the strict judge finds: python -m local_api --check.

    python extras/find_dirt.py
    python extras/find_dirt.py my_data.jsonl --all
"""

import argparse
import json
import re
import sys
from pathlib import Path

NO_ANSWERS = {"nan", "none", "null", "#n/a", "n/a", "tbd", "todo"}
RULES = [  # the kind, what finds it in a text, the cure
    (
        "html",
        r"&(?:[a-zA-Z]{2,8}|#x?\w+);|"
        r"</?(?:p|br|div|span|b|i|em|strong|h\d|[uo]l|li|a|img|t[rdh]|code)(?: [^<>]*=[^<>]*)?/?>",
        "the model will write such marks too: take them out",
    ),
    (
        "mojibake",  # "Itâ€™s", "schÃ¶n"
        r"â€.|[ÃÂ][\x80-\xbf„–œŸ€‰]|ðŸ",
        "it was read in a wrong encoding: read it as UTF-8 and save it anew",
    ),
]
# The formats of older models ended every prompt and every answer with a mark, or began it with
# a blank. Either pattern always matches, mostly an empty text. The second: where it is looked for.
EDGES = [
    (r"\A\s*", slice(20)),
    (r"(?:\s*(?:#+|[-=]+>)|\s+(?:END|STOP))?\s*\Z", slice(-20, None)),
]


def read_rows(path: Path) -> list[list[str]]:
    """Return the texts of each row of a training file, mostly [..., question, answer]."""
    rows = []
    for line in path.read_text("utf-8").rstrip("\n").split("\n"):
        messages = json.loads(line)["messages"]
        rows.append([str(message.get("content") or "") for message in messages])
    return rows


def find_in_rows(rows: list[list[str]]) -> dict[str, list[int]]:
    """Return the lines that have a kind of dirt, by "kind: cure"."""
    found: dict[str, list[int]] = {}
    for line, texts in enumerate(rows, start=1):
        if texts[-1].strip().lower() in NO_ANSWERS:
            what = "placeholder-answer: it stands for no answer: write one, or delete the row"
            found.setdefault(what, []).append(line)
        for kind, pattern, cure in RULES:
            if any(re.search(pattern, text) for text in texts):
                found.setdefault(f"{kind}: {cure}", []).append(line)
    return found


def common_marks(rows: list[list[str]]) -> list[str]:
    """Return a sentence for each mark with which all questions, or all answers, begin or end."""
    sentences = []
    for name, at in (("question", -2), ("answer", -1)):
        texts = [row[at] for row in rows if len(row) > 1]
        for pattern, part in EDGES:
            marks = {re.findall(pattern, text[part])[0] for text in texts}
            if len(marks) == 1 and marks != {""}:
                sentences.append(f"common-mark: each {name} has {marks.pop()!r}: take it out")
    return sentences


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Find leftovers of other formats.")
    add = parser.add_argument
    add("training_file", nargs="?", type=Path, default="training_data.jsonl", help="of step 1")
    add("--all", action="store_true", help="print every line, not the first three of a kind")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    try:
        rows = read_rows(args.training_file)
        found, marks = find_in_rows(rows), common_marks(rows)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        sys.exit(f"{args.training_file} cannot be read: {error!r}. (Step 1 makes training files.)")
    for mark in marks:
        print(f"{args.training_file}: warning: {mark}")
    for what, lines in found.items():
        shown = lines if args.all else lines[:3]
        places = ", ".join(map(str, shown)) + (", ..." if len(shown) < len(lines) else "")
        print(f"{args.training_file}: warning: {what} ({len(lines):,} rows: lines {places})")
    if found or marks:
        sys.exit("Mend your data, and run step 1 again.")
    print(f"{args.training_file}: no dirt in {len(rows):,} rows.")


if __name__ == "__main__":
    main()
