"""The mathematics of training: the adapter, the loss of a batch, one step of the optimizer."""

from __future__ import annotations

import random
from typing import Any

from . import base_models
from .encoding import Encoded

# Rank 16 is the most that vLLM takes by default.
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "bias": "none", "target_modules": "all-linear"}
BASE_LEARNING_RATE = 1e-3  # high for LoRA, right for a small model and few examples; learning_rate_multiplier scales it
WARMUP_SHARE = 0.06  # of all steps
MAX_GRADIENT_NORM = 1.0
# A larger batch is computed in parts of about so many tokens: it bounds memory, and a CPU gains nothing by more.
TOKENS_AT_ONCE = {"cpu": 1024, "mps": 4096, "cuda": 4096}
PLAIN_ATTENTION_TOKENS = 512  # longer rows' matrix of scores, which LlamaStep makes, would take much memory

# --- the data of a step ---


def epoch_batches(examples: list[Encoded], batch_size: int, seed: int, epoch: int) -> list[list[Encoded]]:
    """Return the epoch's batches, in an order that depends on the seed alone.

    Rows of like length share a batch, which saves padding; they are sorted within pools, so that chance still decides.
    """
    order = random.Random(f"{seed}/{epoch}")
    shuffled = order.sample(examples, len(examples))
    pool = 16 * batch_size
    for start in range(0, len(shuffled), pool):
        shuffled[start : start + pool] = sorted(shuffled[start : start + pool], key=lambda row: len(row.ids))
    batches = [shuffled[start : start + batch_size] for start in range(0, len(shuffled), batch_size)]
    order.shuffle(batches)
    return batches


def parts(rows: list[Encoded], tokens_at_once: int) -> list[list[Encoded]]:
    """Cut rows into parts of at most about `tokens_at_once` tokens, padding included."""
    result: list[list[Encoded]] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if result and (len(result[-1]) + 1) * len(row.ids) <= tokens_at_once:
            result[-1].append(row)
        else:
            result.append([row])
    return result


# --- the model ---


def add_lora(model: Any, adapter: str | None, base_model: str, exact: bool = False) -> Any:
    """Freeze the base model and put a LoRA adapter on its linear layers: a new one, or `adapter` to train further.

    `exact` keeps the adapter in float32, for an optimizer that changes it in place. Without it the layers compute in
    the model's precision, and the exact values live in our Optimizer.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if adapter:
        with base_models.reading("the adapter of the model to train further"):
            return PeftModel.from_pretrained(model, adapter, is_trainable=True, autocast_adapter_dtype=exact)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA), autocast_adapter_dtype=exact)
    is_default = base_model == base_models.DEFAULT_BASE_MODEL
    model.peft_config["default"].base_model_name_or_path = base_models.DEFAULT_HUB_ID if is_default else base_model
    return model


def quicken(model: Any, longest_row: int) -> None:
    """Let `losses` compute a model in fewer passes, where there is a way to: short rows, a plain Llama, a processor."""
    from . import llama_step

    if longest_row <= PLAIN_ATTENTION_TOKENS and llama_step.fits(model):
        model.llama_step = llama_step.LlamaStep(model)


def losses(model: Any, rows: list[Encoded]) -> tuple[Any, int, int]:
    """Return (summed cross-entropy over trained tokens, how many were predicted right, how many there are).

    Rows are padded on the right, where no token of a causal model looks: no mask is needed. The large output layer is
    computed for the positions that predict a trained token alone.
    """
    if hasattr(model, "llama_step"):
        return model.llama_step.losses(rows)
    ids, trained = (part.to(model.device) for part in padded(rows))
    loss, right, count = summed_loss(model, model.get_output_embeddings(), ids, trained)
    return loss, int(right), count


def padded(rows: list[Encoded]) -> tuple[Any, Any]:
    """Return token ids and which of them are trained (booleans), both (rows, tokens), padded on the right."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)
    return ids, pad_sequence([torch.tensor(row.trained) for row in rows], batch_first=True)


