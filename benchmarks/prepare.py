"""How fast prepare_training_data.py is, and how much memory it takes, against a floor and a naive script.

    python benchmarks/prepare.py                    # 10 and 100 MB of JSON Lines, three rounds
    python benchmarks/prepare.py --sizes 400 --rounds 1

Each contender runs in a process of its own, on the same file, in turn, so that only ratios within one run are meant:
    floor    tiktoken's encode_ordinary over the same texts, in blocks of 200 on all cores, and nothing else: texts are
             in memory before the clock starts. It needs the vocabulary, so loading that is in its time, as in all.
    naive    what a tutorial usually shows: json.loads for every line, encode for every message, json.dumps
    script   prepare_training_data.py, whole: reads, judges, compares, counts and writes
"cpu" is processor time, which other work on the machine disturbs less than the clock. The texts are random slices of
the documentation strings in Python's own library, no row twice, under one system prompt, as in real training data.
Needs the vocabulary in tiktoken's cache (TIKTOKEN_CACHE_DIR).
"""

import argparse
import ast
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENCODING = "o200k_base"
SYSTEM = (
    "You are an assistant for Python's standard library. Answer from its documentation, and say so if it is silent."
)


def documentation() -> str:
    """Return the documentation strings of Python's library, some 4 MB."""
    texts = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        with suppress(SyntaxError, ValueError):
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                    texts.append(ast.get_docstring(node) or "")
    return "\n\n".join(filter(None, texts)).replace("<|", "<")


def write_rows(path: Path, megabytes: int, mean_chars: int):
    """Write chats of one to three turns until the file has that many megabytes."""
    choose, pool = random.Random(7), documentation()
    size = number = 0
    with open(path, "w", encoding="utf-8", newline="\n") as output:
        while size < megabytes * 1_000_000:
            messages = [{"role": "system", "content": SYSTEM}]
            for turn in range(2 * choose.randint(1, 3)):
                start, length = choose.randrange(len(pool)), 60 + int(choose.expovariate(1 / mean_chars))
                text = f"{number}.{turn} {pool[start : start + length]}"
                messages.append({"role": ("user", "assistant")[turn % 2], "content": text})
            line = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
            size, number = size + len(line.encode()), number + 1
            output.write(line)


def run_floor(path: str):
    import tiktoken

    with open(path, encoding="utf-8") as file:
        texts = [message["content"] for line in file for message in json.loads(line)["messages"]]
    start = time.perf_counter()
    encode = tiktoken.get_encoding(ENCODING).encode_ordinary
    blocks = [texts[at : at + 200] for at in range(0, len(texts), 200)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tokens = sum(pool.map(lambda block: sum(len(encode(text)) for text in block), blocks))
    print(json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens}))


def run_naive(path: str):
    import tiktoken

    start = time.perf_counter()
    encode = tiktoken.get_encoding(ENCODING).encode
    with open(path, encoding="utf-8") as file:
        examples = [json.loads(line) for line in file]
    tokens = sum(len(encode(message["content"])) for example in examples for message in example["messages"])
    with open(path + ".naive", "w", encoding="utf-8") as output:
        for example in examples:
            output.write(json.dumps(example, ensure_ascii=False) + "\n")
    print(json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens}))


def run_script(path: str):
    start = time.perf_counter()
    sys.path.insert(0, str(ROOT))
    import prepare_training_data

    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    prepare_training_data.main([path, "-o", path + ".out", "--system", ""])
    print(json.dumps({"seconds": time.perf_counter() - start}), file=sys.__stdout__)


def measure(contender: str, path: Path) -> dict:
    """Run one contender in a process of its own; return what it printed, with its peak memory in MB."""
    process = subprocess.Popen([sys.executable, __file__, contender, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{contender} failed on {path}")
    return json.loads(output) | {
        "cpu": usage.ru_utime + usage.ru_stime,
        "memory": usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3),
    }


def main() -> int:
    contenders = {"floor": run_floor, "naive": run_naive, "script": run_script}
    if len(sys.argv) == 3 and sys.argv[1] in contenders:
        contenders[sys.argv[1]](sys.argv[2])
        return 0
    if len(sys.argv) == 5 and sys.argv[1] == "rows":
        write_rows(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100], metavar="MB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chars", type=int, default=550, help="mean length of a message")
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}; medians of {args.rounds} rounds")
    print(f"{'':>8}{'contender':>10}{'seconds':>9}{'cpu':>7}{'of floor':>10}{'of naive':>10}{'peak MB':>9}")
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            # In a process of its own: a child's peak memory is never less than its parent's.
            subprocess.run([sys.executable, __file__, "rows", str(path), str(size), str(args.chars)], check=True)
            results: dict = {contender: [] for contender in contenders}
            for _ in range(args.rounds):
                for contender, measured in results.items():
                    measured.append(measure(contender, path))
        seconds = {
            name: statistics.median(result["seconds"] for result in measured) for name, measured in results.items()
        }
        for name, measured in results.items():
            # throughput against the floor's and the naive script's: more is faster
            ratios = f"{seconds['floor'] / seconds[name]:>10.2f}{seconds['naive'] / seconds[name]:>10.2f}"
            cpu = statistics.median(result["cpu"] for result in measured)
            memory = max(result["memory"] for result in measured)
            print(f"{size:>5} MB{name:>10}{seconds[name]:>9.2f}{cpu:>7.2f}{ratios}{memory:>9.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
