"""python -m local_api: start the server. README.md in this folder says what it serves."""

import argparse
import asyncio
import contextlib
import errno
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType

from local_api import validation

try:
    if __name__ == "__main__" and any(word.startswith("--check") for word in sys.argv):
        # It needs no server, and none of the packages of one.
        sys.exit(validation.main(sys.argv[1:]))
    import psutil
    import uvicorn
    from fastapi import FastAPI

    from local_api import base_models, vocabulary
    from local_api.app import LOOPBACK, TRAINER_COMMAND, Connection, RepeatedLines, Settings, create_app
    from local_api.processes import lock_directory, stop_processes
    from local_api.store import StoreError
    from local_api.worker import Worker
except ModuleNotFoundError as missing:
    print(f"The package {missing.name} is missing: pip install -r requirements.txt -r local_api/requirements.txt",
          file=sys.stderr)  # fmt: skip
    sys.exit(2)

# After SIGTERM or Ctrl-C: what running answers get to finish, while the trainer saves its state.
ANSWER_SECONDS = 6
END_SECONDS = 9.5  # after which the process ends whatever still holds it; nothing that was acknowledged is lost by that


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m local_api", description="A local API that fine-tunes and answers.")
    parser.add_argument("--host", default="127.0.0.1", 
                        help="address to listen on (default: %(default)s, this machine only)")  # fmt: skip
    parser.add_argument("--port", type=int, default=8321, help="port, 0 for any free one (default: %(default)s)")
    parser.add_argument("--data-dir", type=Path, default=Path(".local_api"), metavar="DIR",
                        help="where files, jobs and models are kept (default: %(default)s)")  # fmt: skip
    parser.add_argument("--cache-dir", type=Path, metavar="DIR",
                        help="where base models and vocabularies are kept (default: DATA_DIR/cache)")  # fmt: skip
    parser.add_argument("--base-model", action="append", metavar="[ALIAS=]NAME-OR-PATH",
                        help="a Hugging Face hub id or a directory, and the name that clients know it by if that is "
                             "another, for instance gpt-4o-mini-2024-07-18=smollm2-135m-instruct; may be given several "
                             f"times (default: {base_models.DEFAULT_BASE_MODEL})")  # fmt: skip
    parser.add_argument("--api-key", metavar="KEY", help="the key that clients must send (better: set LOCAL_API_KEY)")
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME",
                        help="a name beside localhost by which clients call this server, for instance "
                             "host.docker.internal; may be given several times")  # fmt: skip
    parser.add_argument("--allow-origin", action="append", default=[], metavar="ORIGIN",
                        help="the origin of a web page or desktop app that may use this server, for instance "
                             "http://localhost:3000; may be given several times")  # fmt: skip
    parser.add_argument("--max-memory", type=memory_size, metavar="SIZE",
                        help="what loaded models may take together, for instance 3GB; those unused for longest are "
                             "dropped (default: half of the machine's memory, 80%% of a GPU's)")  # fmt: skip
    parser.add_argument("--launcher", type=shlex.split, metavar="COMMAND",
                        help="what starts the trainer on several GPUs or machines, for instance 'accelerate launch "
                             "--config_file examples/scaling/several_gpus.yaml' (default: this Python)")  # fmt: skip
    parser.add_argument("--load-in-4bit", action="store_true",
                        help="train on base models in 4 bits, for large ones on a small GPU (CUDA, "
                             "bitsandbytes)")  # fmt: skip
    parser.add_argument("--check", metavar="FILE", help="judge a training file and exit, with no server")
    return parser


def memory_size(text: str) -> int:
    """Return the bytes that "3GB", "512 MB" or "1.5GiB" stand for."""
    size = re.fullmatch(r"\s*(\d{1,9}(?:\.\d+)?)\s*([MGT])(i?)B?\s*", text, re.IGNORECASE)
    number, unit, binary = size.groups() if size else ("0", "M", "")
    wanted = int(float(number) * (1024 if binary else 1000) ** ("MGT".index(unit.upper()) + 2))
    if wanted < 10**6:
        sentence = "is no size of at least 1 MB; write a number with MB, GB or TB, for instance 3GB"
        raise argparse.ArgumentTypeError(f"'{text}' {sentence}")
    return wanted


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.check:
        return validation.main(["--check", args.check])
    base_models.share_processor(base_models.BUSY_LOOPS)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger().handlers[0].addFilter(RepeatedLines())
    args.api_key = args.api_key or os.environ.get("LOCAL_API_KEY") or None
    if args.host not in LOOPBACK and not args.api_key:
        return refuse(f"--host {args.host} lets other machines in: set LOCAL_API_KEY to the key that they must send.")
    for name in args.base_model or ():
        alias, source = base_models.named(name)
        if not alias or not source or (Path(source).is_absolute() and not Path(source).is_dir()):
            return refuse(f"--base-model {name}: there is no such directory.")
    if args.launcher and not shutil.which(args.launcher[0]):
        return refuse(f"--launcher {args.launcher[0]}: there is no such command.")
    if args.load_in_4bit and not args.launcher and (lack := base_models.lack_for_4bit()):
        return refuse(lack)  # with a launcher, the GPU may be another machine's
    args.cache_dir = (args.cache_dir or args.data_dir / "cache").resolve()
    try:
        args.data_dir.mkdir(parents=True, exist_ok=True)
        lock = lock_directory(args.data_dir)  # it goes with the process
        if not lock:
            return refuse(f"Another server is running on {args.data_dir}; stop it, or choose another --data-dir.")
        vocabulary.unpack(args.cache_dir / "tiktoken")
        listener = listen(args.host, args.port)
    except OSError as error:
        return refuse(f"Cannot start: {error}.")
    try:
        with listener:
            serve(args, listener)
    except (base_models.ModelUnavailable, StoreError) as error:
        return refuse(str(error))
    return 0


