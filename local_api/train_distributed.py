"""Train one fine-tuning job with transformers' Trainer: on several GPUs or machines, or on a base model in 4 bits.

    accelerate launch --config_file examples/scaling/several_gpus.yaml -m local_api.train_distributed JOB_DIR
    python -m local_api.train_distributed --load-in-4bit JOB_DIR        # one CUDA GPU

It reads and writes the job directory of local_api/train.py, and computes the same: the same batches in the same order,
the same adapter, optimizer and rates. How the processes share the work, and in which precision, is what the launcher's
configuration says: data parallel, FSDP2, DeepSpeed ZeRO, mixed precision. Each batch is cut into as many parts as there
are processes, so `batch_size` means the same on any number of them. In place of resume.pt it keeps

    resume/checkpoint-N/   what Trainer needs to go on from step N: after every epoch and every five minutes

Stopped (SIGTERM) and started again it goes on from there, also with another number of processes. docs/scaling.md shows
configurations.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from . import base_models

base_models.share_processor()  # before PyTorch is imported
import torch  # noqa: E402
import transformers  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import record  # noqa: E402

from . import train  # noqa: E402
from .encoding import Encoded  # noqa: E402
from .job_files import Journal  # noqa: E402
from .step import MAX_GRADIENT_NORM, TOKENS_AT_ONCE, add_lora, learning_rates, padded, summed_loss  # noqa: E402
from .validation import JobFailed  # noqa: E402

TOKENS_AT_ONCE_IN_4BIT = 1024  # who trains in 4 bits has little memory


class Part(NamedTuple):
    """What one process computes at once: some rows of a batch, and how many tokens the whole batch trains.

    Those go with it so that the loss is their mean however the batch was cut.
    """

    rows: list[Encoded]
    batch_tokens: int


def cut(rows: list[Encoded], processes: int, tokens_at_once: int) -> int:
    """Return into how many parts each process cuts its share of these rows, so that no part has too many tokens."""
    rows_at_once = max(1, tokens_at_once // max(len(row.ids) for row in rows))
    return math.ceil(len(rows) / processes / rows_at_once)


def share(rows: list[Encoded], parts: int, process: int, processes: int) -> list[Part]:
    """Return this process's parts of a batch. A part that no row is left for gets one that trains nothing.

    All processes must compute the same number of parts: each waits for the others' gradients.
    """
    tokens = sum(sum(row.trained[1:]) for row in rows)
    nothing = [Encoded(rows[0].ids, [False] * len(rows[0].ids))]
    return [Part(rows[n :: parts * processes] or nothing, tokens) for n in range(process, parts * processes, processes)]


def tensors(parts: list[Part]) -> dict[str, Any]:
    """Return a part as the model takes it."""
    [part] = parts
    ids, trained = padded(part.rows)
    return {"input_ids": ids, "trained": trained, "batch_tokens": part.batch_tokens}


class Trainer(transformers.Trainer):
    """transformers' Trainer with our batches, our loss and our rates; it saves the adapter alone."""

    loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole batch
    model: Any

    def __init__(self, model: Any, args: Any, parts: list[Part], tokens_at_once: int):
        super().__init__(model, args)
        self.parts, self.tokens_at_once = parts, tokens_at_once
        self.figures = torch.zeros(2, device=args.device)  # of the step under way: summed loss, how many were right

    def get_train_dataloader(self) -> Any:
        parts: Any = self.parts
        return torch.utils.data.DataLoader(parts, batch_size=1, collate_fn=tensors)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = learning_rates(optimizer or self.optimizer, num_training_steps)
        return self.lr_scheduler

    def compute_loss(self, model: Any, inputs: dict, *_: Any, **__: Any) -> Any:
        loss, right = self.loss_of_part(model, inputs)
        self.figures += torch.stack([loss.detach(), right])
        # Processes average their gradients, and we want the sum.
        return loss * self.accelerator.num_processes / inputs["batch_tokens"]

    def loss_of_part(self, model: Any, inputs: dict) -> tuple[Any, Any]:
        """Return (summed cross-entropy over trained tokens, how many were predicted right), as step.losses does."""
        output_layer = self.accelerator.unwrap_model(model).get_output_embeddings()
        loss, right, _ = summed_loss(model, output_layer, inputs["input_ids"], inputs["trained"])
        return loss, right.float()

    def mean_losses(self, rows: list[Encoded]) -> tuple[float, float]:
        """Return (mean loss, token accuracy) of validation rows; nothing is learnt."""
        processes = self.accelerator.num_processes
        figures = torch.zeros(2, device=self.args.device)
        parts = share(rows, cut(rows, processes, self.tokens_at_once), self.accelerator.process_index, processes)
        self.model_wrapped.eval()
        with torch.no_grad():
            for part in parts:
                figures += torch.stack(self.loss_of_part(self.model_wrapped, self._prepare_inputs(tensors([part]))))
        loss, right = self.accelerator.reduce(figures).tolist()
        return loss / parts[0].batch_tokens, right / parts[0].batch_tokens

    def adapter_saver(self) -> Callable:
        """Return what saves the adapter. Its weights may be spread over the processes: all of them must call this."""
        weights = None
        if self.is_fsdp_enabled:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

            options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
            weights = get_model_state_dict(self.model, options=options)
        elif self.is_deepspeed_enabled:
            import deepspeed

            trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
            with deepspeed.zero.GatheredParameters(list(trained.values())):
                weights = {name: weight.detach().cpu().clone() for name, weight in trained.items()}
        return partial(self.accelerator.unwrap_model(self.model).save_pretrained, state_dict=weights)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        save = self.adapter_saver()
        if self.args.should_save:
            save(output_dir, save_embedding_layers=False)


