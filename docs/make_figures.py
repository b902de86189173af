"""Make anew every result that the documents show, by running the tutorial as a reader would, and keep it in docs/run/.

    make figures        # then `make docs`; about an hour on two quiet cores, and nothing else should run meanwhile

docs/run/transcript.txt     what steps 1 to 5 print, and step 6's comparison
docs/run/result.csv         the result file of that job: loss and token accuracy of every step
docs/run/test_results.json  what step 5 leaves: every question, both answers, every check
docs/run/seeds.json         the summaries of four more first rounds: the same rows, other seeds
docs/run/rounds.json        the summaries of the later rounds, on the 42 test cases and on the fresh ones
docs/run/education.json     the summary of the education dataset's test
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import run_tutorial

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "docs" / "run"
WORK = ROOT / ".figures"
SEEDS = (1, 2, 3, 4)
TECHFLOW, EDUCATION = "examples/techflow_support", "examples/education"
EDUCATION_PROMPT = (
    "You are an educational assistant for students and teachers. You explain school subjects and teaching practice "
    "correctly, in plain words that suit the learner's age, and you help students to think for themselves."
)


class Runner:
    """Runs the scripts in .figures/ against a local API of its own."""

    def __init__(self, base_url: str):
        self.environment = {**run_tutorial.own_environment(base_url), "PYTHONUTF8": "1", "COLUMNS": "80"}

    def __call__(self, command: str) -> str:
        """Run a command of the guide, show it, and return what it prints."""
        print(f"\n$ {command}", flush=True)
        _, script, *arguments = shlex.split(command)
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *arguments],
            cwd=WORK,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )
        print(done.stdout, flush=True)
        if done.returncode:
            raise SystemExit(f"{command} ended with {done.returncode}")
        return f"$ {command}\n{done.stdout}\n"

    def train(self, training_file: str, options: str = "") -> str:
        """Train a model and return its name."""
        self(f"python fine_tune.py {training_file} {options}")
        self("python check_fine_tune_status.py --wait")
        return read(WORK / "fine_tune_job.json")["fine_tuned_model"]

    def test(self, options: str = "") -> dict:
        """Test the latest model and return the summary."""
        self(f"python test_model.py --output summary.json {options}")
        return read(WORK / "summary.json")["summary"]


def read(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


def keep(name: str, value: object) -> None:
    (RUN / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def first_round(run: Runner, base_url: str) -> str:
    """Run steps 1 to 5; return the model's name."""
    from openai import OpenAI

    transcript = "".join(run(command) for command in run_tutorial.STEPS)
    (RUN / "transcript.txt").write_text(transcript, encoding="utf-8")
    shutil.copy(WORK / "test_results.json", RUN)
    record, client = read(WORK / "fine_tune_job.json"), OpenAI(api_key="local", base_url=base_url)
    job = client.fine_tuning.jobs.retrieve(record["job_id"])
    (RUN / "result.csv").write_bytes(client.files.content(job.result_files[0]).read())
    return record["fine_tuned_model"]


def later_round(run: Runner, first: str, order: str) -> dict:
    """Train a later round; return its summaries, compared with the model of round 1."""
    model = run.train(order)
    against = f"{model} --base-model {first}"
    fresh = run.test(f"{against} --cases {TECHFLOW}/fresh_cases.json")
    return {"cases": run.test(against), "fresh": fresh}


def main() -> int:
    run_tutorial.WORK, run_tutorial.DATA = WORK, WORK / "local_api"
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir()
    shutil.copytree(ROOT / "examples", WORK / "examples")
    run_tutorial.prepare_base_model()
    server = run_tutorial.start_server()
    try:
        base_url = run_tutorial.address(server)
        run = Runner(base_url)
        first = first_round(run, base_url)
        rows = f"{TECHFLOW}/qa_pairs.json {TECHFLOW}/round_2.json"
        run(f"python prepare_training_data.py {rows} -o round_2_data.jsonl")
        run(f"python prepare_training_data.py {TECHFLOW}/round_2.json -o new_rows.jsonl")
        run(f"python prepare_training_data.py {rows} {TECHFLOW}/round_3.json -o round_3_data.jsonl")
        rounds = {"round 2": later_round(run, first, "round_2_data.jsonl --suffix round-2")}
        run(
            f"python prepare_training_data.py {EDUCATION}/qa_pairs.json -o education_data.jsonl "
            f"--system {shlex.quote(EDUCATION_PROMPT)}"
        )
        run.train("education_data.jsonl", "--suffix education")
        keep("education.json", run.test(f"--cases {EDUCATION}/test_cases.json"))
        keep("seeds.json", [run.test(run.train("training_data.jsonl", f"--seed {seed}")) for seed in SEEDS])
        rounds["continued"] = later_round(run, first, f"new_rows.jsonl --model {first} --suffix continued")
        rounds["round 3"] = later_round(run, first, "round_3_data.jsonl --suffix round-3")
        keep("rounds.json", rounds)
    finally:
        run_tutorial.stop_server(server)
    print("docs/run/ is new. Now: make docs, and the figures in README.md and docs/iterating.md by hand.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
