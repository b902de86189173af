"""The training part of local_api.py: this trainer, the same with transformers + PEFT's step, and TRL's SFTTrainer.

    python benchmarks/local_api.py training --trl-python trl-env/bin/python

They train one job, in turns of a few steps each. Same rows, base model, LoRA settings, batch size, steps, learning rate
and schedule; all else is TRL's default, and what of it matters is printed. Each contender is a process that waits while
another takes its turn, so that neighbours on the machine disturb all alike; the ratio is the median over the turns. The
adapters are then judged by one yardstick: their loss on rows that none has seen. TRL is no part of this project; this
makes an environment that has it:

    python3 -m venv trl-env
    trl-env/bin/pip install trl==1.16.0 -r requirements.txt -r local_api/requirements.txt

Without it that comparison is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CACHE = ROOT / ".local_api" / "cache"
BATCH_SIZE = 2  # what "auto" gives
HELD_OUT = 32  # rows of training_data.jsonl that follow those trained on: their loss judges the adapters
TURN = 8  # steps; a round is a turn of each contender, and the first round, which warms up, is not counted
SHOWN_DEFAULTS = ("bf16", "gradient_checkpointing", "loss_type", "packing", "max_length", "optim", "max_grad_norm")
IN_FLOAT32 = {"bf16": False, "model_init_kwargs": {"dtype": "float32"}}


def measure(args: argparse.Namespace) -> list[tuple]:
    """Train the same job with each contender, a turn of some steps each, round and round; then judge the adapters."""
    from local_api import base_models

    weights = base_models.prepare(base_models.DEFAULT_BASE_MODEL, CACHE, print)
    has_trl = subprocess.run([args.trl_python, "-c", "import trl"], capture_output=True).returncode == 0
    if not has_trl:
        print(f"No trl in {args.trl_python}: no comparison. {Path(__file__).name} says at its top how to install it.")
    results, rows = {}, TURN * (args.rounds + 1) * BATCH_SIZE
    roles = [("ours", sys.executable), ("peft", sys.executable), *([("trl", args.trl_python)] if has_trl else [])]
    with tempfile.TemporaryDirectory() as scratch:
        contenders = []
        for precision in ("default", "float32"):
            for name, python in roles:
                contenders.append(
                    Contender(python, name, precision, write_job(Path(scratch), name, precision, weights, rows))
                )
        waiting = contenders
        while waiting:
            waiting = [contender for contender in waiting if contender.take_turn()]
        for contender in contenders:
            results[contender.name, contender.precision] = (contender.turns[1:], contender.held_out_loss())
        if has_trl:
            print("TRL's defaults:", (Path(scratch) / "trl-default" / "defaults.txt").read_text("utf-8"))
    lines = []
    for precision in ("default", "float32"):
        for other, target in (("peft", ">= 1.7 times"), ("trl", ">= 4 times")):
            if (other, precision) in results:
                words = {"peft": "transformers + PEFT", "trl": "TRL"}[other]
                lines += compare(precision, target, results["ours", precision], words, results[other, precision])
    reached = statistics.median(turn["flop"] / turn["seconds"] for turn in results["ours", "default"][0]) / 1e9
    rate = matrix_rate(weights)
    shares = f"{reached:.0f} GFLOP/s", f"{rate:.0f} GFLOP/s (the same products alone)", reached / rate, "towards 0.45"
    return [*lines, ("share of the matrix rate", *shares)]


def compare(precision: str, target: str, ours: tuple, words: str, others: tuple) -> list[tuple]:
    """Return the rows of one precision: speed, then held-out loss. Turns that stood side by side are compared."""
    rates = [[turn["tokens"] / turn["seconds"] for turn in turns] for turns, _ in (ours, others)]
    speeds = [f"{statistics.median(each):.0f} tokens/s" for each in rates]
    speed, loss = f"training, {precision} precision", f"loss on unseen rows, {precision} precision"
    faster = statistics.median(mine / theirs for mine, theirs in zip(*rates, strict=True))
    return [
        (speed, speeds[0], f"{speeds[1]} ({words})", faster, target if precision == "default" else ""),
        (loss, f"{ours[1]:.3f}", f"{others[1]:.3f} ({words})", ours[1] / others[1], "<= 1.02"),
    ]


def write_job(scratch: Path, name: str, precision: str, weights: Path, rows: int) -> Path:
    """Make a job's directory: its rows, those that are held out, job.json."""
    folder = scratch / f"{name}-{precision}"
    folder.mkdir()
    lines = (ROOT / "training_data.jsonl").read_text("utf-8").splitlines(keepends=True)
    # TRL learns one answer a row, so rows with more than one would not be the same data.
    lines = [line for line in lines if line.count('"role": "assistant"') == 1]
    for file, part in (("training", lines[:rows]), ("held_out", lines[rows:][:HELD_OUT])):
        (folder / f"{file}.jsonl").write_text("".join(part), "utf-8")
    hyperparameters = {"n_epochs": 1, "batch_size": BATCH_SIZE, "learning_rate_multiplier": 1.0}
    job = {"base_model": "", "model_dir": str(weights), "training_file": str(folder / "training.jsonl"), "seed": 1}
    (folder / "job.json").write_text(json.dumps({**job, "hyperparameters": hyperparameters}), "utf-8")
    return folder


