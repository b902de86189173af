"""A model made quick to answer with on a processor. Nothing here changes what it says, rounding apart.

Measured on SmolLM2-135M in bfloat16, one core with AVX-512, processor time of a step that adds a token to each of 1 and
of 8 answers: 52 and 83 ms as transformers leaves it, 28 and 37 ms with what stands here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as attention
from transformers import DynamicCache, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from . import base_models, products
from .fused import BESIDE, beside, inverse_length, rotate, rotation


def load(model_dir: Path, adapter_dir: Path | None) -> tuple[Any, Any]:
    """Return (model, tokenizer) for next_logits; raises base_models.ModelUnavailable."""
    model, tokenizer = base_models.load(model_dir, adapter_dir)
    if model.device.type == "cpu":
        quicken(model)
    return model, tokenizer


def quicken(model: Any) -> None:
    """Prepare a model that is on the processor for next_logits; after that, only next_logits can ask it."""
    if type(model) is LlamaForCausalLM and model.config._attn_implementation == "sdpa":
        fuse(model)
    products.quicken(model)


def next_logits(model: Any, ids: Any, attended: Any, positions: Any, cache: Any) -> Any:
    """Read the tokens `ids` and return the logits of each row's next one: (rows, vocabulary).

    Shapes: ids and positions (rows, tokens), attended (rows, columns: those of the cache, then the tokens), 0 or 1.
    """
    if hasattr(model, "fused"):
        return llama_logits(model, ids, attended, positions, cache)
    device = model.device
    output = model(
        input_ids=ids.to(device),
        attention_mask=attended.to(device),
        position_ids=positions.to(device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]


CORES = torch.get_num_threads()
LIKELY = 16  # tokens


def use_cores(half: bool) -> None:
    """Let this thread compute on all cores, or on half of them."""
    wanted = max(1, CORES // 2) if half else CORES
    if torch.get_num_threads() != wanted:
        torch.set_num_threads(wanted)


# --- keys and values ---


class GrowingLayer(DynamicLayer):
    """A layer's keys and values with free columns after them: a new token is written there and moves nothing."""

    ROOM = 64  # columns
    keys: Any
    values: Any
    blocks: tuple = ()
    shown: Any = None  # what keys was when it was a part of blocks

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not self.is_initialized or key_states.shape[-2] > 1:
            return super().update(key_states, value_states, *args, **kwargs)
        columns = self.keys.shape[-2]
        if self.keys is not self.shown or columns == self.blocks[0].shape[-2]:
            self.blocks = tuple(pad(states, (0, 0, 0, self.ROOM)) for states in (self.keys, self.values))
        for block, states in zip(self.blocks, (key_states, value_states), strict=True):
            block[:, :, columns : columns + 1] = states
        self.keys, self.values = (block[:, :, : columns + 1] for block in self.blocks)
        self.shown = self.keys
        return self.keys, self.values


