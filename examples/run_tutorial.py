"""Run the whole tutorial: start the local API, call the five scripts in order, show what came of it.

`make tutorial` calls this. It works in .tutorial/ and never touches your own files; it always talks to its own local
API on a free port, whatever your .env or your environment name, so it cannot spend money.

    python examples/run_tutorial.py
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".tutorial"
DATA = WORK / "local_api"
CACHE = ROOT / ".local_api" / "cache"  # shared with `python -m local_api`, so that the base model is fetched once
STOP_SECONDS = 15
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

# The steps as README.md shows them.
STEPS = (
    "python prepare_training_data.py",
    "python fine_tune.py",
    "python check_fine_tune_status.py --wait",
    'python use_fine_tuned_model.py "I forgot my password. How do I log in again?"',
    "python test_model.py",
)


def own_environment(base_url: str) -> dict[str, str]:
    """Return the environment of the scripts: nothing in it leads to another server, a key or a proxy."""
    foreign = ("OPENAI_", "AZURE_OPENAI_", "FINE_TUNE", "TIKTOKEN_", "LOCAL_API_")
    kept = {k: v for k, v in os.environ.items() if not k.upper().startswith(foreign) and "PROXY" not in k.upper()}
    return {
        **kept,
        "OPENAI_API_KEY": "local",
        "OPENAI_BASE_URL": base_url,
        "FINE_TUNE_MODEL": "smollm2-135m-instruct",
        "TIKTOKEN_CACHE_DIR": str(CACHE / "tiktoken"),
        "PYTHON_DOTENV_DISABLED": "1",  # python-dotenv's own switch: .env is not read
        "PYTHONUNBUFFERED": "1",
    }


def prepare_base_model() -> None:
    """Fetch and convert the base model, if this is the first run; say what is reused otherwise."""
    sys.path.insert(0, str(ROOT))
    from local_api import base_models

    name = base_models.DEFAULT_BASE_MODEL
    if base_models.converted_dir(CACHE).is_dir():
        print(f"Reusing the installed packages (.venv) and the converted base model {name}.")
        return
    try:
        base_models.prepare(name, CACHE, print)
    except base_models.ModelUnavailable as error:
        raise SystemExit(f"{error}") from None


def interrupt(*_) -> None:
    raise KeyboardInterrupt


@contextmanager
def signals_held() -> Iterator[None]:
    """Let a stop signal wait to the end of the block: a server that is just starting would else be left behind."""
    arrived: list[int] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, _: arrived.append(number))
    yield
    for number in STOP_SIGNALS:
        signal.signal(number, interrupt)
    if arrived:
        interrupt()


def start_server() -> subprocess.Popen[str]:
    """Start the local API on a free port."""
    command = [sys.executable, "-m", "local_api", "--port", "0", "--data-dir", str(DATA), "--cache-dir", str(CACHE)]
    with open(WORK / "local_api.log", "w", encoding="utf-8") as log:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=own_environment("http://127.0.0.1"),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            # Ctrl-C in this terminal must reach us first: we then stop the server in order.
            start_new_session=os.name == "posix",
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )


def address(server: subprocess.Popen[str]) -> str:
    """Return the server's base URL once it answers."""
    assert server.stdout is not None
    ready = re.search(r"http://\S+/v1", server.stdout.readline())
    if not ready:
        raise SystemExit("The local API did not start; .tutorial/local_api.log says why.")
    return ready[0]


def cancel_unfinished_jobs(base_url: str) -> None:
    """An interrupted run leaves a job that would be trained first; this run wants its own."""
    from openai import OpenAI

    client = OpenAI(api_key="local", base_url=base_url)
    for job in client.fine_tuning.jobs.list():
        if job.status not in ("succeeded", "failed", "cancelled"):
            client.fine_tuning.jobs.cancel(job.id)
            print(f"Cancelled {job.id}, which an interrupted run had left unfinished.")


def stop_server(server: subprocess.Popen[str]) -> None:
    for number in STOP_SIGNALS:  # a second Ctrl-C must not leave it behind
        signal.signal(number, signal.SIG_IGN)
    server.terminate()
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def run_step(number: int, command: str, environment: dict[str, str]) -> int:
    """Show a README command, run it in .tutorial/ and return its exit code."""
    print(f"\n=== Step {number} of {len(STEPS)}\n$ {command}\n", flush=True)
    _, script, *arguments = shlex.split(command)
    started = time.monotonic()
    code = subprocess.run([sys.executable, str(ROOT / script), *arguments], cwd=WORK, env=environment).returncode
    print(f"\n(step {number} took {time.monotonic() - started:.0f} s)", flush=True)
    return code


def main() -> int:
    for number in STOP_SIGNALS:  # SIGHUP: the terminal was closed
        signal.signal(number, interrupt)
    started = time.monotonic()
    WORK.mkdir(exist_ok=True)
    server = None
    try:
        prepare_base_model()
        with signals_held():
            server = start_server()
        base_url = address(server)
        print(f"Local API started at {base_url} (its log: .tutorial/local_api.log)", flush=True)
        cancel_unfinished_jobs(base_url)
        for number, command in enumerate(STEPS, start=1):
            code = run_step(number, command, own_environment(base_url))
            if code:
                print(f"\nStep {number} ended with exit code {code}; the lines above say why.", file=sys.stderr)
                return code
    except KeyboardInterrupt:
        print("\nInterrupted; the local API is stopped.", file=sys.stderr)
        return 130
    finally:
        if server:
            stop_server(server)
    port = urlsplit(base_url).port
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes. The results: .tutorial/test_results.json")
    print("The local API was stopped. To ask your model more questions, start it again where it left off:")
    print(f"  python -m local_api --port {port} --data-dir .tutorial/local_api --cache-dir .local_api/cache")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