class Contender:
    """A trainer in a process of its own, which trains only in its turn."""

    def __init__(self, python: str, name: str, precision: str, folder: Path):
        self.name, self.precision, self.folder, self.turns = name, precision, folder, []  # type: ignore[var-annotated]
        self.process = self.start(python, name)

    def start(self, python: str, role: str) -> subprocess.Popen:
        command = [python, __file__, role, self.precision, str(self.folder)]
        log = open(self.folder / "log.txt", "ab")  # noqa: SIM115 - closed with the process
        # Both wait for their threads asleep, as our trainer does by itself: on a busy machine this is in TRL's favour.
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment)

    def take_turn(self) -> bool:
        """Let it train for a turn; False if it had none left."""
        assert self.process.stdin and self.process.stdout
        if self.turns and self.process.poll() is None:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if line:
            self.turns.append(json.loads(line))
        elif self.process.wait():
            raise SystemExit(f"{self.name} failed:\n{(self.folder / 'log.txt').read_text('utf-8')[-2000:]}")
        return bool(line)

    def held_out_loss(self) -> float:
        output, _ = self.start(sys.executable, "judge").communicate()
        return json.loads(output)


class Turns:
    """In the contender's process: reports each turn's figures, then waits for the next."""

    def __init__(self) -> None:
        self.report = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever a library prints goes to the log
        self.steps, self.figures, self.started = 0, {"tokens": 0, "flop": 0}, time.perf_counter()

    def after_step(self, **figures: int) -> None:
        self.steps += 1
        for name, figure in figures.items():
            self.figures[name] += figure
        if self.steps % TURN == 0:
            print(
                json.dumps({**self.figures, "seconds": time.perf_counter() - self.started}),
                file=self.report,
                flush=True,
            )
            if not sys.stdin.readline():
                sys.exit("The benchmark is gone.")
            self.figures, self.started = dict.fromkeys(self.figures, 0), time.perf_counter()


def train_ours(precision: str, folder: Path) -> int:
    """Run the local API's trainer on the job."""
    from local_api import train

    turns, train_step = Turns(), train.train_step

    def timed_step(model: Any, optimizer: Any, batch: list, *rest: Any) -> Any:
        result = train_step(model, optimizer, batch, *rest)
        # Two operations a weight and token in the forward pass, two in the backward pass; the output layer's weights
        # only meet the tokens that are trained on. The adapter's own are not counted.
        layers = sum(weight.numel() for name, weight in model.named_parameters() if "base_layer" in name)
        output = model.get_output_embeddings().weight.numel()
        tokens, trained = sum(len(row.ids) for row in batch), sum(sum(row.trained) for row in batch)
        turns.after_step(tokens=tokens, flop=4 * (layers * tokens + output * trained))
        return result

    train.train_step = timed_step
    return train.main([str(folder)])


