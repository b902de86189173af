"""The trainer's own step for Llama models: loss, gradients and what is learnt are those of transformers + PEFT."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_model import write_training_file

from local_api import base_models, encoding, llama_step, step
from local_api.encoding import Encoded

SHAPE = {"vocab_size": 90, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "initializer_range": 0.3}
ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FITTING = [
    {},
    {"tie_word_embeddings": True},
    {"num_key_value_heads": 6, "head_dim": 16},
    {"num_key_value_heads": 1, "rope_parameters": {**ROPE, "original_max_position_embeddings": 16}},
]


def adapted(dtype: torch.dtype = torch.float32, family: str = "Llama", **more):
    """A small model of random weights with an adapter that changes it."""
    import transformers

    torch.manual_seed(5)
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **HEADS, **more})
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval()
    model = step.add_lora(model, None, "small")
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


def conversations(count: int = 5) -> list[Encoded]:
    """Rows of unequal length with several learnt stretches, as several answers make, and gaps, as weight 0 makes."""
    draw = random.Random(3)
    rows = []
    for number in range(count):
        length = 12 + 5 * number
        turns = [position > 3 and position % 9 > number % 4 for position in range(length)]
        rows.append(Encoded([draw.randrange(90) for _ in range(length)], turns))
    return rows


def loss_and_gradients(model, rows: list[Encoded]) -> tuple[float, int, int, dict]:
    loss, right, count = step.losses(model, rows)
    (loss / count).backward()
    gradients = {name: weight.grad.float() for name, weight in model.named_parameters() if weight.requires_grad}
    model.zero_grad()
    return loss.item(), right, count, gradients


def off(one: dict, other: dict) -> dict[str, float]:
    """How far gradients are from others, as a share of their length."""
    return {name: float((one[name] - other[name]).norm() / other[name].norm()) for name in other}


@pytest.mark.parametrize("more", FITTING)
def test_loss_and_every_gradient_are_pefts(more):
    model, rows = adapted(**more), conversations()
    *expected, theirs = loss_and_gradients(model, rows)
    step.quicken(model, 40)
    assert hasattr(model, "llama_step")
    *got, ours = loss_and_gradients(model, rows)
    assert got == pytest.approx(expected, rel=1e-5) and len(ours) == 2 * 7 * 2
    assert max(off(ours, theirs).values()) < 1e-4


def test_in_bfloat16_the_gradients_are_as_near_to_the_exact_ones_as_pefts():
    rows = conversations()
    rough = adapted(torch.bfloat16)
    exact = adapted()
    for one, other in zip(exact.parameters(), rough.parameters(), strict=True):
        one.data.copy_(other.data)
    exact_loss, *_, true = loss_and_gradients(exact, rows)
    *_, theirs = loss_and_gradients(rough, rows)
    step.quicken(rough, 40)
    loss, *_, ours = loss_and_gradients(rough, rows)
    assert loss == pytest.approx(exact_loss, rel=0.01)
    error, pefts = (sum(off(gradients, true).values()) for gradients in (ours, theirs))
    assert 0 < error < 1.2 * pefts


def test_logits_are_made_some_at_a_time_with_the_same_result(monkeypatch):
    model, rows = adapted(), conversations()
    step.quicken(model, 40)
    whole, right, count, gradients = loss_and_gradients(model, rows)
    monkeypatch.setattr("local_api.gradients.LOGITS_AT_ONCE", 7)
    parted = loss_and_gradients(model, rows)
    assert parted[:3] == pytest.approx((whole, right, count), rel=1e-6)
    assert max(off(parted[3], gradients).values()) < 1e-5


def test_a_target_that_seems_impossible_has_a_large_loss_and_not_an_infinite_one():
    from local_api.gradients import CrossEntropy
    from local_api.products import frozen

    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    loss, right = CrossEntropy.apply(torch.tensor([[200.0, 0.0]]), frozen(weight, 1), torch.tensor([1]))
    assert (loss.item(), right.item()) == (400.0, 0)


def test_validation_losses_are_pefts_and_leave_no_gradient():
    model, rows = adapted(), conversations(9)
    expected = step.mean_losses(model, rows)
    step.quicken(model, 60)
    assert step.mean_losses(model, rows) == pytest.approx(expected, rel=1e-5)
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("Qwen2", {}),  # another architecture, with biases
        ("Mistral", {}),
        ("Llama", {"attention_bias": True}),
        ("Llama", {"mlp_bias": True}),
        ("Llama", {"hidden_act": "gelu"}),
        ("Llama", {"attention_dropout": 0.1}),
        ("Llama", {"longest": step.PLAIN_ATTENTION_TOKENS + 1}),  # its matrix of scores would take much memory
    ],
)
def test_all_else_is_computed_by_peft(family, more):
    longest = more.pop("longest", 40)
    model = adapted(family=family, **more)
    step.quicken(model, longest)
    assert not hasattr(model, "llama_step")
    *_, gradients = loss_and_gradients(model, conversations())
    assert all(gradient.any() for gradient in gradients.values())


def held_out_loss(base, folder, monkeypatch, quick: bool, steps: int) -> float:
    """Train some steps from one seed, and return the loss on rows that were not trained on."""
    if not quick:
        monkeypatch.setattr(llama_step, "fits", lambda model: False)
    torch.manual_seed(7)
    model, tokenizer = base_models.load(base)
    rows = encoding.read_examples(str(folder), tokenizer, 1024, "training_file")
    examples, held_out = rows[:-16], rows[-16:]
    model = step.add_lora(model, None, "base")
    step.quicken(model, 400)
    assert hasattr(model, "llama_step") == quick
    optimizer = step.Optimizer(model, step.BASE_LEARNING_RATE, steps)
    batches = [batch for epoch in range(steps) for batch in step.epoch_batches(examples, 2, 7, epoch)]
    for batch in batches[:steps]:
        step.train_step(model, optimizer, batch)
    monkeypatch.undo()
    return step.mean_losses(model, held_out)[0]


def test_fifty_steps_lead_where_pefts_lead(tiny_model, tmp_path, monkeypatch):
    data = write_training_file(tmp_path / "data.jsonl", examples=48)
    ours, theirs = (held_out_loss(tiny_model, data, monkeypatch, quick, 50) for quick in (True, False))
    assert ours == pytest.approx(theirs, rel=0.02)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_fifty_steps_of_the_base_model_lead_where_pefts_lead(base_model, monkeypatch):
    from conftest import ROOT

    data = ROOT / "training_data.jsonl"
    ours, theirs = (held_out_loss(base_model, data, monkeypatch, quick, 50) for quick in (True, False))
    assert ours == pytest.approx(theirs, rel=0.02) and ours < 2.0