def summed_loss(model: Any, output_layer: Any, ids: Any, trained: Any) -> tuple[Any, Any, int]:
    """Return what `losses` does for (rows, tokens) of ids; the second is a tensor, too."""
    import torch

    trained = trained[:, 1:]

    def select(layer: Any, inputs: tuple) -> tuple:
        return (inputs[0][:, :-1][trained][None],)  # (1, trained tokens, hidden size)

    with output_layer.register_forward_pre_hook(select):
        logits = model(input_ids=ids, use_cache=False).logits[0].float()  # (trained tokens, vocabulary)
    targets = ids[:, 1:][trained]
    right = (logits.detach().argmax(-1) == targets).sum()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum"), right, len(targets)


def mean_losses(model: Any, rows: list[Encoded]) -> tuple[float, float]:
    """Return (mean loss, token accuracy) of validation rows; nothing is learnt."""
    import torch

    total, right, count = 0.0, 0, 0
    model.eval()
    with torch.no_grad():
        for part in parts(rows, TOKENS_AT_ONCE[model.device.type]):
            loss, hits, tokens = losses(model, part)
            total, right, count = total + loss.item(), right + hits, count + tokens
    return total / count, right / count


def learning_rates(optimizer: Any, total_steps: int) -> Any:
    """Return the schedule of a whole job: the rate rises during the first steps and then falls linearly to zero."""
    from torch.optim.lr_scheduler import LambdaLR

    warmup = max(1, round(WARMUP_SHARE * total_steps))
    falling = max(1, total_steps - warmup)
    return LambdaLR(optimizer, lambda step: min((step + 1) / warmup, (total_steps - step) / falling))


class Optimizer:
    """AdamW on a float32 copy of the adapter: in bfloat16 most updates would be too small to change a weight."""

    def __init__(self, model: Any, learning_rate: float, total_steps: int):
        import torch

        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.exact = torch.cat([weight.detach().float().flatten() for weight in self.weights])  # all of them, in a row
        self.adamw = torch.optim.AdamW([self.exact], lr=learning_rate, weight_decay=0.0)
        self.schedule = learning_rates(self.adamw, total_steps)

    def step(self) -> None:
        """Take the gradient from the model, which forgets it, and change the adapter by it."""
        import torch

        gradients = []
        for weight in self.weights:  # a layer that text does not reach, such as a vision tower's, has no gradient
            gradients.append((torch.zeros_like(weight) if weight.grad is None else weight.grad).float().flatten())
            weight.grad = None
        self.exact.grad = torch.cat(gradients)
        torch.nn.utils.clip_grad_norm_([self.exact], MAX_GRADIENT_NORM)
        self.adamw.step()
        self.schedule.step()
        self.copy_to_model()

    def copy_to_model(self) -> None:
        pieces = self.exact.split([weight.numel() for weight in self.weights])
        for weight, piece in zip(self.weights, pieces, strict=True):
            weight.data.copy_(piece.view_as(weight))

    def state(self) -> dict:
        return {"exact": self.exact, "adamw": self.adamw.state_dict(), "schedule": self.schedule.state_dict()}

    def restore(self, state: dict) -> None:
        self.exact.copy_(state["exact"])
        self.adamw.load_state_dict(state["adamw"])
        self.schedule.load_state_dict({**self.schedule.state_dict(), **state["schedule"]})
        self.copy_to_model()


def train_step(model: Any, optimizer: Optimizer, batch: list[Encoded]) -> tuple[float, float]:
    """Update the adapter once; return (mean loss, token accuracy) of the batch before that.

    The loss is the mean over the trained tokens of the whole batch, whatever parts it is computed in.
    """
    count = sum(sum(row.trained[1:]) for row in batch)
    total, right = 0.0, 0
    model.train()
    for part in parts(batch, TOKENS_AT_ONCE[model.device.type]):
        loss, hits, _ = losses(model, part)
        (loss / count).backward()
        total, right = total + loss.item(), right + hits
    optimizer.step()
    return total / count, right / count