def train_peft(precision: str, folder: Path) -> int:
    """The same trainer with what it takes for models that its own step does not fit."""
    from local_api import llama_step

    llama_step.fits = lambda model: False
    return train_ours(precision, folder)


def train_trl(precision: str, folder: Path) -> int:
    """Run TRL's SFTTrainer on the job: its defaults, but for the batch size and what decides the loss."""
    import datasets
    import torch
    import trl
    from peft import LoraConfig
    from transformers import TrainerCallback

    from local_api import step

    os.nice(5)  # as our trainer does
    turns = Turns()
    job = json.loads((folder / "job.json").read_text("utf-8"))
    lines = Path(job["training_file"]).read_text("utf-8").splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    config = trl.SFTConfig(
        output_dir=str(folder / "output"),
        per_device_train_batch_size=BATCH_SIZE,
        num_train_epochs=1,
        learning_rate=step.BASE_LEARNING_RATE,
        warmup_steps=round(step.WARMUP_SHARE * len(chats) / BATCH_SIZE),
        seed=job["seed"],
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        include_num_input_tokens_seen="non_padding",
        **(IN_FLOAT32 if precision == "float32" else {}),
    )
    defaults = ", ".join(f"{name}={getattr(config, name)}" for name in SHOWN_DEFAULTS).replace("OptimizerNames.", "")
    (folder / "defaults.txt").write_text(f"{defaults} (trl {trl.__version__})", "utf-8")

    class InTurns(TrainerCallback):
        seen = 0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            tokens, self.seen = int(state.num_input_tokens_seen) - self.seen, int(state.num_input_tokens_seen)
            turns.after_step(tokens=tokens)

    trainer = trl.SFTTrainer(
        job["model_dir"],
        config,
        train_dataset=datasets.Dataset.from_list([{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats]),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **step.LORA),
        callbacks=[InTurns()],
    )
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    return 0


def judge(precision: str, folder: Path) -> int:
    """Print the loss of the adapter on the rows held out, in float32, whoever trained it."""
    import torch

    from local_api import base_models, step, train

    model, tokenizer = base_models.load(
        Path(json.loads((folder / "job.json").read_text("utf-8"))["model_dir"]), folder / "adapter"
    )
    rows = train.read_examples(str(folder / "held_out.jsonl"), tokenizer, 8192, "held_out")
    print(step.mean_losses(model.to(torch.float32), rows)[0])
    return 0


def contender(role: str, precision: str, folder: str) -> int:
    """What a contender's process runs."""
    from local_api import base_models

    if precision == "float32" or role == "judge":
        import torch

        base_models.best_dtype = lambda device: torch.float32
    return {"ours": train_ours, "peft": train_peft, "trl": train_trl, "judge": judge}[role](precision, Path(folder))


def matrix_rate(model_dir: Path, rows: int = 320) -> float:
    """Return what this processor multiplies the model's own weights at, in GFLOP/s, forward and backward, at its best.

    One layer's products after the other's, with as many rows as a step's, in the precision that it trains in.
    """
    import torch

    from local_api import base_models
    from local_api.products import frozen

    model, _ = base_models.load(model_dir)
    weights = [module.weight.detach() for name, module in model.named_modules() if name.endswith("_proj")]
    products = [frozen(weight, rows) for weight in weights]
    inputs = {size: torch.ones(rows, size, dtype=weights[0].dtype) for weight in weights for size in weight.shape}
    seconds = []
    with torch.inference_mode():
        for _ in range(5):
            started = time.perf_counter()
            for weight, product in zip(weights, products, strict=True):
                product.forward(inputs[weight.shape[1]])
                product.backward(inputs[weight.shape[0]])
            seconds.append(time.perf_counter() - started)
    return 4 * rows * sum(weight.numel() for weight in weights) / min(seconds) / 1e9


if __name__ == "__main__":
    sys.exit(contender(*sys.argv[1:]))
