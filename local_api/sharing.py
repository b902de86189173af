"""How the processes that train one job together share a batch: all compute as many parts, and none is too large.

The tokens that the whole batch trains go with each part, so that the loss is their mean however the batch was cut.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .encoding import Encoded
from .step import padded


class Part(NamedTuple):
    """What one process computes at once: some rows of a batch, and how many tokens the whole batch trains."""

    rows: list[Encoded]
    batch_tokens: int


def cut(rows: list[Encoded], processes: int, tokens_at_once: int) -> int:
    """Return into how many parts each process cuts its share of these rows, so that no part has too many tokens."""
    rows_at_once = max(1, tokens_at_once // max(len(row.ids) for row in rows))
    return math.ceil(len(rows) / processes / rows_at_once)


def share(rows: list[Encoded], parts: int, process: int, processes: int) -> list[Part]:
    """Return this process's parts of a batch. A part that no row is left for gets one that trains nothing.

    All processes must compute the same number of parts: each waits for the others' gradients.
    """
    tokens = sum(sum(row.trained[1:]) for row in rows)
    nothing = [Encoded(rows[0].ids, [False] * len(rows[0].ids))]
    return [Part(rows[n :: parts * processes] or nothing, tokens) for n in range(process, parts * processes, processes)]


def tensors(parts: list[Part]) -> dict[str, Any]:
    """Return a part as the model takes it."""
    [part] = parts
    ids, trained = padded(part.rows)
    return {"input_ids": ids, "trained": trained, "batch_tokens": part.batch_tokens}