class Reporter(transformers.TrainerCallback):
    """After each step: writes what the server reads, saves what is due, and heeds the wish to stop."""

    def __init__(self, trainer: Trainer, job_dir: Path, plan: train.Plan, journal: Journal, stop: dict):
        self.trainer, self.job_dir, self.plan, self.journal, self.stop = trainer, job_dir, plan, journal, stop
        self.saved_at = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        kind, precision = self.trainer.accelerator.distributed_type.value, args.mixed_precision
        self.journal.say(f"Processes that share each batch: {args.world_size} ({kind}, mixed precision {precision}).")
        if state.global_step:
            self.journal.say(f"Training goes on from step {state.global_step}.")
        for row in rows_of(state):  # those of which a power cut has taken the report
            self.journal.metrics(row, len(self.plan.batches))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer, plan, step = self.trainer, self.plan, state.global_step
        wishes = [self.stop["asked"], time.monotonic() - self.saved_at >= train.SAVE_SECONDS]
        # Added up over all processes, so that all of them save and stop together.
        figures = trainer.accelerator.reduce(torch.cat([trainer.figures, trainer.figures.new_tensor(wishes)])).tolist()
        trainer.figures.zero_()
        tokens = trainer.parts[step * args.gradient_accumulation_steps - 1].batch_tokens
        row = train.row_of_step(step, figures[0] / tokens, figures[1] / tokens, plan, trainer.mean_losses)
        self.journal.metrics(row, len(plan.batches))
        state.log_history.append(row)  # is saved with the state
        epoch_ends, stops, late = step % plan.steps_per_epoch == 0, figures[2] > 0, figures[3] > 0
        if epoch_ends:
            save = trainer.adapter_saver()
            if args.should_save:
                train.save_checkpoint(self.job_dir, save, row)
        if epoch_ends or stops or late:
            control.should_save, self.saved_at = True, time.monotonic()
        control.should_training_stop = stops or step == len(plan.batches)


def rows_of(state: Any) -> list[dict]:
    """Return the figures of the steps done; Trainer itself logs some of its own."""
    return [row for row in state.log_history if "train_mean_token_accuracy" in row]


