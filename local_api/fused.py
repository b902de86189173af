"""What answering and training have in common: a Llama's parts put together for a processor, where each call costs.

Source of the mathematics: transformers/models/llama/modeling_llama.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

# Projections that read the same input, and are one product: the name of the layer that stands for them, and theirs.
BESIDE = {
    "self_attn": {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "o_proj": ("o_proj",)},
    "mlp": {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
}


def beside(weights: Iterable[Any]) -> Any:
    """Return the weight whose product is the products of these, one after the other."""
    return torch.cat([weight.detach() for weight in weights])


def rotation(rotary: Any, hidden: Any, positions: Any) -> tuple[Any, Any]:
    """Return cos and sin for `rotate`, (..., 1, width) each; positions (rows, tokens) or (1, tokens)."""
    cos, sin = (part[..., None, :] for part in rotary(hidden, positions))
    half = sin.shape[-1] // 2
    return cos, torch.cat([-sin[..., :half], sin[..., half:]], -1)  # the sign of rotate_half: a roll does the rest


def rotate(states: Any, cos: Any, sin: Any) -> Any:
    """Turn each pair (state i, state i + half) by its angle; states (..., heads, width). With -sin it turns back."""
    return torch.addcmul(states * cos, states.roll(states.shape[-1] // 2, -1), sin)


def inverse_length(x: Any, epsilon: float) -> Any:
    """Return 1 / sqrt(mean(x²) + epsilon), (..., 1), in float32: what RMS norm multiplies x by."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.addcmul(length.new_tensor(epsilon), length, length, value=1 / x.shape[-1]).rsqrt()
