"""OpenAI's SDK for Node works unchanged: the same flow as the tutorial's, in another language."""

import json
import shutil
import subprocess

import pytest
from local_api_doubles import running, training_file

SDK = "openai@6.49.0"
SCRIPT = """
import fs from "fs";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "any", maxRetries: 0 });
const file = await client.files.create({ file: fs.createReadStream("data.jsonl"), purpose: "fine-tune" });
let job = await client.fineTuning.jobs.create({
  model: "tiny-base", training_file: file.id, suffix: "node", metadata: { by: "node" },
  method: { type: "supervised", supervised: { hyperparameters: { n_epochs: 2 } } } });
while (!["succeeded", "failed", "cancelled"].includes(job.status)) {
  await new Promise((resolve) => setTimeout(resolve, 50));
  job = await client.fineTuning.jobs.retrieve(job.id);
}
const steps = [];
for await (const event of client.fineTuning.jobs.listEvents(job.id, { limit: 2 }))
  if (event.type === "metrics") steps.push(event.data.step);
const checkpoints = await client.fineTuning.jobs.checkpoints.list(job.id);
const listed = [];
for await (const one of client.fineTuning.jobs.list({ limit: 1, metadata: { by: "node" } })) listed.push(one.id);
const answer = await client.chat.completions.create({
  model: job.fine_tuned_model, messages: [{ role: "user", content: "hello" }] });
let streamed = "";
const stream = await client.chat.completions.create({
  model: checkpoints.data[0].fine_tuned_model_checkpoint, stream: true,
  messages: [{ role: "user", content: "hello" }] });
for await (const chunk of stream) streamed += chunk.choices[0]?.delta?.content ?? "";
const content = await (await client.files.content(file.id)).text();
let refusal = null;
try { await client.models.retrieve("unknown/model"); } catch (error) { refusal = [error.status, error.code]; }
const deleted = await client.models.delete(job.fine_tuned_model);
console.log(JSON.stringify({ status: job.status, steps, listed: listed.length, checkpoints: checkpoints.data.length,
  answer: answer.choices[0].message.content, streamed, same: content === fs.readFileSync("data.jsonl", "utf8"),
  refusal, deleted: deleted.deleted }));
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node")
def test_the_node_sdk_works_unchanged(tmp_path):
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "flow.js").write_text(SCRIPT)
    (tmp_path / "data.jsonl").write_bytes(training_file())
    subprocess.run([shutil.which("npm"), "install", "--silent", SDK], cwd=tmp_path, check=True, timeout=120)
    with running(tmp_path / "data") as (url, _):
        result = subprocess.run(["node", "flow.js", url], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {
        "status": "succeeded", "steps": [4, 3, 2, 1], "listed": 1, "checkpoints": 2, "answer": "You said: hello ",
        "streamed": "You said: hello ", "same": True, "refusal": [404, "model_not_found"],
        "deleted": True,
    }  # fmt: skip
