"""Products with weights that do not change: several ways to compute the same, and which is the quickest here.

oneDNN multiplies by weights that lie in memory in an order of its own. What that brings depends on the processor, the
precision and the number of rows: from half the time to none of it, and for a single row it may cost time.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear

Product = Callable[[Any], Any]  # x (..., inputs) -> x W' + bias (..., outputs)
ROUNDS = 3  # the best counts: whatever else runs can only slow one down
SAMPLE = 3  # weights that a way is measured on
WORTH = 1.15  # a way that keeps weights of its own, which takes memory, must be so much quicker
ROWS = {"one row": 1, "a few": 8, "many": 64}  # what is measured; a few are up to FEW
FEW = 16
# The thread's own time, from which others on the processor take nothing; on Windows it is too coarse.
clock = time.perf_counter if os.name == "nt" else time.thread_time
CHOSEN: dict[tuple, dict[str, str]] = {}
log = logging.getLogger("local_api")


def plain(weight: Any, bias: Any = None, rows: int = 1) -> Product:
    return lambda x: linear(x, weight, bias)


def packed(weight: Any, bias: Any = None, rows: int = 1) -> Product:
    """The weights lie in memory in the order in which oneDNN reads them for so many rows."""
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, laid_out, bias, "none", [], "")


def vector(weight: Any, bias: Any = None, rows: int = 1) -> Product:
    """For a single row: a matrix times a vector."""

    def product(x: Any) -> Any:
        y = torch.mv(weight, x.reshape(-1))
        return (y if bias is None else y + bias).view(*x.shape[:-1], -1)

    return product


WAYS: dict[str, Callable[..., Product]] = {"plain": plain, "packed": packed, "vector": vector}


class Frozen(NamedTuple):
    """Products with one weight W for training: forward is x -> x W', backward is g -> g W."""

    forward: Product
    backward: Product


def frozen(weight: Any, rows: int) -> Frozen:
    """Return the products with a weight (outputs, inputs) for about so many rows.

    In bfloat16 oneDNN's order halves the time; in float32 it saves none. It is not measured here: the same seed is to
    give the same adapter, to the last bit.
    """
    way = packed if weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported() else plain
    return Frozen(way(weight, rows=rows), way(weight.t(), rows=rows))


# --- answering: measured ---


class QuickLinear(torch.nn.Module):
    """A linear layer that multiplies one row, a few and many in the ways that were found to be the quickest."""

    def __init__(self, layer: Any, chosen: dict[str, str]):
        super().__init__()
        made = {way: WAYS[way](layer.weight.detach(), layer.bias) for way in set(chosen.values())}
        self.one, self.few, self.many = (made[chosen[rows]] for rows in ROWS)

    def forward(self, x: Any) -> Any:
        rows = x.numel() // x.shape[-1]
        return (self.one if rows == 1 else self.few if rows <= FEW else self.many)(x)


def quicken(model: Any) -> None:
    """Replace a model's linear layers by quick ones; model.copied_bytes tells what weights take that are kept twice."""
    kinds: dict[tuple, list[tuple]] = {}
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is torch.nn.Linear:
                kinds.setdefault(tuple(child.weight.shape), []).append((parent, name, child))
    model.copied_bytes = 0
    for places in kinds.values():
        layers = [layer for _, _, layer in places]
        chosen = choose(layers)
        if "packed" in chosen.values() and len(set(chosen.values())) > 1:
            model.copied_bytes += sum(layer.weight.nbytes for layer in layers)
        for parent, name, layer in places:
            setattr(parent, name, QuickLinear(layer, chosen))


def choose(layers: Sequence[Any]) -> dict[str, str]:
    """Return the quickest way for each number of rows, for some layers of one shape; measured once in a process."""
    weight = layers[0].weight
    kind = (*weight.shape, weight.dtype)
    if kind not in CHOSEN:
        rows = dict(ROWS)
        if len(layers) == 1:  # the output layer, which meets a row for each answer
            rows["many"] = rows["a few"]
        with torch.inference_mode():
            ways = {number: quickest(layers[:SAMPLE], number) for number in set(rows.values())}
        CHOSEN[kind] = {words: ways[number] for words, number in rows.items()}
        choice = ", ".join(f"{words} {way}" for words, way in CHOSEN[kind].items())
        log.info("Products with %d x %d weights: %s.", *weight.shape, choice)
    return CHOSEN[kind]


def quickest(layers: Sequence[Any], rows: int) -> str:
    """Return the name of the quickest way to multiply `rows` rows by the weights of each of some layers.

    Several, one after the other: the weights of one alone would stay in the processor's cache, as no model's do.
    """
    x = torch.linspace(-1, 1, rows * layers[0].weight.shape[1]).view(rows, -1).to(layers[0].weight.dtype)
    exact = linear(x.float(), layers[0].weight.float())
    ways, seconds = {}, {}
    for name, way in WAYS.items():
        if name == "vector" and rows > 1:
            continue
        try:
            products = [way(layer.weight.detach()) for layer in layers]
            wrong = (products[0](x).float() - exact).abs().max() / exact.abs().max()
        except (RuntimeError, AttributeError):  # this processor, or this build of PyTorch, has no such product
            continue
        if name == "plain" or wrong < max(1e-5, torch.finfo(x.dtype).eps):  # float32 sums, as all of them should have
            ways[name], seconds[name] = products, math.inf
    for _ in range(ROUNDS):
        for name, products in ways.items():
            started = clock()
            for product in products:
                product(x)
            seconds[name] = min(seconds[name], (clock() - started) * (WORTH if name == "packed" else 1))
    return min(seconds, key=seconds.__getitem__)
