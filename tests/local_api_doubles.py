"""Stand-ins for the two parts of local_api that need PyTorch, so that the rest is tested in seconds.

`FakeEngine` answers like local_api.engine.Engine; TRAINER is a script that writes what local_api.train writes, step by
step, and is told what to do by the training file's first message. tests/test_local_api_model.py runs the real ones.
"""

import itertools
import json
import os
import sys
import threading
import time
from contextlib import contextmanager

TRAINER = r"""
import json, os, signal, sys, time
from pathlib import Path

from local_api.processes import lock_job

directory = Path(sys.argv[-1])
lock = lock_job(directory)
if not lock:
    sys.exit("another trainer is at work here")
job = json.loads((directory / "job.json").read_text())
first = json.loads(open(job["training_file"]).readline())["messages"][0]["content"]
known = ("held", "stubborn", "slow", "endless", "crash", "fail", "no memory", "nan", "full disk", "killed each epoch")
behaviour = first if first in known else "normal"
asked_to_stop = []
signal.signal(signal.SIGTERM, lambda *_: behaviour == "stubborn" or asked_to_stop.append(1))
n_epochs = job["hyperparameters"]["n_epochs"]
n_epochs = 5 if n_epochs == "auto" else n_epochs
steps, pause = n_epochs * 2, 0.15 if behaviour in ("slow", "endless") else 0.01
steps = 10_000 if behaviour == "endless" else steps
go = directory.parent.parent / "go"  # what a trainer that is held, or stubborn too, waits for after its third step
text = (directory / "events.jsonl").read_bytes() if (directory / "events.jsonl").exists() else b""
(directory / "events.jsonl").write_bytes(text[: text.rfind(b"}\n") + 2] if b"}\n" in text else b"")
events = open(directory / "events.jsonl", "a")

def report(**line):
    events.write(json.dumps({"created_at": int(time.time()), **line}) + "\n")
    events.flush()

def save_adapter(folder):
    for missing in (folder.parent, folder):
        missing.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_text(f"adapter of {job['id']} on {job['adapter']}")

def write(path, text):
    (directory / "unfinished").write_text(text)
    os.replace(directory / "unfinished", path)

def finish(outcome):
    write(directory / "outcome.json", json.dumps(outcome))
    sys.exit(0)

if behaviour == "crash":
    sys.exit("RuntimeError: the trainer fell over")
if behaviour == "fail":
    error = {"code": "invalid_training_file", "message": "Line 3: too long", "param": "training_file"}
    finish({"status": "failed", "error": error})
if behaviour == "no memory":
    os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "full disk" and not go.exists():
    sys.exit(print("The trainer could not use its files: No space left on device.", file=sys.stderr) or 75)
resume = directory / "resume.pt"
done = int(resume.read_text()) if resume.exists() else 0
def report_step(step):
    loss = float("nan") if behaviour == "nan" else 1 / step
    report(level="info", type="metrics", message=f"Step {step}/{steps}: training loss={loss:.2f}",
           data={"step": step, "total_steps": steps, "train_loss": loss, "train_mean_token_accuracy": 0.5})

report(type="update", hyperparameters={"n_epochs": n_epochs, "batch_size": 2, "learning_rate_multiplier": 1.0})
for step in range(1, done + 1):  # the server knows most of them: it takes each once
    report_step(step)
for step in range(done + 1, steps + 1):
    time.sleep(pause)
    while behaviour in ("held", "stubborn") and step == 4 and not go.exists() and not asked_to_stop:
        time.sleep(0.01)
    if asked_to_stop:
        write(resume, str(step - 1))
        sys.exit(0)
    report_step(step)
    if step % 2 == 0:
        folder = directory / "checkpoints" / f"step-{step}"
        save_adapter(folder)
        write(folder / "metrics.json", json.dumps({
            "step_number": step, "created_at": int(time.time()), "metrics": {"step": step, "train_loss": 1 / step}}))
        write(resume, str(step))
        if behaviour == "killed each epoch":
            os.kill(os.getpid(), signal.SIGKILL)
save_adapter(directory / "adapter")
columns = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
(directory / "result.csv").write_text(columns + "\n1,1.0,0.5,,\n")
os.fsync(events.fileno())  # from here on a cut of power takes nothing from it
finish({"status": "succeeded", "trained_tokens": 1234})
"""

ENDS = ("succeeded", "failed", "cancelled")


