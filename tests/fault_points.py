"""Points in the server and in the trainer at which a planned fault strikes, once: a kill, a full disk, a cut of power.

As a program it is the real trainer with such points: python tests/fault_points.py JOB_DIR. local_api_doubles.py puts
them into the server if FAULT_PLAN names a plan: {"point", "fault", "server": pid or null, "filler": a file}.
"""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import psutil


def fill(path):
    """Take all that is left of a (small) disk."""
    with open(path, "ab", buffering=0) as file, contextlib.suppress(OSError):
        for size in (2**16, 2**12, 1):
            with contextlib.suppress(OSError):
                while file.write(b"0" * size):
                    pass


def strike(point):
    """Let the planned fault happen if its point is reached for the first time."""
    path = Path(os.environ["FAULT_PLAN"])
    plan, struck = json.loads(path.read_text()), path.with_name("struck")
    if plan["point"] != point or struck.exists():
        return
    struck.touch()
    if plan["fault"] == "full disk":
        fill(plan["filler"])
        return
    server = [plan["server"]]
    trainers = [child.pid for child in psutil.Process(plan["server"]).children()]
    victims = {"kill the server": server, "kill the trainer": trainers}.get(plan["fault"], server + trainers)
    for victim in sorted(victims, key=lambda pid: pid == os.getpid()):  # itself last
        os.kill(victim, signal.SIGKILL)


def before(owner, name, point, condition=lambda *_: True):
    """Let the fault strike when owner.name is called with arguments for which `condition` holds."""
    function = getattr(owner, name)

    def wrapped(*arguments, **more):
        if condition(*arguments):
            strike(point)
        return function(*arguments, **more)

    setattr(owner, name, wrapped)


def install_in_server():
    from local_api import jobs, reports, worker
    from local_api.store import Store

    before(Store, "add", "upload", lambda _, document, *__: document["object"] == "file")
    before(jobs, "flush_directory", "create")
    before(worker, "validate", "validate")
    before(reports.Reports, "add_model", "record")


def main():
    from local_api import train

    before(train.Journal, "metrics", "step", lambda _, row, __: row["step"] == 4)
    before(train, "write_whole", "checkpoint", lambda target, _: target.name == "resume.pt")
    before(train, "write_whole", "adapter", lambda target, _: target.name == "result.csv")
    return train.main()


if __name__ == "__main__":
    sys.exit(main())
