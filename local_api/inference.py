"""A model made quick to answer with on a processor. Nothing here changes what it says.

Measured on SmolLM2-135M in bfloat16, one core with AVX-512, a step that adds a token to each of 1 and of 8 answers:
51 and 83 ms of processor time as transformers leaves it, 37 and 46 ms with these two.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from . import base_models


def load(model_dir: Path, adapter_dir: Path | None) -> tuple[Any, Any]:
    """Return (model, tokenizer) for answering; raises base_models.ModelUnavailable."""
    model, tokenizer = base_models.load(model_dir, adapter_dir)
    if model.device.type == "cpu":
        if model.config._attn_implementation == "sdpa":
            model.set_attn_implementation("sdpa_always_masked")
        if platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available():
            pack(model)
    return model, tokenizer


def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    """Attention as ever, but never without a mask: transformers then takes PyTorch's grouped heads, which are slow."""
    if attention_mask is None and query.shape[2] == 1:
        attention_mask = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register("sdpa_always_masked", attend)
AttentionMaskInterface.register("sdpa_always_masked", sdpa_mask)


class PackedLinear(torch.nn.Module):
    """A linear layer whose weights lie in memory in the order in which oneDNN reads them."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        self.bias = linear.bias

    def forward(self, x: Any) -> Any:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack(model: Any) -> None:
    """Replace the model's linear layers by packed ones."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is torch.nn.Linear:
                setattr(parent, name, PackedLinear(child))
