"""Make anew every result that the documents show, by running the tutorial as a reader would, and keep it in docs/run/.

    make figures        # then `make docs`; nine trainings: about two hours on two cores

A model that is trained once is kept in .figures/, so that a run that was cut off goes on; `make clean` forgets it.

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

    def __call__(self, command: str) -> None:
        """Run a command of the guide, and show it with what it prints."""
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

    def train(self, training_file: str, suffix: str, options: str = "") -> str:
        """Train a model, unless an earlier run has done it, and return its name."""
        trained = WORK / f"trained-{suffix}.json"
        if not trained.exists():
            self(f"python fine_tune.py {training_file} --suffix {suffix} {options}")
            self("python check_fine_tune_status.py --wait")
            shutil.copy(WORK / "fine_tune_job.json", trained)
        return read(trained)["fine_tuned_model"]

    def test(self, model: str, options: str = "", cases: str = f"{TECHFLOW}/test_cases.json") -> dict:
        """Test a model against its base model, or another, and return the summary."""
        self(f"python test_model.py {model} --cases {cases} --output summary.json {options}")
        return read(WORK / "summary.json")["summary"]


def read(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


def keep(name: str, value: object) -> None:
    (RUN / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def first_round(run: Runner, base_url: str) -> str:
    """Run steps 1 to 5; keep what they leave and return the model's name."""
    from openai import OpenAI

    run("python prepare_training_data.py")
    model = run.train("training_data.jsonl", "techflow-support")
    run(f'python use_fine_tuned_model.py {model} "I forgot my password. How do I log in again?"')
    run.test(model)
    shutil.copy(WORK / "summary.json", RUN / "test_results.json")
    client = OpenAI(api_key="local", base_url=base_url)
    job = client.fine_tuning.jobs.retrieve(read(WORK / "trained-techflow-support.json")["job_id"])
    (RUN / "result.csv").write_bytes(client.files.content(job.result_files[0]).read())
    return model


def later_round(run: Runner, model: str, first: str) -> dict:
    """Compare a later round's model with that of round 1; return the summaries."""
    against = f"--base-model {first}"
    fresh = run.test(model, against, f"{TECHFLOW}/fresh_cases.json")
    return {"cases": run.test(model, against), "fresh": fresh}


def main() -> int:
    run_tutorial.WORK, run_tutorial.DATA = WORK, WORK / "local_api"
    WORK.mkdir(exist_ok=True)
    shutil.copytree(ROOT / "examples", WORK / "examples", dirs_exist_ok=True)
    run_tutorial.prepare_base_model()
    server = run_tutorial.start_server()
    try:
        base_url = run_tutorial.address(server)
        run_tutorial.cancel_unfinished_jobs(base_url)
        run = Runner(base_url)
        first = first_round(run, base_url)
        run(
            f"python prepare_training_data.py {EDUCATION}/qa_pairs.json -o education_data.jsonl "
            f"--system {shlex.quote(EDUCATION_PROMPT)}"
        )
        education = run.train("education_data.jsonl", "education")
        keep("education.json", run.test(education, cases=f"{EDUCATION}/test_cases.json"))
        rows = f"{TECHFLOW}/qa_pairs.json {TECHFLOW}/round_2.json"
        run(f"python prepare_training_data.py {rows} -o round_2_data.jsonl")
        round_2 = run.train("round_2_data.jsonl", "round-2")
        rounds = {"round 2": later_round(run, round_2, first)}
        seeds = [run.train("training_data.jsonl", f"seed-{seed}", f"--seed {seed}") for seed in SEEDS]
        keep("seeds.json", [run.test(model) for model in seeds])
        run(f"python prepare_training_data.py {TECHFLOW}/round_2.json -o new_rows.jsonl")
        continued = run.train("new_rows.jsonl", "continued", f"--model {first}")
        rounds["continued"] = later_round(run, continued, first)
        run(f"python prepare_training_data.py {rows} {TECHFLOW}/round_3.json -o round_3_data.jsonl")
        round_3 = run.train("round_3_data.jsonl", "round-3")
        rounds["round 3"] = later_round(run, round_3, first)
        keep("rounds.json", rounds)
    finally:
        run_tutorial.stop_server(server)
    print("docs/run/ is new. Now: make docs, and the figures in README.md and docs/iterating.md by hand.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
