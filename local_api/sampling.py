"""How an answer's next token is drawn: temperature, top_p, penalties, biases, and the form that the answer must have.

It imports PyTorch, so the engine imports it when the first request is there.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from .generation import EngineError, GenerationRequest

FEW = 256  # tokens that are looked at first when a part of all is asked for (top_p)


class Sampler:
    """Draws the tokens of one answer. matcher: llguidance's, which knows what the answer's form allows next."""

    def __init__(self, request: GenerationRequest, matcher: Any = None):
        self.request, self.matcher = request, matcher
        self.written: Counter[int] = Counter()
        self.changes_logits = bool(request.frequency_penalty or request.presence_penalty or request.logit_bias)
        self.random = torch.Generator()
        if request.seed is not None:
            self.random.manual_seed(request.seed % 2**63)
        else:
            self.random.seed()

    def draw(self, logits: Any) -> int:
        """Choose the next token from its logits (shape: vocabulary; float32, on the CPU), which stay as they are."""
        if self.changes_logits or self.matcher:
            logits = self.adjusted(logits.clone())
        token = self.choose(logits)
        if self.changes_logits:
            self.written[token] += 1
        if self.matcher and not self.matcher.consume_token(token):
            raise EngineError(f"The answer's form cannot be kept: {self.matcher.get_error()}")
        return token

    def form_is_complete(self) -> bool:
        return self.matcher is not None and self.matcher.is_stopped()

    def adjusted(self, logits: Any) -> Any:
        """Source: https://developers.openai.com/api/reference/resources/chat (frequency_penalty, logit_bias)."""
        request = self.request
        for token, bias in request.logit_bias.items():
            logits[token] += bias
        if self.written:
            tokens, counts = torch.tensor(list(self.written)), torch.tensor(list(self.written.values()))
            logits[tokens] -= request.presence_penalty + request.frequency_penalty * counts
        if self.matcher:
            allowed = torch.frombuffer(bytearray(self.matcher.compute_logit_bias()), dtype=torch.uint8)
            logits[allowed == 0] = -torch.inf
        return logits

    def choose(self, logits: Any) -> int:
        if self.request.temperature < 1e-4:  # dividing by less overflows
            return int(logits.argmax())
        probabilities, tokens = torch.softmax(logits / self.request.temperature, -1), None
        if self.request.top_p < 1:
            everything, top_p = probabilities, self.request.top_p
            probabilities, tokens = everything.topk(min(FEW, len(everything)))  # mostly enough; to sort all takes 8 ms
            if probabilities.sum() < top_p:
                probabilities, tokens = everything.sort(descending=True)
            probabilities[probabilities.cumsum(-1) - probabilities > top_p] = 0  # the first token always stays
        # Ten times faster than torch.multinomial, which draws a random number for each token.
        sums = probabilities.cumsum(-1, dtype=torch.float64)
        point = sums[-1] * torch.rand(1, generator=self.random, dtype=torch.float64)
        place = torch.searchsorted(sums, point, right=True)
        return int(place if tokens is None else tokens[place])