def new_cache() -> Any:
    """Return an empty cache of keys and values, whose layers have the attributes `keys` and `values`."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = GrowingLayer
    return cache


def attend(query: Any, key: Any, value: Any, mask: Any, scale: float) -> Any:
    """Attention as ever; heads that share keys and values go through as one head with several queries where they can.

    Shapes: query (rows, heads, tokens, width), key and value (rows, groups of heads, columns, width); the answer is
    (rows, tokens, heads, width). With one new token a row it takes a quarter of the time in bfloat16.
    """
    rows, heads, tokens, width = query.shape
    if tokens > 1:
        causal = mask is None
        return attention(query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=True).transpose(1, 2)
    grouped = query.reshape(rows, key.shape[1], -1, width)
    return attention(grouped, key, value, mask, scale=scale).reshape(rows, 1, heads, width)


# --- weights ---


def fuse(model: Any) -> None:
    """Make one linear layer of those that read the same input; a model with layers of another kind stays as it is."""
    heads = {type(layer) for name, layer in model.named_modules() if name.endswith(("_proj", "lm_head"))}
    if heads != {torch.nn.Linear}:  # quantized, for instance
        return
    model.tied = model.lm_head.weight is model.model.embed_tokens.weight  # the config may say so where it is not
    for layer in model.model.layers:
        for part, stacks in BESIDE.items():
            module = getattr(layer, part)
            for stack, names in stacks.items():
                setattr(module, stack, one_of([module.get_submodule(name) for name in names]))
                for name in names:
                    if name != stack:
                        delattr(module, name)
    model.fused = True


def one_of(linears: list[Any]) -> Any:
    """Return the linear layer whose output is the outputs of these, one after the other."""
    if len(linears) == 1:
        return linears[0]
    fused = torch.nn.Linear(1, 1, bias=linears[0].bias is not None)
    fused.weight = torch.nn.Parameter(beside(linear.weight for linear in linears), requires_grad=False)
    if fused.bias is not None:
        fused.bias = torch.nn.Parameter(beside(linear.bias for linear in linears), requires_grad=False)
    return fused


def llama_logits(model: Any, ids: Any, attended: Any, positions: Any, cache: Any) -> Any:
    """What LlamaForCausalLM computes, with fused layers and a third of the calls; shapes as in next_logits.

    For a small model the calls cost as much as the weights. Source: transformers/models/llama/modeling_llama.py.
    """
    llama, (rows, tokens) = model.model, ids.shape
    groups, width = model.config.num_key_value_heads, llama.layers[0].self_attn.head_dim
    mask = visible(attended, tokens)
    hidden = llama.embed_tokens(ids)
    cos, sin = rotation(llama.rotary_emb, hidden, positions)
    for index, layer in enumerate(llama.layers):
        attn, mlp = layer.self_attn, layer.mlp
        states = attn.qkv_proj(norm(hidden, layer.input_layernorm)).view(rows, tokens, -1, width)
        turned = rotate(states[:, :, :-groups], cos, sin)  # queries and keys
        query, key = turned[:, :, :-groups].transpose(1, 2), turned[:, :, -groups:].transpose(1, 2)
        keys, values = cache.update(key, states[:, :, -groups:].transpose(1, 2), index)
        answer = attend(query, keys, values, mask, attn.scaling)
        hidden = hidden + attn.o_proj(answer.reshape(rows, tokens, -1))
        gate, up = mlp.gate_up_proj(norm(hidden, layer.post_attention_layernorm)).chunk(2, -1)
        hidden = hidden + mlp.down_proj(mlp.act_fn(gate) * up)
    hidden = norm(hidden[:, -1], llama.norm)
    logits = model.lm_head(hidden).float()
    if model.tied:
        sharpen(logits, hidden, llama.embed_tokens.weight)
    return logits


def sharpen(logits: Any, hidden: Any, weight: Any) -> None:
    """Compute the LIKELY largest logits of each row anew, in fp32.

    In bf16 25.19 and 25.30 are the same number, and the likeliest token would be the one that comes first in the
    vocabulary. Shapes: logits (rows, vocabulary), hidden (rows, size), weight (vocabulary, size).
    """
    likely = logits.topk(min(LIKELY, logits.shape[1])).indices
    logits.scatter_(1, likely, torch.bmm(weight[likely].float(), hidden.float()[:, :, None])[:, :, 0])


def visible(attended: Any, tokens: int) -> Any:
    """Return which columns each of the last `tokens` sees: (rows, 1, tokens, columns), None for all before it."""
    columns = attended.shape[1]
    if tokens in (1, columns) and attended.all():
        return None
    earlier = torch.ones(tokens, columns, dtype=torch.bool).tril(columns - tokens)
    itself = torch.eye(tokens, columns, dtype=torch.bool).roll(columns - tokens, 1)  # or what it computes is no number
    return attended[:, None, None].bool() & earlier | itself


def norm(x: Any, layer: Any) -> Any:
    """The layer's RMS norm, in a third of the time that torch.nn.functional.rms_norm takes for so few numbers."""
    return (x * inverse_length(x, layer.variance_epsilon)).to(x.dtype) * layer.weight