def refuse(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 2


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; OSError, with a sentence, if the address cannot be had."""
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        # With its protocol named, asyncio sends at once what is written; otherwise most answers take 40 ms longer.
        return socket.socket(listener.family, listener.type, socket.IPPROTO_TCP, fileno=listener.detach())
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OSError(f"port {port} is in use; stop what uses it, or choose another --port") from None
        raise OSError(f"--host {host} is no address of this machine ({error})") from None
    except OverflowError:
        raise OSError("a --port is a number from 0 to 65535") from None


def serve(args: argparse.Namespace, listener: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    trainer = list(TRAINER_COMMAND)
    if args.launcher or args.load_in_4bit:
        options = ["--load-in-4bit"] if args.load_in_4bit else []
        trainer = [*(args.launcher or [sys.executable]), "-m", "local_api.train_distributed", *options]
    settings = Settings(args.data_dir, args.cache_dir, args.base_model or (base_models.DEFAULT_BASE_MODEL,), args.host,
                        args.api_key, args.max_memory, args.allow_host, args.allow_origin,
                        load_at_start=True)  # fmt: skip
    app = create_app(settings, trainer_command=trainer)
    tempfile.tempdir = str(app.state.store.temporary)  # of uploads on their way: beside the data
    host = f"[{args.host}]" if ":" in args.host else args.host
    ready = (
        f"Local API ready: http://{host}:{listener.getsockname()[1]}/v1\n"
        f"  web page      http://{host}:{listener.getsockname()[1]}/\n"
        f"  base models   {', '.join(app.state.models.base_ids)}\n"
        f"  data          {args.data_dir.resolve()}\n"
        f"  stop          Ctrl-C; files, jobs and models stay, a running job goes on at the next start"
    )
    config = uvicorn.Config(app, http=Connection, log_config=None, log_level="warning", access_log=False,
                            server_header=False, proxy_headers=False,
                            timeout_graceful_shutdown=ANSWER_SECONDS)  # fmt: skip
    threading.Thread(target=end_in_time, args=(app.state.worker,), daemon=True).start()
    server = Server(config, ready, app)
    if hasattr(signal, "SIGHUP"):  # the terminal was closed
        signal.signal(signal.SIGHUP, server.handle_exit)
    server.run([listener])
    stop_processes(psutil.Process().children())  # a download that was under way
    end()


def end() -> None:
    """End the process at once: PyTorch aborts one that takes leave in order while a step is under way."""
    print("Stopped.", file=sys.stderr, flush=True)
    os._exit(0)


def end_in_time(worker: Worker) -> None:
    while not worker.stopping:
        time.sleep(0.2)
    time.sleep(max(0, worker.stopping + END_SECONDS - time.monotonic()))
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    end()


class Server(uvicorn.Server):
    """uvicorn, which says when it is ready and, asked to stop, lets the trainer save its state at once."""

    def __init__(self, config: uvicorn.Config, ready: str, app: FastAPI):
        super().__init__(config)
        self.ready, self.state = ready, app.state

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        with contextlib.suppress(OSError):  # whoever started this server may be gone; it serves all the same
            print(self.ready, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for answers; those that take longer end with an error that says why, before uvicorn breaks them off."""
        asyncio.get_running_loop().call_later(ANSWER_SECONDS - 1, self.end_answers)
        await super().shutdown(sockets)

    def end_answers(self) -> None:
        # Closing waits for the current step: not on the event loop.
        threading.Thread(target=self.state.engine.close, daemon=True).start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.state.worker.ask_to_stop()
        self.force_exit = self.should_exit  # the second Ctrl-C does not wait for answers
        self.should_exit = True


if __name__ == "__main__":
    sys.exit(main())
