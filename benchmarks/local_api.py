"""How fast the local API trains, answers and serves, each against a named baseline in the same run.

    python benchmarks/local_api.py                       # all three parts
    python benchmarks/local_api.py generation --rounds 5

Only ratios within one run mean something: measured and baseline take turns, round by round, and the median of the
rounds' ratios is shown. The model is the default base model, fetched on first use. Baselines run in processes of their
own, as a plain script would.

    training     tokens/s and loss on unseen rows; baseline: TRL's SFTTrainer with its defaults (training.py says more)
    generation   tokens/s of one answer alone and of 8 at once, prompt included; baseline: one `transformers.generate`
                 in float32 with the same question, greedy
    serving      a real server: how soon it answers, how fast it tells a job's status while it trains and writes 8
                 answers, what memory it takes; baselines: a plain transformers script (import, load in float32,
                 generate) and the same server when idle
"""

import argparse
import contextlib
import functools
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CACHE = ROOT / ".local_api" / "cache"
TOKENS = 48  # an answer's length: all of them are cut there
TOPICS = ["a lighthouse", "a clock", "an island", "a baker", "a winter", "a violin", "a harbour", "a comet"]


class Figure(NamedTuple):
    """A line of the result: what was measured, its baseline, their ratio and the bar it has to reach."""

    what: str
    measured: str
    baseline: str
    ratio: float | None
    target: str


def question(number: int) -> list[dict]:
    return [
        {"role": "user", "content": f"Write a long story about {TOPICS[number % len(TOPICS)]}, in many paragraphs."}
    ]


def base_model() -> Path:
    from local_api import base_models

    return base_models.prepare(base_models.DEFAULT_BASE_MODEL, CACHE, print)


# Training


def training(args: argparse.Namespace) -> list[Figure]:
    import training as part  # beside this file

    return [Figure(*line) for line in part.measure(args)]


# Generation


def some_adapter(model_dir: Path, folder: Path) -> Path:
    """Save a LoRA adapter of the trainer's shape, which changes the model's answers a little, and return its folder."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from local_api.step import LORA

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), LoraConfig(task_type="CAUSAL_LM", **LORA))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=1e-3)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@functools.cache
def plain_model(model_dir: Path) -> tuple:
    os.environ.pop("OMP_WAIT_POLICY", None)  # ours, not a plain script's
    os.environ.pop("GOMP_SPINCOUNT", None)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from local_api.base_models import quiet_transformers

    quiet_transformers()
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(model_dir)


def plain_generate(model_dir: Path) -> float:
    """Answer one question as a plain script does, in its own process; return tokens/s."""
    model, tokenizer = plain_model(model_dir)
    prompt = tokenizer.apply_chat_template(question(0), add_generation_prompt=True, return_tensors="pt",
                                           return_dict=True)  # fmt: skip
    started = time.perf_counter()
    output = model.generate(**prompt, max_new_tokens=TOKENS, do_sample=False)
    return (output.shape[1] - prompt["input_ids"].shape[1]) / (time.perf_counter() - started)


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """Let another process keep one core busy meanwhile."""
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        neighbour.kill()
        neighbour.wait()


def generation(args: argparse.Namespace) -> list[Figure]:
    from local_api.base_models import BUSY_LOOPS, quiet_transformers, share_processor
    from local_api.engine import Engine
    from local_api.generation import GenerationRequest

    share_processor(BUSY_LOOPS)  # as the server does

    from local_api import products  # which imports PyTorch

    quiet_transformers()
    model_dir = base_model()
    other = ProcessPoolExecutor(1, get_context("spawn"))
    with other, tempfile.TemporaryDirectory() as folder:
        models = {"base": (model_dir, None), "fine-tuned": (model_dir, some_adapter(model_dir, Path(folder)))}
        engine = Engine(models.__getitem__)

        def ours(model: str, count: int) -> float:
            started = time.perf_counter()
            answers = [engine.submit(GenerationRequest(model, question(number), TOKENS, temperature=0.0))
                       for number in range(count)]  # fmt: skip
            for answer in answers:
                list(answer)
            return sum(answer.completion_tokens for answer in answers) / (time.perf_counter() - started)

        def baseline() -> float:
            return other.submit(plain_generate, model_dir).result()

        cases = [(model, count, busy) for busy in (False, True) for model in models for count in (1, 8)]
        for model in models:  # loaded and warm, as the baseline is
            ours(model, 1)
        baseline()
        measured: dict[tuple[str, int, bool], list[tuple[float, float]]] = {case: [] for case in cases}
        for _ in range(args.rounds):
            for model, count, busy in cases:
                with busy_core() if busy else contextlib.nullcontext():
                    measured[model, count, busy].append((ours(model, count), baseline()))
        engine.close()
    for kind, chosen in products.CHOSEN.items():
        ways = ", ".join(f"{rows} {way}" for rows, way in chosen.items())
        print(f"Products with {kind[0]} x {kind[1]} weights: {ways}")
    bars = {(1, False): 2.0, (8, False): 8.0, (1, True): 1.5, (8, True): 6.0}
    return [
        Figure(f"{model} model, {'one alone' if count == 1 else f'{count} at once'}{', beside a busy core' * busy}",
               f"{statistics.median(mine for mine, _ in pairs):.0f} tokens/s",
               f"{statistics.median(theirs for _, theirs in pairs):.0f} tokens/s (transformers.generate, fp32)",
               statistics.median(mine / theirs for mine, theirs in pairs), f">= {bars[count, busy]:g} times")
        for (model, count, busy), pairs in measured.items()
    ]  # fmt: skip


# Serving

PLAIN_SCRIPT = """
import sys, time
started = time.perf_counter()
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Say hello."}], add_generation_prompt=True,
                                       return_tensors="pt", return_dict=True)
