"""Processes: which one is at work in a directory, and how one is asked to end.

That a process is at work in a directory is known by a lock on it, which goes when the process goes. On POSIX it is the
lock of the directory itself: it holds whatever the directory is called and wherever it is mounted, and no file that
somebody removes takes it away.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil

STOP_SECONDS = 8.0  # what a trainer gets to save its state; the whole server is to end within 10
TRY_LATER = 75  # a trainer's exit code for a fault that may pass (EX_TEMPFAIL of BSD's sysexits.h)
LATER = "The trainer could not use its files: "  # what it says then: a launcher has an exit code of its own


def lock_directory(directory: Path) -> Callable[[], None] | None:
    """Lock a directory until the process ends or calls what this returns; return None if another process has it."""
    if os.name == "nt":  # knows no lock of a directory, and lets nobody remove a file that is open
        from filelock import FileLock, Timeout

        lock = FileLock(directory / "in-use.lock")
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=0)
            return lock.release
        return None
    import fcntl

    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return partial(os.close, descriptor)


def lock_job(directory: Path) -> Callable[[], None] | None:
    """In a trainer: lock its job's directory, as above, and leave the process's id there."""
    if release := lock_directory(directory):
        (directory / "trainer.pid").write_text(str(os.getpid()))
    return release


def trainer_of(directory: Path) -> psutil.Process | None:
    """Return the trainer that is at work in a job's directory, if it is one of this machine's processes."""
    if release := lock_directory(directory):
        release()
        return None
    try:
        trainer = psutil.Process(int((directory / "trainer.pid").read_text()))
        is_it = Path(trainer.cmdline()[-1]).name == directory.name  # not another process that has its number by now
    except (OSError, ValueError, IndexError, psutil.Error):
        return None
    return trainer if is_it else None


def stop_processes(processes: list[psutil.Process]) -> None:
    """Ask these processes and their children to end, and kill what has not ended after STOP_SECONDS."""
    family: list[psutil.Process] = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            family += [process, *process.children(recursive=True)]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess, OSError):
            if os.name == "nt":  # terminate() would be a kill; CTRL_BREAK is what a process can answer there
                process.send_signal(signal.CTRL_BREAK_EVENT)  # type: ignore[attr-defined]
            else:
                process.terminate()
    _, alive = psutil.wait_procs(family, timeout=STOP_SECONDS)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
