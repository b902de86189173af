"""How close test_model.py comes to the ideal of asking many questions at a time, and what its order brings.

A server on this machine answers every call after 200 ms. 200 cases are 400 calls, base and fine-tuned; at 16 a time the
ideal is 400 / 16 * 0.2 s = 5 s. Measured is ModelTester.run_test_cases(), journal and checks included, start-up (the
import of openai) apart; beside it, 40 of the calls in a plain loop with the SDK, scaled to 400. The server runs in a
process of its own.

With --order URL BASE TUNED, a local API and its two models: the answers to TechFlow's first 16 cases, one model after
the other (as test_model.py asks) and interleaved, in turn and twice each.

    python benchmarks/test_model.py
    python benchmarks/test_model.py --order http://127.0.0.1:8321/v1 smollm2-135m-instruct ft:...
"""

import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

CASES, CONCURRENCY, DELAY = 200, 16, 0.2
CALLS = 2 * CASES
LOOP_CALLS = 40


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer in two writes costs 40 ms more

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(DELAY)
        answer = json.dumps(
            {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "created": 1,
                "model": body["model"],
                "usage": {"prompt_tokens": 50, "completion_tokens": 60, "total_tokens": 110},
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": "stop",
                        "message": {"role": "assistant", "content": "An answer. " * 30},
                    }
                ],
            }
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128


def serve(port):
    server = Server(("127.0.0.1", 0), Handler)
    port.value = server.server_address[1]
    server.serve_forever()


def run(folder: str, base: str, tuned: str, cases: list[dict], interleaved: bool = False) -> float:
    """Return the seconds that all answers took, with a new journal."""
    import test_model
    from test_model import AT_ONCE_LOCALLY, ModelTester

    test_model.JOURNAL = Path(folder) / f"{time.monotonic_ns()}.jsonl"
    tester = ModelTester(tuned, base)
    start = time.perf_counter()
    if interleaved:
        pairs = [(model, case) for case in cases for model in (base, tuned)]
        with ThreadPoolExecutor(AT_ONCE_LOCALLY) as pool:
            list(pool.map(lambda pair: tester.ask(*pair), pairs))
    else:
        tester.run_test_cases(cases)
    seconds = time.perf_counter() - start
    assert test_model.JOURNAL.read_text("utf-8").count("\n") == 2 * len(cases), "calls failed"
    return seconds


def order(base: str, tuned: str) -> None:
    from test_model import CASES_FILE, read_cases

    cases = read_cases(CASES_FILE)[0][:16]
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            after, mixed = run(folder, base, tuned, cases), run(folder, base, tuned, cases, interleaved=True)
            print(f"one model after the other {after:6.2f} s, interleaved {mixed:6.2f} s: {mixed / after:.2f} times")


def main() -> None:
    if sys.argv[1:2] == ["--order"]:
        os.environ.update(OPENAI_BASE_URL=sys.argv[2], OPENAI_API_KEY="local")
        return order(*sys.argv[3:])
    port = multiprocessing.Value("i", 0)
    server = multiprocessing.Process(target=serve, args=(port,), daemon=True)
    server.start()
    while not port.value:
        time.sleep(0.01)
    os.environ.update(OPENAI_BASE_URL=f"http://127.0.0.1:{port.value}/v1", OPENAI_API_KEY="local")

    import test_model
    from test_model import PARAMETERS, ModelTester, connect

    row = {"question": "Question?", "system": "Be brief.", "history": [], "category": "all", "expected": "An answer."}
    row |= {"checks": [{"contains": ["answer"], "matches": ["^An"]}]}
    cases = [{**row, "id": f"case-{number}", "question": f"Question {number}?"} for number in range(CASES)]
    client = connect()  # pays for the import
    with tempfile.TemporaryDirectory() as folder:
        took = run(folder, "base", "fine-tuned", cases)
        tester = ModelTester("fine-tuned", "base")  # with the journal of that run
        start = time.perf_counter()
        tester.run_test_cases(cases)
        repeated = time.perf_counter() - start
        assert test_model.JOURNAL.read_text("utf-8").count("\n") == CALLS

    start = time.perf_counter()
    for case in cases[:LOOP_CALLS]:
        messages = [{"role": "user", "content": case["question"]}]
        client.chat.completions.create(model="base", messages=messages, **PARAMETERS)
    loop = (time.perf_counter() - start) * CALLS / LOOP_CALLS

    ideal = CALLS / CONCURRENCY * DELAY
    print(f"{CALLS} calls of {DELAY * 1000:.0f} ms, {CONCURRENCY} at a time, on {os.cpu_count()} cores")
    print(f"ideal              {ideal:6.2f} s   1.00")
    print(f"test_model.py      {took:6.2f} s   {took / ideal:.2f}   (allowed: 1.15)")
    print(f"sequential loop    {loop:6.2f} s  {loop / ideal:5.2f}")
    print(f"from the journal   {repeated:6.2f} s   {repeated / ideal:.2f}")
    server.terminate()


if __name__ == "__main__":
    main()