model.generate(**prompt, max_new_tokens=16, do_sample=False)
whole = time.perf_counter() - started
firsts = []
for _ in range(5):
    started = time.perf_counter()
    model.generate(**prompt, max_new_tokens=1, do_sample=False)
    firsts.append(time.perf_counter() - started)
print(whole, sorted(firsts)[2])
"""


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def memory(process: "psutil.Process") -> int:  # type: ignore[name-defined] # noqa: F821
    """Return the bytes that a process and its children hold; what they share counts once where the system tells."""
    import psutil

    held = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            full = one.memory_full_info()
            held += getattr(full, "pss", full.rss)
        except psutil.NoSuchProcess:
            continue
    return held


def serving(args: argparse.Namespace) -> list[Figure]:
    import httpx2
    import openai
    import psutil

    output = subprocess.run([sys.executable, "-c", PLAIN_SCRIPT, str(base_model())], capture_output=True, text=True)
    plain_whole, plain_first = (float(word) for word in output.stdout.split()[-2:])
    ask = {"model": "smollm2-135m-instruct", "messages": [{"role": "user", "content": "Say hello."}], "temperature": 0}

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "local_api", "--port", "0", "--data-dir", folder, "--cache-dir", str(CACHE)]
        started = time.perf_counter()
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            address = re.search(r"http://\S+/v1", server.stdout.readline())[0]
            httpx2.get(address.replace("/v1", "/healthz")).raise_for_status()
            healthy = time.perf_counter() - started
            client = openai.OpenAI(base_url=address, api_key="any", max_retries=0)
            client.chat.completions.create(**ask, max_tokens=16)
            answered = time.perf_counter() - started

            firsts = []
            for _ in range(5):
                begun = time.perf_counter()
                with client.chat.completions.create(**ask, max_tokens=16, stream=True) as stream:
                    next(chunk for chunk in stream if chunk.choices[0].delta.content)
                    firsts.append(time.perf_counter() - begun)
                time.sleep(0.5)

            with open(ROOT / "training_data.jsonl", "rb") as data:
                file = client.files.create(file=data, purpose="fine-tune").id
            job = client.fine_tuning.jobs.create(model=ask["model"], training_file=file,
                                                 hyperparameters={"n_epochs": 50}).id  # fmt: skip
            idle, busy, most = [], [], 0
            stop = threading.Event()

            def status(times: list[float]) -> None:
                begun = time.perf_counter()
                client.fine_tuning.jobs.retrieve(job)
                times.append(time.perf_counter() - begun)

            def keep_asking(number: int) -> None:
                while not stop.is_set():
                    client.chat.completions.create(**{**ask, "messages": question(number)}, max_tokens=TOKENS)

            while not any(event.type == "metrics" for event in client.fine_tuning.jobs.list_events(job)):
                time.sleep(0.2)
            threads = [threading.Thread(target=keep_asking, args=(number,)) for number in range(8)]
            for thread in threads:
                thread.start()
            until = time.perf_counter() + args.seconds
            while time.perf_counter() < until:
                status(busy)
                most = max(most, memory(psutil.Process(server.pid)))
                time.sleep(0.05)
            assert client.fine_tuning.jobs.retrieve(job).status == "running", "the job was over too soon"
            stop.set()
            for thread in threads:
                thread.join()
            client.fine_tuning.jobs.cancel(job)
            time.sleep(3)
            for _ in range(100):
                status(idle)
        finally:
            server.terminate()
            server.wait(15)
    first, p95_idle, p95 = statistics.median(firsts), percentile(idle, 0.95), percentile(busy, 0.95)
    return [
        Figure("start to /healthz", f"{healthy:.1f} s", "", None, "<= 2 s"),
        Figure("start to first answer", f"{answered:.1f} s", f"{plain_whole:.1f} s (a plain script)",
               answered / plain_whole, "<= 10 s"),
        Figure("first token, idle", f"{first * 1000:.0f} ms", f"{plain_first * 1000:.0f} ms (generate, fp32)",
               first / plain_first, "<= 500 ms"),
        Figure("a job's status (p95), full load", f"{p95 * 1000:.0f} ms", f"{p95_idle * 1000:.0f} ms (idle)",
               p95 / p95_idle, "<= 50 ms"),
        Figure("memory, server and trainer", f"{most / 1e9:.1f} GB", "", None, "<= 3 GB"),
    ]  # fmt: skip


PARTS: dict[str, Callable[[argparse.Namespace], list[Figure]]] = {
    "training": training,
    "generation": generation,
    "serving": serving,
}


def processor() -> str:
    """Return the processor's class and how many cores this process may use."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split("flags", 1)[-1].split("\n")[0].split() if cpuinfo.exists() else []
    features = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()} ({', '.join(features) or 'features unknown'}), {cores} cores"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each case is measured (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20, help="how long the server is under load (%(default)s)")
    parser.add_argument("--trl-python", default=sys.executable, metavar="PATH",
                        help="training: a Python that has trl; training.py says how to make one (default: this one)"
                        )  # fmt: skip
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")

    from local_api.base_models import share_processor

    share_processor()
    print(processor())
    for part in args.parts or PARTS:
        figures = PARTS[part](args)
        lines = [(part, "measured", "baseline", "ratio", "target")]
        for figure in figures:
            ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}"
            lines.append((figure.what, figure.measured, figure.baseline, ratio, figure.target))
        widths = [max(len(line[column]) for line in lines) for column in range(5)]
        print()
        for line in lines:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
