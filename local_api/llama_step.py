"""The loss of a Llama model with a LoRA adapter on a processor, and the adapter's gradients, in few passes.

It computes what transformers + PEFT compute, rounding apart, for short rows like a chat's. There the time goes into the
many small passes over activations and into narrow products. Here projections that read the same input are one product,
each function knows its own derivative, and rows lie one behind the other without padding. PEFT's model keeps the
adapter: weights are read from it, gradients are left in it, and it writes the files.

Shapes: tokens are those of all rows of a part, one row behind the other; hidden (tokens, size).
"""

from __future__ import annotations

from typing import Any

import torch

from .encoding import Encoded
from .fused import BESIDE, beside, rotation
from .gradients import Attention, CrossEntropy, LoraLinear, RMSNorm, SwiGLU
from .products import frozen

TYPICAL_TOKENS = 320  # in a part; half of them are learnt


def fits(model: Any) -> bool:
    """Tell whether LlamaStep computes what this model with an adapter of step.add_lora does: a Llama without extras."""
    from transformers import LlamaForCausalLM

    llama = model.get_base_model()
    if type(llama) is not LlamaForCausalLM or llama.device.type != "cpu":
        return False
    if llama.config.hidden_act != "silu" or llama.config.attention_dropout:
        return False
    weights = [module.base_layer for name, module in llama.named_modules() if name.endswith("_proj")]
    return all(type(layer) is torch.nn.Linear and layer.bias is None for layer in weights)  # not quantized


class LlamaStep:
    """A PEFT model (for which `fits` says yes) laid out for `losses`; the adapter's weights are still the model's."""

    def __init__(self, model: Any):
        llama = model.get_base_model()
        self.llama, self.head = llama.model, frozen(llama.lm_head.weight.detach(), TYPICAL_TOKENS // 2)
        self.layers = [
            {
                stack: Stack([getattr(getattr(layer, part), name) for name in names])
                for part, stacks in BESIDE.items()
                for stack, names in stacks.items()
            }
            for layer in self.llama.layers
        ]

    def losses(self, rows: list[Encoded]) -> tuple[Any, int, int]:
        """Return (summed cross-entropy over trained tokens, how many were predicted right, how many there are)."""
        ids = torch.tensor([token for row in rows for token in row.ids])
        learnt = torch.tensor([flag for row in rows for flag in (*row.trained[1:], False)])  # predicts a trained token
        positions = torch.cat([torch.arange(len(row.ids)) for row in rows])
        hidden = self.llama.embed_tokens(ids)
        cos, sin = (part[0] for part in rotation(self.llama.rotary_emb, hidden, positions[None]))
        spans = causal_spans([len(row.ids) for row in rows], hidden.dtype)
        for layer, stacks in zip(self.llama.layers, self.layers, strict=True):
            states = stacks["qkv_proj"](norm(hidden, layer.input_layernorm))
            answers = Attention.apply(states, cos, sin, spans, layer.self_attn)
            hidden = hidden + stacks["o_proj"](answers)
            gate_up = stacks["gate_up_proj"](norm(hidden, layer.post_attention_layernorm))
            hidden = hidden + stacks["down_proj"](SwiGLU.apply(gate_up))
        targets = ids.roll(-1)[learnt]
        loss, right = CrossEntropy.apply(norm(hidden[learnt], self.llama.norm), self.head, targets)
        return loss, int(right), len(targets)


class Stack:
    """Projections that read the same input: products with their frozen weights as one, and their adapters."""

    def __init__(self, projections: list[Any]):
        weight = beside(projection.base_layer.weight for projection in projections)
        self.frozen = frozen(weight, TYPICAL_TOKENS)
        outputs = [projection.base_layer.out_features for projection in projections]
        for projection, part in zip(projections, weight.split(outputs), strict=True):
            projection.base_layer.weight.data = part  # not kept twice
        self.downs = [projection.lora_A["default"].weight for projection in projections]
        self.ups = [projection.lora_B["default"].weight for projection in projections]
        self.scales = [projection.scaling["default"] for projection in projections]

    def __call__(self, x: Any) -> Any:
        return LoraLinear.apply(x, self, *self.downs, *self.ups)


def norm(x: Any, layer: Any) -> Any:
    return RMSNorm.apply(x, layer.weight, layer.variance_epsilon)


def causal_spans(lengths: list[int], dtype: Any) -> list[tuple[slice, Any]]:
    """Return each row's place among the tokens, and what is added to its scores: -inf where a token comes later."""
    longest = max(lengths)
    later = torch.full((longest, longest), float("-inf"), dtype=dtype).triu(1)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [(slice(end - length, end), later[:length, :length]) for end, length in zip(ends, lengths, strict=True)]
