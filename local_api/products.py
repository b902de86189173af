"""Products with weights that do not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear

Product = Callable[[Any], Any]  # x (rows, inputs) -> x W' (rows, outputs)


def plain(weight: Any) -> Product:
    return lambda x: linear(x, weight)


def packed(weight: Any, rows: int) -> Product:
    """The same with weights that lie in memory in the order in which oneDNN reads them for so many rows."""
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, laid_out, None, "none", [], "")


class Frozen(NamedTuple):
    """Products with one weight W for training: forward is x -> x W', backward is g -> g W."""

    forward: Product
    backward: Product


def frozen(weight: Any, rows: int) -> Frozen:
    """Return the products with a weight (outputs, inputs) for about so many rows.

    In bfloat16 oneDNN's order halves the time; in float32 it saves none. It is not measured here: the same seed is to
    give the same adapter, to the last bit.
    """
    if weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return Frozen(packed(weight, rows), packed(weight.t(), rows))
    return Frozen(plain(weight), plain(weight.t()))