class FakeEngine:
    """Answers every question with "You said: " and the question, a word a piece.

    A question "slow" is answered with words for ever, one each 20 ms, until it is cancelled or has max_tokens;
    "too long" is refused, "broken" fails after two words.
    """

    def __init__(self):
        self.requests, self.closed = [], False
        self.cancelled = threading.Event()

    def submit(self, request):
        from local_api.generation import Generation

        self.submit_together([Generation(request)])

    def submit_together(self, generations):
        from local_api.generation import EngineError

        for generation in generations:
            self.requests.append(generation.request)
            if generation.request.messages[-1]["content"] == "too long":
                raise EngineError("This model's maximum context length is 512 tokens.", "context_length_exceeded")
            threading.Thread(target=self.answer, args=(generation,), daemon=True).start()

    def answer(self, generation):
        from local_api.generation import EngineError, Piece

        request = generation.request
        question = request.messages[-1]["content"]
        generation.prompt_tokens = sum(len(message["content"].split()) for message in request.messages)
        words = itertools.repeat("on") if question == "slow" else f"You said: {question}".split()
        for number, word in enumerate(f"{word} " for word in words):
            if generation.cancelled:
                self.cancelled.set()
                return
            if self.closed:
                generation.put(EngineError("The server is shutting down.", "server_shutting_down"))
                return
            if question == "broken" and number == 2:
                generation.put(EngineError("The model broke.", "server_error"))
                return
            if question == "slow":
                time.sleep(0.02)
            if number == (request.max_tokens or 1000):
                generation.put(Piece("", None, "length"))
                return
            generation.completion_tokens += 1
            generation.put(Piece(word, self.logprobs(request, word)))
        generation.put(Piece("", None, "stop"))

    def logprobs(self, request, word):
        if not request.logprobs:
            return None
        entry = {"token": word, "logprob": -0.5, "bytes": list(word.encode())}
        return [{**entry, "top_logprobs": [entry] * request.top_logprobs}]

    def close(self):
        self.closed = True


def training_file(first="hello", rows=12):
    """Return the bytes of a training file; its first message tells TRAINER what to do."""
    lines = []
    for number in range(rows):
        question = first if number == 0 else f"Question {number}: what is {number} and {number}?"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": f"It is {2 * number}."}]
        lines.append(json.dumps({"messages": messages}))
    return "\n".join(lines).encode()


def hurry():
    """Let the worker look more often: what it waits for in these tests takes no time."""
    from local_api import worker

    worker.POLL_SECONDS, worker.IDLE_SECONDS, worker.MAX_WAIT_SECONDS = 0.02, 0.1, 0.1


@contextmanager
def running(data_dir, engine=None, base_models=None, **settings):
    """Run the application with the doubles behind a real socket, in this process; yields (base URL, app)."""
    import uvicorn

    from local_api.app import Connection, Settings, create_app

    hurry()
    base_model, trainer = data_dir.parent / "tiny-base", data_dir.parent / "fake_trainer.py"
    base_model.mkdir(exist_ok=True)  # the doubles never look inside
    trainer.write_text(TRAINER)
    app = create_app(Settings(data_dir, base_models=base_models or [str(base_model)], **settings),
                     engine=engine or FakeEngine(), trainer_command=[sys.executable, str(trainer)])  # fmt: skip
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=Connection, log_config=None, timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", app
    finally:
        server.should_exit = True
        thread.join()


def wait_for(job_id, client, *statuses, seconds=30):
    """Poll a job until it has one of these statuses (by default, an end) and return it."""
    deadline = time.monotonic() + seconds
    while (job := client.fine_tuning.jobs.retrieve(job_id)).status not in (statuses or ENDS):
        assert time.monotonic() < deadline, f"the job is still {job.status}"
        assert job.status not in ENDS, f"the job {job.status}: {job.error}"
        time.sleep(0.05)
    return job


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def steps(client, job):
    events = client.fine_tuning.jobs.list_events(job.id, limit=100)
    return [event.data["step"] for event in events if event.type == "metrics"][::-1]


def main():
    """`python -m local_api` with the doubles in place of what needs PyTorch: for tests that kill processes."""
    from functools import partial

    import local_api.__main__ as server

    hurry()
    server.TRAINER_COMMAND = [sys.executable, sys.argv.pop(1)]
    server.create_app = partial(server.create_app, engine=FakeEngine())
    if "FAULT_PLAN" in os.environ:
        import fault_points

        fault_points.install_in_server()
    return server.main()


if __name__ == "__main__":
    sys.exit(main())
