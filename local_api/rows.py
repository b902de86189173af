"""Reads JSON Lines as an upload holds them: each row with its line, a Fault in the place of one that cannot be read."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

JSON = json.JSONEncoder(ensure_ascii=False)


class Fault(NamedTuple):
    kind: str
    message: str  # what is wrong and how to cure it, without a full stop


def read_rows(path: str | Path) -> Iterator[tuple[int, Any]]:
    """Yield each row of the file: its line (blank ones count and are no rows), and what the JSON says or a Fault.

    What makes the rest of the file worthless, a `broken-file`, ends it. OSError: no file.
    """
    with open(path, "rb") as file:
        is_first = True
        for number, line in enumerate(file, 1):
            text = line.removeprefix(b"\xef\xbb\xbf").strip(b" \t\r\n") if number == 1 else line.strip(b" \t\r\n")
            if not text:
                continue
            if is_first and text.startswith(b"["):
                value: Any = Fault("broken-file", "this is an array; an upload is JSON Lines, one object a line")
            else:
                value = parse(text)
            yield number, value
            if isinstance(value, Fault) and value.kind == "broken-file":
                return
            is_first = False
        if is_first:
            yield 1, Fault("broken-file", "the file is empty; see whether it was saved")


def parse(line: bytes) -> Any:
    """Return what one line of JSON says, or the Fault for which it cannot be taken."""
    try:
        text = line.decode()
        value = json.loads(text, object_pairs_hook=unique_keys, parse_float=finite, parse_constant=finite)
        if "\\u" in text:  # the one way in which half a character gets into UTF-8
            JSON.encode(value).encode()
        return value
    except UnicodeDecodeError as error:
        return Fault("broken-file", f"byte 0x{line[error.start]:02x} is not UTF-8; save the file as UTF-8")
    except UnicodeEncodeError:
        return Fault("lone-surrogate", "the text holds half of a character (\\ud800 to \\udfff); delete or mend it")
    except KeyError as error:
        return Fault("duplicate-key", f"the key {error.args[0]!r} stands twice; keep one")
    except json.JSONDecodeError as error:
        return Fault("invalid-json", f"{error.msg} at column {error.colno}; a line must be one JSON object")
    except (ValueError, RecursionError):  # an integer of thousands of digits is a ValueError too
        return Fault("invalid-json", "a number is not finite or too long, or the row is nested too deeply; mend it")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    """Return the object; KeyError with a key that it has twice."""
    row = dict(pairs)
    if len(row) < len(pairs):  # readers would take the last one without a word
        raise KeyError(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return row


def finite(number: str) -> float:
    """Return the number; ValueError for NaN, Infinity and what is larger than a float can be."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(number)
    return value
