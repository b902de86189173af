"""A tiny chat model, made in a second: a randomly initialised Llama with a tokenizer of its own.

It trains and answers through exactly the code that serves a real model; only what it says makes no sense.
"""

from __future__ import annotations

import json
from pathlib import Path

INIT = 0.3  # wide enough that its logits say something and an adapter can change them
EXAMPLES = Path(__file__).parent.parent / "examples" / "techflow_support" / "qa_pairs.json"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tiny_model(
    folder: Path, context: int = 1024, hidden: int = 64, layers: int = 2, is_brief: bool = False
) -> Path:
    """Write config, weights and tokenizer of a tiny Llama into `folder` and return it.

    It says what comes, mostly until it is stopped; one that is brief ends most answers within 40 tokens.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([json.dumps(row) for row in json.loads(EXAMPLES.read_text("utf-8"))], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|im_start|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        tie_word_embeddings=True,
        initializer_range=INIT,
    )
    folder.mkdir(parents=True, exist_ok=True)
    model = LlamaForCausalLM(config)
    if is_brief:
        model.model.embed_tokens.weight.data[fast.eos_token_id] *= 2  # the head's row, too: its logit is doubled
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def write_training_file(path: Path, examples: int = 12, words: int = 8) -> Path:
    """Write a small valid chat JSONL file whose answers a tiny model can learn."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for number in range(examples):
            answer = " ".join(["Yes, of course."] * (1 + number % words))
            messages = [
                {"role": "system", "content": "You answer."},
                {"role": "user", "content": f"Is question {number} a good question?"},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path
