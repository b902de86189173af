"""Programs of other people, each in an environment of its own, against this server: what docs/clients.md says of them.

Slow, and they need the package indexes. The environments are kept in .local_api/cache/clients and used again.
Node's SDK has a test file of its own.
"""

import os
import re
import subprocess
import sys

import pytest
from local_api_doubles import running, training_file, wait_for

from conftest import CACHE, ROOT

MODEL = "gpt-4o-mini-2024-07-18"
OPENAI = """
import os, time
from openai import OpenAI
client = OpenAI(base_url=os.environ["OPENAI_BASE_URL"])  # 1.0.0 does not look there by itself
file = client.files.create(file=open("data.jsonl", "rb"), purpose="fine-tune")
job = client.fine_tuning.jobs.create(model="gpt-4o-mini-2024-07-18", training_file=file.id)
while job.status not in ("succeeded", "failed"):
    time.sleep(0.2)
    job = client.fine_tuning.jobs.retrieve(job.id)
ask = {"model": job.fine_tuned_model, "messages": [{"role": "user", "content": "hello there"}]}
print(client.chat.completions.create(**ask).choices[0].message.content)
print("".join(chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**ask, stream=True)))
"""
LITELLM = """
import os, litellm
ask = {"model": "openai/" + os.environ["MODEL"], "messages": [{"role": "user", "content": "hello there"}]}
print(litellm.completion(**ask).choices[0].message.content)
print("".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**ask, stream=True)))
"""
LANGCHAIN = """
import os
from langchain_openai import ChatOpenAI
chat = ChatOpenAI(model=os.environ["MODEL"])
print(chat.invoke("hello there").content)
print("".join(chunk.content for chunk in chat.stream("hello there")))
"""
DSPY = """
import os, dspy
lm = dspy.LM("openai/" + os.environ["MODEL"], api_base=os.environ["OPENAI_BASE_URL"])
print(lm("hello there")[0])
"""
LLM = """
import os, pathlib, subprocess, sys
pathlib.Path("extra-openai-models.yaml").write_text(
    f"- model_id: mine\\n  model_name: '{os.environ['MODEL']}'\\n  api_base: {os.environ['OPENAI_BASE_URL']}\\n")
os.environ["LLM_USER_PATH"] = "."
subprocess.run([sys.executable, "-m", "llm", "-m", "mine", "hello there"], check=True)
"""
PROGRAMS = {
    "openai-newest": (["openai"], OPENAI),
    "openai-oldest": (["openai==1.0.0", "httpx<0.28"], OPENAI),  # it passes httpx an argument that 0.28 no longer has
    "litellm": (["litellm"], LITELLM),
    "langchain-openai": (["langchain-openai"], LANGCHAIN),
    "dspy": (["dspy"], DSPY),
    "llm": (["llm"], LLM),
}


def python_with(name, packages):
    """Return the Python of an environment with these packages; it is made once."""
    folder = CACHE / "clients" / name
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (folder / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        (folder / "installed").touch()
    return python


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The server's base URL and the name of a model that was fine-tuned on it, under an alias as its base."""
    import openai

    folder = tmp_path_factory.mktemp("clients")
    (folder / "base").mkdir()
    with running(folder / "data", base_models=[f"{MODEL}={folder / 'base'}"]) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any")
        file = client.files.create(file=("data.jsonl", training_file()), purpose="fine-tune")
        job = wait_for(client.fine_tuning.jobs.create(model=MODEL, training_file=file.id, suffix="mine").id, client)
        yield f"{url}/v1", job.fine_tuned_model


def environment(server):
    return {**os.environ, "OPENAI_BASE_URL": server[0], "OPENAI_API_KEY": "any", "MODEL": server[1]}


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_asks_a_fine_tuned_model(name, server, tmp_path):
    packages, script = PROGRAMS[name]
    python = python_with(name, packages)
    (tmp_path / "data.jsonl").write_bytes(training_file())
    result = subprocess.run([python, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=240,
                            env=environment(server))  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line.strip() for line in result.stdout.splitlines() if line.strip()]
    assert lines and set(lines) == {"You said: hello there"}, result.stdout


def test_the_guide_names_every_program_that_is_run_here():
    guide = (ROOT / "docs" / "clients.md").read_text("utf-8")
    for name in [*PROGRAMS, "Node"]:
        assert re.search(rf"(?i)\b{re.escape(name.removesuffix('-newest').removesuffix('-oldest'))}\b", guide), name