def training_arguments(job_dir: Path, seed: int, in_4bit: bool) -> transformers.TrainingArguments:
    """Return Trainer's settings. What is not set here comes from the launcher. Starts the processes' communication."""
    args = transformers.TrainingArguments(
        output_dir=str(job_dir / "resume"), seed=seed, use_cpu=base_models.best_device() == "cpu",
        per_device_train_batch_size=1, num_train_epochs=1,  # one pass over the parts of all batches of all epochs
        weight_decay=0.0, max_grad_norm=MAX_GRADIENT_NORM, optim="adamw_torch",
        activation_checkpointing=in_4bit, activation_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="no", save_total_limit=1, logging_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    args._n_gpu = min(1, args.n_gpu)  # by itself, Trainer would spread one process over all GPUs of the machine
    return args


def four_bit(dtype: Any) -> Any:
    """Return how a base model is read in 4 bits (QLoRA: NF4, with its constants quantized too)."""
    if lack := base_models.lack_for_4bit():
        raise JobFailed("server_error", lack)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,  # FSDP spreads no other type than that of the other weights
    )  # fmt: skip


def run(job_dir: Path, in_4bit: bool, stop: dict) -> dict | None:
    """Run the job to its end and return its outcome; None if it was stopped, or is another process's to report."""
    job = json.loads((job_dir / "job.json").read_text(encoding="utf-8"))
    args = training_arguments(job_dir, job["seed"], in_4bit)
    dtype = base_models.best_dtype(args.device.type)
    how = {"quantization_config": four_bit(dtype)} if in_4bit else {}
    model, tokenizer = base_models.read(Path(job["model_dir"]), **how)
    journal = Journal(Path(os.devnull) if args.process_index else job_dir / "events.jsonl")
    plan = train.make_plan(job, model, tokenizer, journal)
    torch.manual_seed(job["seed"])
    model = add_lora(model, job.get("adapter"), job["base_model"], exact=True)

    tokens_at_once = TOKENS_AT_ONCE_IN_4BIT if in_4bit else TOKENS_AT_ONCE.get(args.device.type, 4096)
    parts = max(cut(batch, args.world_size, tokens_at_once) for batch in plan.batches)
    shares = [part for batch in plan.batches for part in share(batch, parts, args.process_index, args.world_size)]
    args.gradient_accumulation_steps, args.learning_rate = parts, plan.learning_rate

    trainer = Trainer(model, args, shares, tokens_at_once)
    trainer.add_callback(Reporter(trainer, job_dir, plan, journal, stop))
    saved = (job_dir / "resume").glob("checkpoint-*/trainer_state.json")  # the last file that Trainer writes
    last = max(saved, key=lambda path: int(path.parent.name.removeprefix("checkpoint-")), default=None)
    trainer.train(resume_from_checkpoint=str(last.parent) if last else None)
    save = trainer.adapter_saver()
    trainer.accelerator.end_training()
    if trainer.state.global_step < len(plan.batches) or args.process_index:
        return None
    return train.finish(job_dir, save, rows_of(trainer.state), journal, plan)


@record  # so that a launcher's last words about a process that failed are what that process said
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m local_api.train_distributed", description="Train one job.")
    parser.add_argument("--load-in-4bit", action="store_true", help="read the base model in 4 bits (CUDA only)")
    parser.add_argument("job_dir", type=Path, metavar="JOB_DIR", help="a directory that holds job.json")
    options = parser.parse_args(argv)
    if not (options.job_dir / "job.json").is_file():
        parser.error(f"{options.job_dir} holds no job.json")
    return train.run_job(options.job_dir, lambda stop: run(options.job_dir, options.load_in_4bit, stop))


if __name__ == "__main__":
    code = main() or 0
    sys.stdout.flush()
    os._exit(code)  # not sys.exit(): taking a process group's threads apart can end in an abort
