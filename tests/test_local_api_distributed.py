"""The trainer for several processes: what accelerate's launcher starts reaches what one process reaches.

Two CPU processes (gloo) stand for two GPUs. accelerate 1.15 turns FSDP on for accelerators alone, so that FSDP on
processors, which PyTorch 2.13 can do, is switched on by hand here.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_local_api_model import adapter_weights, events, make_job
from tiny_model import write_training_file

from conftest import ROOT
from local_api import __main__ as server
from local_api import train_distributed, worker
from local_api.encoding import Encoded
from local_api.train_distributed import cut, share, tensors

pytestmark = pytest.mark.skipif(os.name != "posix", reason="torchrun on Windows needs a PyTorch built with libuv")
CONFIGS = ROOT / "examples" / "scaling"
IN_FLOAT32 = """
import sys, torch
from local_api import base_models
base_models.best_dtype = lambda device: torch.float32
"""
TRAIN = "import os\nfrom local_api import train_distributed\nos._exit(train_distributed.main())"  # as the module ends
FSDP_ON_CPU = """
from accelerate import state
from accelerate.utils import DistributedType

def with_fsdp(self, *args, init=state.AcceleratorState.__init__, fsdp_plugin=None, **kwargs):
    init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

state.AcceleratorState.__init__ = with_fsdp
"""


# --- how a batch is shared ---


def row(length: int) -> Encoded:
    return Encoded(list(range(length)), [False] + [True] * (length - 1))


def test_every_row_is_computed_once_and_every_process_computes_as_many_parts():
    for rows, processes, tokens_at_once in [(7, 2, 20), (1, 4, 20), (9, 3, 1), (8, 2, 1000)]:
        batch = [row(3 + n) for n in range(rows)]
        parts = cut(batch, processes, tokens_at_once)
        shares = [share(batch, parts, process, processes) for process in range(processes)]
        assert {len(share_of_one) for share_of_one in shares} == {parts}
        computed = list(itertools.chain(*shares))
        trained = [row for part in computed for row in part.rows if any(row.trained)]
        assert sorted(trained) == sorted(batch)
        for part in computed:
            assert part.rows and part.batch_tokens == sum(sum(row.trained[1:]) for row in batch)
            assert len(part.rows) == 1 or len(part.rows) * max(len(row.ids) for row in part.rows) <= tokens_at_once


def test_a_part_without_a_row_trains_nothing():
    _, second = (share([row(4)], 1, process, 2)[0] for process in range(2))
    assert not tensors([second])["trained"].any() and tensors([second])["input_ids"].shape == (1, 4)


# --- jobs ---


def program(folder: Path, *parts: str) -> Path:
    path = folder / "program.py"
    path.write_text("\n".join([IN_FLOAT32, *parts]), encoding="utf-8")
    return path


def launch(config: str, program: Path, job_dir: Path, *options: str) -> subprocess.Popen:
    """Start the trainer as `--launcher` does; what it says is in the job's trainer.log."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
    with open(job_dir / "trainer.log", "ab") as log:
        return subprocess.Popen(
            [*command, "--main_process_port", "0", *options, str(program), str(job_dir)],
            cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip


def figures(job_dir: Path) -> list[float]:
    return [figure for event in events(job_dir) if event["type"] == "metrics" for figure in event["data"].values()]


def wait_for_step(job_dir: Path, launcher: subprocess.Popen) -> None:
    """Wait until the third step is reported; end the launcher if that takes too long."""
    deadline = time.monotonic() + 250
    while not (job_dir / "events.jsonl").exists() or "Step 3/" not in (job_dir / "events.jsonl").read_text("utf-8"):
        if time.monotonic() > deadline or launcher.poll() is not None:
            worker.stop_processes([psutil.Process(launcher.pid)])
            pytest.fail((job_dir / "trainer.log").read_text("utf-8"))
        time.sleep(0.01)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict:
    """11 rows in batches of 5: the last batch of an epoch has one row, so that one of two processes gets none."""
    folder = tmp_path_factory.mktemp("files")
    return {
        "training_file": str(write_training_file(folder / "training.jsonl", examples=11)),
        "validation_file": str(write_training_file(folder / "validation.jsonl", examples=3)),
        "hyperparameters": {"n_epochs": 9, "batch_size": 5, "learning_rate_multiplier": 3.0},
    }


@pytest.fixture(scope="module")
def alone(tiny_model, files, tmp_path_factory) -> Path:
    """The job, run undisturbed by the trainer of one process (local_api/train.py) in float32."""
    folder = tmp_path_factory.mktemp("alone")
    job_dir = make_job(folder / "job", tiny_model, **files)
    path = program(folder, "from local_api import train\nsys.exit(train.main())")
    subprocess.run([sys.executable, path, job_dir], cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return job_dir


def assert_the_same(job_dir: Path, alone: Path) -> None:
    outcome = json.loads((job_dir / "outcome.json").read_text("utf-8"))
    assert outcome == json.loads((alone / "outcome.json").read_text("utf-8"))
    assert len(figures(alone)) > 27 * 4 and figures(job_dir) == pytest.approx(figures(alone), rel=1e-3)
    assert (job_dir / "result.csv").read_text().count("\n") == 28
    names = [path.name for path in sorted((job_dir / "checkpoints").iterdir())]
    assert names == ["step-21", "step-24", "step-27"]
    for name, weights in adapter_weights(alone).items():
        assert (weights - adapter_weights(job_dir)[name]).norm() < 1e-2 * weights.norm(), name


@pytest.mark.slow
def test_two_processes_reach_what_one_reaches(tiny_model, files, alone, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from local_api import base_models

    job_dir = make_job(tmp_path / "job", tiny_model, **files)
    assert launch("two_processes_cpu.yaml", program(tmp_path, TRAIN), job_dir).wait(280) == 0
    assert_the_same(job_dir, alone)
    assert "share each batch: 2 (MULTI_CPU, mixed precision no)" in (job_dir / "events.jsonl").read_text("utf-8")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), job_dir / "adapter")
    assert model.peft_config["default"].base_model_name_or_path == "tiny"
    base_models.load(tiny_model, job_dir / "adapter")  # as the engine does


@pytest.mark.slow
def test_fsdp_spreads_the_model_and_reaches_the_same(tiny_model, files, alone, tmp_path):
    job_dir = make_job(tmp_path / "job", tiny_model, **files)
    options = ("--num_processes", "2", "--mixed_precision", "no")
    assert launch("fsdp.yaml", program(tmp_path, FSDP_ON_CPU, TRAIN), job_dir, *options).wait(280) == 0
    assert_the_same(job_dir, alone)
    assert "share each batch: 2 (FSDP, mixed precision no)" in (job_dir / "events.jsonl").read_text("utf-8")


@pytest.mark.slow
def test_two_processes_stop_together_and_one_goes_on(tiny_model, files, alone, tmp_path):
    job_dir, path = make_job(tmp_path / "job", tiny_model, **files), program(tmp_path, TRAIN)
    first = launch("two_processes_cpu.yaml", path, job_dir)
    wait_for_step(job_dir, first)
    first.send_signal(signal.SIGTERM)
    first.wait(60)
    assert not (job_dir / "outcome.json").exists(), "the job was over before it could be interrupted"
    subprocess.run([sys.executable, path, job_dir], cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert "Training goes on from step" in (job_dir / "events.jsonl").read_text("utf-8")
    assert_the_same(job_dir, alone)


def test_steps_whose_reports_a_cut_of_power_took_are_reported_again(tiny_model, files, tmp_path):
    job_dir = make_job(tmp_path / "job", tiny_model, **{**files, "hyperparameters": {"n_epochs": 1, "batch_size": 5}})
    assert train_distributed.run(job_dir, False, {"asked": True}) is None, "it was stopped after its first step"
    reported = (job_dir / "events.jsonl").read_bytes()
    (job_dir / "events.jsonl").write_bytes(reported[: len(reported) // 3])
    assert train_distributed.run(job_dir, False, {"asked": False})["status"] == "succeeded"
    assert [event["data"]["step"] for event in events(job_dir) if event["type"] == "metrics"] == [1, 2, 3]
    assert (job_dir / "result.csv").read_text().count("\n") == 4


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_is_named(tiny_model, files, tmp_path):
    job_dir = make_job(tmp_path / "job", tiny_model, **{**files, "hyperparameters": {"n_epochs": 200}})
    launcher = launch("two_processes_cpu.yaml", program(tmp_path, TRAIN), job_dir)
    wait_for_step(job_dir, launcher)
    ranks = {process.environ().get("RANK"): process for process in psutil.Process(launcher.pid).children()}
    ranks["1"].kill()
    assert launcher.wait(60) == 1 and not (job_dir / "outcome.json").exists()
    assert not ranks["0"].is_running()
    said = worker.said_since(job_dir / "trainer.log", 0)
    assert f"Signal 9 (SIGKILL) received by PID {ranks['1'].pid}" in worker.last_line(said)


def test_4_bits_without_a_cuda_gpu_are_refused_by_the_server_and_fail_a_job(tiny_model, tmp_path, capsys):
    if __import__("torch").cuda.is_available():
        pytest.skip("this machine has a CUDA GPU")
    sentence = "--load-in-4bit needs a CUDA GPU, and this machine has none; start without it."
    assert server.main(["--load-in-4bit", "--data-dir", str(tmp_path / "data")]) == 2
    assert capsys.readouterr().err.strip() == sentence
    job_dir = make_job(tmp_path / "job", tiny_model)
    assert train_distributed.main(["--load-in-4bit", str(job_dir)]) == 1
    assert json.loads((job_dir / "outcome.json").read_text("utf-8"))["error"]["message"] == sentence


def test_a_directory_without_a_job_is_a_usage_error(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_distributed.main([str(tmp_path)])
    assert "holds no job.json" in capsys.readouterr().err
