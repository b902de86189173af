"""The parts of a Llama's training step as functions that know their own derivatives, in few passes over activations.

Notation: x, y are a function's input and output, g the loss's gradient of y, dx that of x; A' is A transposed. Tokens
are those of all rows, one row behind the other. Source: transformers/models/llama/modeling_llama.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from .fused import inverse_length, rotate

LOGITS_AT_ONCE = 256  # positions: it bounds memory, and reads the output layer's weights seldom


class LoraLinear(Function):
    """y = x W' + (x A') B', with A the projections' one below the other, and B theirs, scaled, along a diagonal.

    With v = g B, for a gradient g of y:  dx = g W + v A,  dA = v' x,  dB = g' (x A').
    """

    @staticmethod
    def forward(ctx: Any, x: Any, stack: Any, *adapters: Any) -> Any:
        down = torch.cat(stack.downs)
        up = torch.block_diag(*[weight * scale for weight, scale in zip(stack.ups, stack.scales, strict=True)])
        narrow = x @ down.t()
        ctx.stack = stack
        ctx.save_for_backward(x, narrow, down, up)
        return stack.frozen.forward(x).addmm_(narrow, up.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Any) -> Any:
        (x, narrow, down, up), stack = ctx.saved_tensors, ctx.stack
        through = gradient @ up
        dx = stack.frozen.backward(gradient).addmm_(through, down) if ctx.needs_input_grad[0] else None
        ddowns = (through.t() @ x).split([len(weight) for weight in stack.downs])
        gradients = gradient.split([len(weight) for weight in stack.ups], 1)
        narrows = narrow.split([len(weight) for weight in stack.downs], 1)
        dups = [(g.t() @ n).mul_(scale) for g, n, scale in zip(gradients, narrows, stack.scales, strict=True)]
        return dx, None, *ddowns, *dups


class RMSNorm(Function):
    """y = x r w, where r = 1 / sqrt(mean(x²) + epsilon).  dx = r (g w - x r² mean(g w x))."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, epsilon: float) -> Any:
        scale = inverse_length(x, epsilon)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).to(x.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Any) -> Any:
        x, weight, scale = ctx.saved_tensors
        weighted = (gradient * weight).float()
        share = (weighted * x).mean(-1, keepdim=True).mul_(scale).mul_(scale)
        return torch.addcmul(weighted, x.float(), share, value=-1).mul_(scale).to(x.dtype), None, None


class SwiGLU(Function):
    """y = silu(gate) up, of gate and up side by side.  dgate = g up silu'(gate),  dup = g silu(gate)."""

    @staticmethod
    def forward(ctx: Any, gate_up: Any) -> Any:
        gate, up = gate_up.chunk(2, -1)
        open_gate = silu(gate)
        ctx.save_for_backward(gate_up, open_gate)
        return open_gate * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Any) -> Any:
        gate_up, open_gate = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        result = torch.empty_like(gate_up)
        dgate, dup = result.chunk(2, -1)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=dgate)
        torch.mul(gradient, open_gate, out=dup)
        return result


def by_group(states: Any, groups: int) -> Any:
    """(tokens, heads, width) -> (groups, heads of a group x tokens, width): heads of a group share keys and values."""
    return states.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def by_token(states: Any, tokens: int) -> Any:
    """The way back from by_group."""
    return states.unflatten(1, (-1, tokens)).permute(2, 0, 1, 3).flatten(1, 2)


class Attention(Function):
    """Rotate queries q and keys k, then y = P v, P = softmax(q k' scale) over the tokens so far, row by row.

    dv = P' g,  dP = g v',  dS = P (dP - sum(P dP)) scale,  dq = dS k,  dk = dS' q;  then they are rotated back.
    """

    @staticmethod
    def forward(ctx: Any, states: Any, cos: Any, sin: Any, spans: list, layer: Any) -> Any:
        states = states.view(len(states), -1, layer.head_dim)  # (tokens, heads + groups + groups, width)
        groups = layer.config.num_key_value_heads
        turned, values = rotate(states[:, :-groups], cos, sin), states[:, -groups:].transpose(0, 1)
        keys = turned[:, -groups:].transpose(0, 1)
        queries, shares = [], []
        result = torch.empty_like(turned[:, :-groups])
        for span, later in spans:
            queries.append(by_group(turned[span, :-groups], groups))
            mask = later.repeat(queries[-1].shape[1] // len(later), 1)
            scores = torch.baddbmm(mask, queries[-1], keys[:, span].transpose(1, 2), alpha=layer.scaling)
            shares.append(scores.softmax(-1))
            result[span] = by_token(shares[-1] @ values[:, span], len(later))
        ctx.spans, ctx.scaling = spans, layer.scaling
        ctx.save_for_backward(cos, sin, keys, values, *queries, *shares)
        return result.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Any) -> Any:
        cos, sin, keys, values, *rest = ctx.saved_tensors
        groups, gradient = len(keys), gradient.view(len(gradient), -1, keys.shape[-1])
        heads = gradient.shape[1]
        result = gradient.new_empty(len(gradient), heads + 2 * groups, gradient.shape[2])
        for (span, later), query, share in zip(ctx.spans, rest, rest[len(ctx.spans) :], strict=False):
            wanted = by_group(gradient[span], groups)
            result[span, heads + groups :] = (share.transpose(1, 2) @ wanted).transpose(0, 1)
            wanted = wanted @ values[:, span].transpose(1, 2)
            scores = torch._softmax_backward_data(wanted, share, -1, share.dtype)
            result[span, :heads] = by_token((scores @ keys[:, span]).mul_(ctx.scaling), len(later))
            result[span, heads : heads + groups] = (scores.transpose(1, 2) @ query).mul_(ctx.scaling).transpose(0, 1)
        result[:, :-groups] = rotate(result[:, :-groups], cos, -sin)
        return result.flatten(1), None, None, None, None


class CrossEntropy(Function):
    """Summed -log p(target), p = softmax(x W'), and how many targets are the likeliest.  dx = (p - onehot(target)) W.

    Logits are made, used for both and forgotten, some positions at a time.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, head: Any, targets: Any) -> Any:
        loss, right = torch.zeros(()), torch.zeros((), dtype=torch.long)
        dx = torch.empty_like(x)
        for start in range(0, len(x), LOGITS_AT_ONCE):
            part, wanted = slice(start, start + LOGITS_AT_ONCE), targets[start : start + LOGITS_AT_ONCE, None]
            logits = head.forward(x[part]).float()
            best, likeliest = logits.max(-1, keepdim=True)
            target = logits.gather(1, wanted)
            shares = torch.softmax(logits, -1)
            loss += (best - shares.gather(1, likeliest).log() - target).sum()  # log of the largest share: never of 0
            right += (likeliest == wanted).sum()
            if ctx.needs_input_grad[0]:
                shares.scatter_add_(1, wanted, -torch.ones_like(target))
                dx[part] = head.backward(shares.to(x.dtype))
        ctx.save_for_backward(dx)
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Any, _: Any) -> Any:
        return ctx.saved_tensors[0] * gradient.to(ctx.saved_tensors[0].dtype), None, None
