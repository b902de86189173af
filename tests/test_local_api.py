"""The local API over HTTP, through the official SDK, with doubles for the engine and the trainer.

Every answer is checked twice: by the SDK's strict response validation and against OpenAI's OpenAPI document.
"""

import asyncio
import contextlib
import json
import socket
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import jsonschema
import openai
import pytest
from local_api_doubles import FakeEngine, running, training_file, wait_for, wait_until

from local_api.__main__ import build_parser, listen
from local_api.answers import MAX_ANSWERS, as_api_error
from local_api.app import Settings, create_app
from local_api.generation import EngineError

DOCUMENT = json.loads((Path(__file__).parent / "openai_openapi.json").read_text(encoding="utf-8"))
# Where this server departs from the document, and why.
JOB_STATUS = DOCUMENT["components"]["schemas"]["FineTuningJob"]["properties"]["status"]
JOB_STATUS["enum"].append("paused")  # the document has it in its example only


def conforms(body, schema):
    """Check a body against a schema of the document: a name, or what a route answers ("GET /files")."""
    content = DOCUMENT["responses"].get(schema, {}).get("application/json", {"$ref": f"#/components/schemas/{schema}"})
    jsonschema.Draft202012Validator({**content, "components": DOCUMENT["components"]}).validate(body)
    return body


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("local_api") / "data") as (url, app):
        yield url, app


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="any", max_retries=0, _strict_response_validation=True)


@pytest.fixture
def http(server):
    with httpx2.Client(base_url=server[0]) as client:
        yield client


@pytest.fixture(scope="module")
def finished(server):
    """A job that has succeeded, with a suffix, metadata and a validation file."""
    client = openai.OpenAI(base_url=f"{server[0]}/v1", api_key="any")
    training = client.files.create(file=("a.jsonl", training_file()), purpose="fine-tune")
    validation = client.files.create(file=("b.jsonl", training_file()), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="tiny-base", training_file=training.id, validation_file=validation.id, suffix="My Model", seed=7,
        metadata={"finished": "yes"})  # fmt: skip
    return wait_for(job.id, client)


def upload(client, content=None, **arguments):
    return client.files.create(file=("data.jsonl", content or training_file()), purpose="fine-tune", **arguments)


def refusal(call, status, param=None, code=None):
    """Run the call, which must be refused with this status, param and code; return the sentence."""
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    conforms(caught.value.response.json(), "ErrorResponse")
    assert (caught.value.status_code, caught.value.param, caught.value.code) == (status, param, code)
    return caught.value.body["message"]


# Files


def test_a_file_comes_back_as_it_was_sent(client, http):
    content = training_file()
    file = upload(client, content)
    assert (file.bytes, file.filename) == (len(content), "data.jsonl")
    assert (file.purpose, file.status) == ("fine-tune", "processed")
    assert client.files.content(file.id).content == content
    assert client.files.wait_for_processing(file.id) == client.files.retrieve(file.id) == file
    conforms(http.get(f"/v1/files/{file.id}").json(), "GET /files/{file_id}")
    conforms(http.get("/v1/files").json(), "GET /files")
    conforms(http.delete(f"/v1/files/{file.id}").json(), "DELETE /files/{file_id}")
    for gone in (client.files.retrieve, client.files.content, client.files.delete):
        refusal(lambda gone=gone: gone(file.id), 404, "id")


@pytest.mark.parametrize("purpose", ["assistants", "batch", "fine-tune", "vision", "user_data"])
def test_every_purpose_of_the_api_is_taken(client, purpose):
    file = client.files.create(file=("x.jsonl", training_file()), purpose=purpose)
    assert client.files.list(purpose=purpose).data[0].purpose == purpose
    client.files.delete(file.id)


def test_file_lists_page_both_ways_and_filter_by_purpose(client):
    ids = [client.files.create(file=("notes.txt", b"text"), purpose="user_data").id for _ in range(5)]
    assert [file.id for file in client.files.list(purpose="user_data", limit=2)] == ids[::-1]  # follows `after`
    assert [file.id for file in client.files.list(purpose="user_data", limit=2, order="asc")] == ids
    page = client.files.list(purpose="user_data", limit=2, after=ids[4])
    assert [file.id for file in page.data] == [ids[3], ids[2]] and page.has_more
    refusal(lambda: client.files.list(after="file-unknown"), 400, "after")
    refusal(lambda: client.files.list(limit=0), 400, "limit", "invalid_value")


@pytest.mark.parametrize("content, line", [
    (b"question,answer\nhi,hello\n", 1),
    (b'{"messages": []}\n[1, 2]\n', 2),
    (b'{"messages": []}\n\n{"messages": [}\n', 3),
    (b'{"a": "\xff"}\n', 1),
    (b"[" * 100_000, 1),
])  # fmt: skip
def test_a_file_that_is_not_jsonl_is_refused_with_the_line(client, content, line):
    assert f"Line {line} is not a dictionary" in refusal(lambda: upload(client, content), 400, "file")


def test_an_empty_file_is_refused(client):
    assert "empty" in refusal(lambda: upload(client, b"\n \n"), 400, "file")


def test_upload_parameters_are_checked(client, http):
    refusal(lambda: client.files.create(file=b"{}", purpose="training"), 400, "purpose", "invalid_value")
    lifetime = {"anchor": "created_at", "seconds": 3600}
    refusal(lambda: upload(client, expires_after=lifetime), 400, "expires_after[anchor]", "unknown_parameter")
    answer = http.post("/v1/files", data={"purpose": "fine-tune"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "file"


@pytest.mark.parametrize("name", ["../../etc/passwd", "..\\..\\x.jsonl", "/abs/x.jsonl", "a\x00b.jsonl", "ü💥.jsonl"])
def test_a_file_name_is_only_a_name(client, server, name):
    file = client.files.create(file=(name, training_file()), purpose="fine-tune")
    assert "/" not in file.filename and "\\" not in file.filename
    assert client.files.content(file.id).content == training_file()


@pytest.mark.parametrize("path", ["../state.sqlite3", "..%2fstate.sqlite3", "%2e%2e%2fstate.sqlite3", "..", "%00"])
def test_no_path_from_a_client_reaches_the_file_system(http, path):
    for route in ("files/{}", "files/{}/content", "fine_tuning/jobs/{}", "models/{}"):
        answer = http.get("/v1/" + route.format(path))
        assert answer.status_code == 404 or answer.url.path.rstrip("/") == "/v1"  # a client resolves `..` by itself
        assert http.delete("/v1/" + route.format(path)).status_code in (404, 405)


# Jobs


def test_a_job_runs_from_file_to_model(client, http, finished):
    assert (finished.status, finished.trained_tokens, finished.seed, finished.error) == ("succeeded", 1234, 7, None)
    assert finished.hyperparameters.model_dump() == {"batch_size": 2, "learning_rate_multiplier": 1.0, "n_epochs": 5}
    assert finished.method.supervised.hyperparameters.n_epochs == 5
    assert finished.fine_tuned_model.startswith("ft:tiny-base:local:my-model:")
    assert len(finished.fine_tuned_model.split(":")[-1]) == 8
    assert finished.finished_at >= finished.created_at and finished.estimated_finish is None
    conforms(http.get(f"/v1/fine_tuning/jobs/{finished.id}").json(), "GET /fine_tuning/jobs/{fine_tuning_job_id}")
    results = client.files.retrieve(finished.result_files[0])
    assert results.purpose == "fine-tune-results"
    assert client.files.content(results.id).text.startswith("step,train_loss")


def test_events_come_newest_first_and_page(client, http, finished):
    events = list(client.fine_tuning.jobs.list_events(finished.id, limit=3))
    messages = [event.message for event in reversed(events)]
    assert messages[0].startswith("Created fine-tuning job") and messages[-1] == "The job has successfully completed"
    assert messages[-2] == f"New fine-tuned model created: {finished.fine_tuned_model}"
    metrics = [event for event in reversed(events) if event.type == "metrics"]
    assert [event.data["step"] for event in metrics] == list(range(1, 11))
    assert metrics[0].data["total_steps"] == 10
    assert len({event.id for event in events}) == len(events)
    route = "GET /fine_tuning/jobs/{fine_tuning_job_id}/events"
    conforms(http.get(f"/v1/fine_tuning/jobs/{finished.id}/events").json(), route)


def test_the_last_three_checkpoints_are_models(client, http, finished):
    page = client.fine_tuning.jobs.checkpoints.list(finished.id)
    assert [checkpoint.step_number for checkpoint in page.data] == [10, 8, 6]
    name = page.data[1].fine_tuned_model_checkpoint
    assert name == f"{finished.fine_tuned_model}:ckpt-step-8" and page.data[1].metrics.train_loss == 0.125
    answer = client.chat.completions.create(model=name, messages=[{"role": "user", "content": "hello"}])
    assert answer.model == name
    route = "GET /fine_tuning/jobs/{fine_tuning_job_id}/checkpoints"
    conforms(http.get(f"/v1/fine_tuning/jobs/{finished.id}/checkpoints").json(), route)
    assert [one.step_number for one in client.fine_tuning.jobs.checkpoints.list(finished.id, limit=1)] == [10, 8, 6]


def test_jobs_page_and_filter_by_metadata(client, http):
    file = upload(client).id
    marks = [{"run": "1", "odd \"key'": "a=b&c"}, {"run": "2"}, {"run": "1", "empty": ""}, None]
    ids = [client.fine_tuning.jobs.create(model="tiny-base", training_file=file, metadata=mark).id for mark in marks]

    def found(**metadata):
        return [job.id for job in client.fine_tuning.jobs.list(limit=1, extra_query=metadata) if job.id in ids]

    assert found() == ids[::-1]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"run": "1"})] == [ids[2], ids[0]]
    assert found(**{"metadata[run]": "1", "metadata[empty]": ""}) == [ids[2]]
    assert found(**{"metadata[odd \"key']": "a=b&c"}) == [ids[0]]
    assert found(**{"metadata[run]": "3"}) == []
    assert found(metadata="null") == [ids[3]]
    assert http.get("/v1/fine_tuning/jobs?metadata=x").json()["error"]["param"] == "metadata"
    conforms(http.get("/v1/fine_tuning/jobs?limit=100").json(), "GET /fine_tuning/jobs")
    for job_id in ids:
        wait_for(job_id, client)


def test_training_goes_on_from_a_fine_tuned_model(client, server, finished):
    job = client.fine_tuning.jobs.create(model=finished.fine_tuned_model, training_file=upload(client).id)
    job = wait_for(job.id, client)
    assert job.model == finished.fine_tuned_model and job.fine_tuned_model.startswith("ft:tiny-base:local::")
    adapter = server[1].state.store.job_dir(job.id) / "adapter" / "adapter_model.safetensors"
    assert f"{job.id}/parent" in adapter.read_text().replace("\\", "/")


def test_a_job_keeps_its_files_when_they_are_deleted(client):
    blocker = client.fine_tuning.jobs.create(model="tiny-base", training_file=upload(client, training_file("held")).id)
    file = upload(client)
    job = client.fine_tuning.jobs.create(model="tiny-base", training_file=file.id)
    client.files.delete(file.id)
    client.fine_tuning.jobs.cancel(blocker.id)
    assert wait_for(job.id, client).status == "succeeded"


@pytest.mark.parametrize("content, code, said", [
    (training_file(rows=7), "invalid_n_examples", "Training file has 7 example(s), but must have at least 10 examples"),
    (training_file() + b'\n{"messages": []}', "invalid_training_file", "Line 13"),
    (training_file() + b'\n{"prompt": "a", "completion": "b"}', "invalid_training_file", "Line 13"),
    (training_file("fail"), "invalid_training_file", "Line 3: too long"),
    (training_file("crash"), "server_error", "RuntimeError: the trainer fell over"),
    (training_file("no memory"), "server_error", "ran out of memory"),
])  # fmt: skip
def test_a_job_that_cannot_be_done_fails_with_code_and_sentence(client, http, content, code, said):
    job = client.fine_tuning.jobs.create(model="tiny-base", training_file=upload(client, content).id)
    deadline = time.monotonic() + 20
    while (job := client.fine_tuning.jobs.retrieve(job.id)).status != "failed":
        assert time.monotonic() < deadline and job.status != "succeeded"
        time.sleep(0.05)
    assert job.error.code == code and said in job.error.message and job.fine_tuned_model is None
    assert job.finished_at is not None
    event = client.fine_tuning.jobs.list_events(job.id).data[0]
    assert event.level == "error" and said in event.message
    conforms(http.get(f"/v1/fine_tuning/jobs/{job.id}").json(), "GET /fine_tuning/jobs/{fine_tuning_job_id}")


def test_figures_that_are_no_numbers_become_null(client, http):
    job = client.fine_tuning.jobs.create(model="tiny-base", training_file=upload(client, training_file("nan")).id)
    wait_for(job.id, client)
    events = http.get(f"/v1/fine_tuning/jobs/{job.id}/events").json()["data"]
    assert {event["data"]["train_loss"] for event in events if event["type"] == "metrics"} == {None}


def test_cancel_pause_and_resume(client, http, server):
    held, file = upload(client, training_file("held")).id, upload(client).id
    first = client.fine_tuning.jobs.create(model="tiny-base", training_file=held)
    second = client.fine_tuning.jobs.create(model="tiny-base", training_file=file)
    wait_for(first.id, client, "running")
    assert wait_for(second.id, client, "queued")  # one at a time
    told = client.fine_tuning.jobs.list_events(second.id).data[0].message
    assert told == f"Files validated, moving job to queued state, behind {first.id}"

    path = f"/v1/fine_tuning/jobs/{first.id}"
    paused = http.post(f"{path}/pause").json()
    assert conforms(paused, "POST /fine_tuning/jobs/{fine_tuning_job_id}/pause")["status"] == "paused"
    wait_for(second.id, client, "succeeded")  # the next one does not wait for a paused one
    go = server[1].state.store.data_dir / "go"
    go.touch()
    resumed = http.post(f"{path}/resume").json()
    assert conforms(resumed, "POST /fine_tuning/jobs/{fine_tuning_job_id}/resume")["status"] == "queued"
    assert wait_for(first.id, client).status == "succeeded"
    steps = [e.data["step"] for e in client.fine_tuning.jobs.list_events(first.id, limit=100) if e.type == "metrics"]
    assert sorted(steps) == list(range(1, 11)), "it went on where it was, and no step was lost"

    go.unlink()
    third = client.fine_tuning.jobs.create(model="tiny-base", training_file=held)
    wait_for(third.id, client, "running")
    cancelled = http.post(f"/v1/fine_tuning/jobs/{third.id}/cancel").json()
    assert conforms(cancelled, "POST /fine_tuning/jobs/{fine_tuning_job_id}/cancel")["status"] == "cancelled"
    for call in (client.fine_tuning.jobs.cancel, client.fine_tuning.jobs.pause, client.fine_tuning.jobs.resume):
        refusal(lambda call=call: call(third.id), 400, None, "invalid_status")
    fourth = client.fine_tuning.jobs.create(model="tiny-base", training_file=file)
    assert wait_for(fourth.id, client).status == "succeeded"
    assert client.fine_tuning.jobs.retrieve(third.id).fine_tuned_model is None


def test_a_job_paused_in_its_last_step_succeeds_when_it_is_resumed(client, http, server):
    store, file = server[1].state.store, upload(client, training_file("stubborn")).id
    job = client.fine_tuning.jobs.create(model="tiny-base", training_file=file)
    while not any(event.type == "metrics" for event in client.fine_tuning.jobs.list_events(job.id)):
        time.sleep(0.02)
    http.post(f"/v1/fine_tuning/jobs/{job.id}/pause")
    (store.data_dir / "go").touch()  # the trainer goes on to its end all the same
    while not (store.job_dir(job.id) / "outcome.json").exists():
        time.sleep(0.02)
    (store.data_dir / "go").unlink()
    time.sleep(0.5)
    assert http.get(f"/v1/fine_tuning/jobs/{job.id}").json()["status"] == "paused"
    client.fine_tuning.jobs.resume(job.id)
    assert wait_for(job.id, client).fine_tuned_model


@pytest.mark.parametrize("method", [
    None, {"type": "supervised"}, {"type": "supervised", "supervised": {}},
    {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
])  # fmt: skip
def test_hyperparameters_may_stand_in_either_place(client, method):
    body = {"model": "tiny-base", "training_file": upload(client).id, "hyperparameters": {"n_epochs": 2}}
    job = client.post("/fine_tuning/jobs", body={**body, "method": method}, cast_to=object)
    expected = {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": "auto"}
    assert job["hyperparameters"] == job["method"]["supervised"]["hyperparameters"] == expected
    del body["hyperparameters"]
    job = client.post("/fine_tuning/jobs", body={**body, "method": method}, cast_to=object)
    asked = method and method.get("supervised", {}).get("hyperparameters", {}).get("n_epochs")
    assert job["hyperparameters"]["n_epochs"] == (asked or "auto")


def test_a_job_without_a_seed_draws_one(client):
    file = upload(client, training_file()).id
    seeds = {client.fine_tuning.jobs.create(model="tiny-base", training_file=file).seed for _ in range(3)}
    assert len(seeds) == 3 and all(isinstance(seed, int) for seed in seeds)


def test_the_price_that_azures_own_scripts_name_is_accepted(client):
    body = {"model": "tiny-base", "training_file": upload(client).id, "trainingType": "globalStandard"}
    assert "trainingType" not in client.post("/fine_tuning/jobs", body=body, cast_to=object)


@pytest.mark.parametrize("changes, status, param, code", [
    ({"model": "gpt-4o"}, 404, "model", "model_not_found"),
    ({"training_file": "file-unknown"}, 400, "training_file", None),
    ({"validation_file": "file-unknown"}, 400, "validation_file", None),
    ({"suffix": ""}, 400, "suffix", "invalid_value"),
    ({"suffix": "x" * 65}, 400, "suffix", "invalid_value"),
    ({"seed": -1}, 400, "seed", "invalid_value"),
    ({"seed": "1"}, 400, "seed", "invalid_type"),
    ({"metadata": {str(n): "x" for n in range(17)}}, 400, "metadata", "invalid_value"),
    ({"metadata": {"k": "x" * 513}}, 400, "metadata.k", "invalid_value"),
    ({"metadata": {"k": 1}}, 400, "metadata.k", "invalid_type"),
    ({"method": {"type": "dpo", "dpo": {}}}, 400, "method.type", "invalid_value"),
    ({"method": {"type": "reinforcement"}}, 400, "method.type", "invalid_value"),
    ({"method": {"type": "sft"}}, 400, "method.type", "invalid_value"),
    ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, 400, "integrations", "unsupported_parameter"),
    ({"hyperparameters": {"n_epochs": 51}}, 400, "hyperparameters.n_epochs", "invalid_value"),
    ({"hyperparameters": {"n_epochs": "3"}}, 400, "hyperparameters.n_epochs", "invalid_value"),
    ({"hyperparameters": {"n_epochs": True}}, 400, "hyperparameters.n_epochs", "invalid_value"),
    ({"hyperparameters": {"batch_size": 0}}, 400, "hyperparameters.batch_size", "invalid_value"),
    ({"hyperparameters": {"learning_rate_multiplier": 0}}, 400, "hyperparameters.learning_rate_multiplier",
     "invalid_value"),
    ({"hyperparameters": {"beta": 1}}, 400, "hyperparameters.beta", "unknown_parameter"),
    ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}},
      "hyperparameters": {"n_epochs": 2}}, 400, "hyperparameters", None),
    ({"n_epochs": 3}, 400, "n_epochs", "unknown_parameter"),
])  # fmt: skip
def test_wrong_job_parameters_are_refused(client, changes, status, param, code):
    body = {"model": "tiny-base", "training_file": upload(client).id, **changes}
    refusal(lambda: client.post("/fine_tuning/jobs", body=body, cast_to=object), status, param, code)


def test_a_file_of_another_purpose_is_no_training_file(client):
    file = client.files.create(file=("x.txt", b"text"), purpose="user_data")
    refusal(lambda: client.fine_tuning.jobs.create(model="tiny-base", training_file=file.id), 400, "training_file",
            "invalid_file_purpose")  # fmt: skip


def test_unknown_jobs(client):
    jobs = client.fine_tuning.jobs
    for call in (jobs.retrieve, jobs.cancel, jobs.pause, jobs.resume, jobs.list_events, jobs.checkpoints.list):
        refusal(lambda call=call: call("ftjob-unknown"), 404, "fine_tune_id", "fine_tune_not_found")


# Models


def test_models_are_listed_retrieved_and_deleted(client, http, server):
    job = wait_for(client.fine_tuning.jobs.create(model="tiny-base", training_file=upload(client).id).id, client)
    model, checkpoint = job.fine_tuned_model, f"{job.fine_tuned_model}:ckpt-step-10"
    listed = conforms(http.get("/v1/models").json(), "GET /models")
    assert {"tiny-base", model, checkpoint} <= {one["id"] for one in listed["data"]}
    conforms(http.get(f"/v1/models/{model}").json(), "GET /models/{model}")
    base, adapter = server[1].state.models.locate(model)
    assert base.name == "tiny-base" and (adapter / "adapter_model.safetensors").exists()
    assert server[1].state.models.locate(checkpoint)[1].name == "step-10"

    conforms(http.delete(f"/v1/models/{model}").json(), "DELETE /models/{model}")
    for gone in (model, checkpoint):
        refusal(lambda gone=gone: client.models.retrieve(gone), 404, "model", "model_not_found")
        refusal(lambda gone=gone: ask(client, "hi", model=gone), 404, "model", "model_not_found")
    assert not adapter.exists() and client.fine_tuning.jobs.checkpoints.list(job.id).data == []
    assert client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model == model  # the job's history stays


def test_a_base_model_is_not_deleted(client):
    refusal(lambda: client.models.delete("tiny-base"), 403, "model")


# Chat completions


def ask(client, question, **arguments):
    arguments = {"model": "tiny-base", **arguments}
    return client.chat.completions.create(messages=[{"role": "user", "content": question}], **arguments)


def test_a_plain_answer(client, http):
    answer = ask(client, "how are you", temperature=0.5, seed=3, stop="x", user="me", max_completion_tokens=50)
    assert answer.choices[0].message.content == "You said: how are you "
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 5, 8)
    body = {"model": "tiny-base", "messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 2}
    raw = conforms(http.post("/v1/chat/completions", json=body).json(), "POST /chat/completions")
    assert [len(token["top_logprobs"]) for token in raw["choices"][0]["logprobs"]["content"]] == [2, 2, 2]


def test_parameters_reach_the_engine(client, server):
    ask(client, "all of them", temperature=0, top_p=0.5, seed=-3, stop=["a", "b"], max_tokens=9, n=2, logprobs=True)
    first, second = sorted(server[1].state.engine.requests[-2:], key=lambda request: request.seed)
    assert (first.temperature, first.top_p, first.stop, first.max_tokens) == (0, 0.5, ("a", "b"), 9)
    assert (first.seed, second.seed, first.logprobs) == (-3, -2, True)
    ask(client, "none of them")
    plain = server[1].state.engine.requests[-1]
    assert (plain.temperature, plain.top_p, plain.stop, plain.max_tokens, plain.seed) == (1.0, 1.0, (), None, None)


def test_a_conversation_with_content_parts(client, server):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "three", "refusal": None},
        {"role": "user", "content": "four", "name": "Ann"},
    ]
    client.chat.completions.create(model="tiny-base", messages=messages)
    contents = [message["content"] for message in server[1].state.engine.requests[-1].messages]
    assert contents == ["Be brief.", "one two", "three", "four"]


def test_several_choices(client):
    answer = ask(client, "hello", n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert all(choice.message.content == "You said: hello " for choice in answer.choices)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (1, 9)


def test_a_streamed_answer(client, http):
    chunks = list(ask(client, "hello there", stream=True, n=2, stream_options={"include_usage": True}))
    for index in (0, 1):
        deltas = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert deltas[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in deltas) == "You said: hello there "
        assert [choice.finish_reason for choice in deltas if choice.finish_reason] == ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 8
    assert all(chunk.usage is None for chunk in chunks[:-1]) and len({chunk.id for chunk in chunks}) == 1

    body = {"model": "tiny-base", "stream": True, "messages": [{"role": "user", "content": "hi"}], "logprobs": True}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = answer.text.split("\n\n")
    assert done == "data: [DONE]" and rest == ""
    for event in events:
        conforms(json.loads(event.removeprefix("data: ")), "CreateChatCompletionStreamResponse")


def test_max_tokens(client):
    answer = ask(client, "slow", max_tokens=3)
    assert answer.choices[0].message.content == "on on on " and answer.choices[0].finish_reason == "length"


def test_a_client_that_leaves_stops_its_generation(client, server):
    for stream in (True, False):
        server[1].state.engine.cancelled.clear()
        with pytest.raises(openai.APITimeoutError) if not stream else ask(client, "slow", stream=True) as answer:
            if stream:
                next(answer)
            else:
                ask(client, "slow", timeout=0.3)
        assert server[1].state.engine.cancelled.wait(3)
    wait_until(lambda: server[1].state.places.free._value == MAX_ANSWERS)  # its place is free again


def test_a_hundred_at_once_are_all_answered(client, server, monkeypatch):
    places = server[1].state.places
    monkeypatch.setattr(places, "free", asyncio.Semaphore(8))
    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(lambda n: ask(client, f"question {n}", n=1 + n % 3), range(100)))
    assert [one.choices[-1].message.content for one in answers] == [f"You said: question {n} " for n in range(100)]
    assert places.free._value == 8 and not places.waiting


def test_who_waits_too_long_or_stands_too_far_back_is_told_when_to_come_again(client, server, monkeypatch):
    places = server[1].state.places
    monkeypatch.setattr("local_api.answers.MAX_ANSWERS", 1)
    monkeypatch.setattr("local_api.answers.MAX_WAITING", 2)
    monkeypatch.setattr(places, "free", asyncio.Semaphore(1))
    with ask(client, "slow", stream=True) as answer, ThreadPoolExecutor() as pool:
        next(answer)
        monkeypatch.setattr(places, "seconds", 8.0)  # what an answer takes
        waits = pool.submit(ask, client, "hello")
        wait_until(lambda: places.waiting == 1)
        monkeypatch.setattr("local_api.answers.MAX_WAIT_SECONDS", 0.2)
        with pytest.raises(openai.RateLimitError, match="1 answers to write, and 2 more wait") as late:
            client.responses.create(model="tiny-base", input="hello")
        assert late.value.response.headers["retry-after"] == "24" and late.value.code == "rate_limit_exceeded"
        monkeypatch.setattr("local_api.answers.MAX_WAIT_SECONDS", 60)
        with pytest.raises(openai.APITimeoutError):  # a client that does not wait is not answered
            ask(client, "not any more", timeout=0.3)
        wait_until(lambda: places.waiting == 1)  # and holds up nobody
        with pytest.raises(openai.RateLimitError, match="and 1 more wait; try again in 16 s") as far:
            ask(client, "hello", n=2)
        assert far.value.response.headers["retry-after"] == "16"
        answer.close()
        assert len(waits.result().choices) == 1
    wait_until(lambda: places.free._value == 1 and not places.waiting)


def test_clients_that_leave_leave_nothing_behind(server):
    """Some leave while they wait, some while several choices are written: each place comes back."""
    url, app = server
    body = {"model": "tiny-base", "messages": [{"role": "user", "content": "slow"}], "n": 8}

    def leave(number: int) -> None:
        with contextlib.suppress(httpx2.TimeoutException):
            httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=0.1 + number % 7 / 20)

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(leave, range(40)))
    wait_until(lambda: app.state.places.free._value == MAX_ANSWERS and not app.state.places.waiting)


def test_a_client_that_does_not_read_its_stream_holds_no_place(server):
    url, app = server
    body = {"model": "tiny-base", "messages": [{"role": "user", "content": "hello"}], "stream": True, "n": 64}
    with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body):
        wait_until(lambda: app.state.places.free._value == MAX_ANSWERS)


def test_what_the_engine_refuses(client):
    assert "512 tokens" in refusal(lambda: ask(client, "too long"), 400, "messages", "context_length_exceeded")
    refusal(lambda: ask(client, "too long", stream=True), 400, "messages", "context_length_exceeded")
    assert "The model broke." in refusal(lambda: ask(client, "broken"), 500, None, "server_error")
    with pytest.raises(openai.APIError, match="The model broke"):
        list(ask(client, "broken", stream=True))


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize("changes, status, param, code", [
    ({"model": "gpt-4o"}, 404, "model", "model_not_found"),
    ({"model": 3}, 400, "model", "invalid_type"),
    ({"messages": []}, 400, "messages", "invalid_value"),
    ({"messages": "hi"}, 400, "messages", "invalid_type"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": None}]}, 400, "messages[0].content", "invalid_type"),
    ({"messages": [{"content": "hi"}]}, 400, "messages[0].role", "missing_required_parameter"),
    ({"messages": [USER, {"role": "tool", "content": "x"}]}, 400, "messages[1].role", "invalid_value"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400,
     "messages[0].content", "invalid_value"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, None, None),
    ({"n": 0}, 400, "n", "invalid_value"),
    ({"n": "2"}, 400, "n", "invalid_type"),
    ({"n": True}, 400, "n", "invalid_type"),
    ({"temperature": 2.1}, 400, "temperature", "invalid_value"),
    ({"top_p": -0.1}, 400, "top_p", "invalid_value"),
    ({"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
    ({"max_tokens": 5, "max_completion_tokens": 5}, 400, "max_tokens", "invalid_parameter_combination"),
    ({"stop": ["a"] * 5}, 400, "stop", "invalid_value"),
    ({"stop": ""}, 400, "stop[0]", "invalid_value"),
    ({"stop": ["a", ""]}, 400, "stop[1]", "invalid_value"),
    ({"top_logprobs": 3}, 400, "top_logprobs", "invalid_parameter_combination"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "invalid_value"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", "invalid_parameter_combination"),
    ({"response_format": {"type": "xml"}}, 400, "response_format.type", "invalid_value"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}}, 400,
     "response_format.json_schema.name", "invalid_value"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools", "unsupported_parameter"),
    ({"logit_bias": {"hello": 5}}, 400, "logit_bias.hello", "invalid_value"),
    ({"logit_bias": {"1": 101}}, 400, "logit_bias.1", "invalid_value"),
    ({"frequency_penalty": 2.5}, 400, "frequency_penalty", "invalid_value"),
    ({"presence_penalty": False}, 400, "presence_penalty", "invalid_type"),
    ({"modalities": ["text", "audio"]}, 400, "modalities", "unsupported_value"),
    ({"reasoning_effort": "high"}, 400, "reasoning_effort", "unsupported_parameter"),
    ({"store": True}, 400, "store", "unsupported_value"),
    ({"best_of": 2}, 400, "best_of", "unknown_parameter"),
])  # fmt: skip
def test_wrong_chat_parameters_are_refused(client, changes, status, param, code):
    body = {"model": "tiny-base", "messages": [USER], **changes}
    headers = {"Content-Type": "application/json"}
    refusal(lambda: client.post("/chat/completions", content=json.dumps(body).encode(), cast_to=object,
                                options={"headers": headers}), status, param, code)  # fmt: skip


def test_a_refusal_is_in_plain_words(client):
    said = refusal(lambda: ask(client, "hi", stop=["a"] * 5), 400, "stop", "invalid_value")
    assert said == "Invalid value for 'stop': expected at most 4 items, got 5."
    said = refusal(lambda: ask(client, "hi", temperature=3), 400, "temperature", "invalid_value")
    assert said == "Invalid value for 'temperature': expected less than or equal to 2."


def test_null_is_the_same_as_absent(client):
    chat = ["stream_options", "n", "temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "seed",
            "tools", "logprobs", "top_logprobs", "user", "metadata", "service_tier", "response_format",
            "stream"]  # fmt: skip
    body = {"model": "tiny-base", "messages": [USER], **dict.fromkeys(chat)}
    assert client.post("/chat/completions", body=body, cast_to=object)["choices"][0]["message"]["content"]
    job = ["validation_file", "hyperparameters", "method", "suffix", "seed", "metadata", "integrations"]
    body = {"model": "tiny-base", "training_file": upload(client).id, **dict.fromkeys(job)}
    assert client.post("/fine_tuning/jobs", body=body, cast_to=object)["status"] == "validating_files"


def test_values_that_change_nothing_are_accepted(client):
    answer = ask(client, "hello", frequency_penalty=0, presence_penalty=0.0, logit_bias={}, modalities=["text"], n=1,
                 response_format={"type": "text"}, store=False, tools=[], tool_choice="none", metadata={"a": "b"},
                 service_tier="auto", stream=False, logprobs=False)  # fmt: skip
    assert answer.choices[0].message.content == "You said: hello " and answer.service_tier == "default"
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert ask(client, "hello", tools=tools, tool_choice="none").choices[0].message.tool_calls is None


def test_penalties_and_biases_reach_the_engine(client, server):
    ask(client, "hello", frequency_penalty=0.5, presence_penalty=-2, logit_bias={"17": -100, "3": 1.5})
    sent = server[1].state.engine.requests[-1]
    assert (sent.frequency_penalty, sent.presence_penalty, sent.logit_bias) == (0.5, -2.0, {17: -100.0, 3: 1.5})


def test_what_is_left_out_says_what_to_do_instead(client):
    tools = [{"type": "function", "function": {"name": "f"}}]
    said = refusal(lambda: ask(client, "hi", tools=tools), 400, "tools", "unsupported_parameter")
    assert said.endswith("leave tools out, or send 'tool_choice': 'none'; for an object, a JSON schema.")
    for wrong in ({"store": True}, {"previous_response_id": "resp_1"}, {"conversation": "conv_1"},
                  {"input": [{"type": "item_reference", "id": "msg_1"}]}):  # fmt: skip
        with pytest.raises(openai.BadRequestError, match=r"keeps no answers.*'store': false, or ask /v1/chat/compl"):
            client.responses.create(model="tiny-base", **{"input": "hi", **wrong})


# Responses


def test_a_plain_response(client, http, server):
    response = client.responses.create(model="tiny-base", input="how are you", instructions="Be brief.", temperature=0)
    assert response.output_text == "You said: how are you " and response.status == "completed"
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (5, 5, 10)
    engine_request = server[1].state.engine.requests[-1]
    assert engine_request.messages[0] == {"role": "system", "content": "Be brief."} and engine_request.temperature == 0
    cut = client.responses.create(model="tiny-base", input="slow", max_output_tokens=2)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    conforms(http.post("/v1/responses", json={"model": "tiny-base", "input": "hi"}).json(), "POST /responses")


def test_a_response_goes_back_as_input(client, server):
    history = [{"role": "user", "content": [{"type": "input_text", "text": "one"}]}]
    history += client.responses.create(model="tiny-base", input=history).output
    client.responses.create(model="tiny-base", input=[*history, {"role": "user", "content": "two"}])
    contents = [message["content"] for message in server[1].state.engine.requests[-1].messages]
    assert contents == ["one", "You said: one ", "two"]


def test_a_streamed_response(client, http):
    with client.responses.stream(model="tiny-base", input="hello there") as stream:
        events = list(stream)
        assert stream.get_final_response().output_text == "You said: hello there "
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "You said: hello there "
    answer = http.post("/v1/responses", json={"model": "tiny-base", "input": "broken", "stream": True})
    assert '"message": "The model broke."' in answer.text.split("event: error")[1]


@pytest.mark.parametrize("changes, status, param, code", [
    ({"model": "gpt-4o"}, 404, "model", "model_not_found"),
    ({"input": "too long"}, 400, "input", "context_length_exceeded"),
    ({"input": []}, 400, "input", "invalid_value"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400, "input[0].content", "invalid_value"),
    ({"input": [USER, {"type": "function_call", "call_id": "1"}]}, 400, "input[1].type", "unsupported_value"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, 400, "input[0].type", "unsupported_value"),
    ({"previous_response_id": "resp_1"}, 400, "previous_response_id", "unsupported_parameter"),
    ({"tools": [{"type": "web_search"}]}, 400, "tools", "unsupported_parameter"),
    ({"store": True}, 400, "store", "unsupported_value"),
    ({"text": {"format": {"type": "xml"}}}, 400, "text.format.type", "invalid_value"),
    ({"unknown": 1}, 400, "unknown", "unknown_parameter"),
])  # fmt: skip
def test_wrong_response_parameters_are_refused(client, changes, status, param, code):
    body = {"model": "tiny-base", "input": "hi", **changes}
    refusal(lambda: client.post("/responses", body=body, cast_to=object), status, param, code)


# Everything else


def test_errors_outside_the_routes_have_the_same_shape(http):
    for answer, status in ((http.get("/v1/unknown"), 404), (http.put("/v1/files"), 405),
                           (http.post("/v1/chat/completions", content=b"{not json"), 400),
                           (http.post("/v1/fine_tuning/jobs", content=b"[]"), 400),
                           (http.post("/v1/files", content=b"x", headers={"content-type": "multipart/form-data"}), 400),
                           ):  # fmt: skip
        assert answer.status_code == status
        assert conforms(answer.json(), "ErrorResponse")["error"]["type"] == "invalid_request_error"
        assert answer.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("path, hint", [
    ("/openai/deployments/x/chat/completions", "no Azure paths"), ("/v1/batches", "no batches"),
    ("/v1/uploads/upload_1/parts", "files.create"),
    ("/v1/completions", "use /v1/chat/completions"), ("/v1/embeddings", "no embedding models"),
    ("/v1/responses/resp_1", "keeps no responses"), ("/chat/completions", "must end in /v1"),
    ("/v1/v1/chat/completions", "ends in /v1 once"),
])  # fmt: skip
def test_what_is_not_there_says_what_to_do_instead(http, path, hint):
    answer = http.post(path, json={})
    assert answer.status_code == 404 and hint in answer.json()["error"]["message"]


def test_the_base_url_says_what_it_is(http):
    for path in ("/v1", "/v1/"):
        shown = http.get(path)
        assert shown.headers["content-type"].startswith("text/html") and '<a href="/">the web page</a>' in shown.text


def test_healthz_needs_no_key_and_no_store(http):
    assert http.get("/healthz").json() == {"status": "ok"}


def test_the_state_is_durable(server):
    db = sqlite3.connect(server[1].state.store.data_dir / "state.sqlite3")
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert server[1].state.store._query("PRAGMA synchronous") == [(2,)]  # FULL


@pytest.mark.parametrize("text, size", [
    ("3GB", 3 * 10**9), ("512 mb", 512 * 10**6), ("1.5GiB", 3 * 2**29), ("2G", 2 * 10**9), ("lots", None), ("3", None),
    ("0GB", None), ("0.9MB", None), ("1B", None),
])  # fmt: skip
def test_max_memory_takes_sizes_with_units(capsys, text, size):
    if size:
        assert build_parser().parse_args(["--max-memory", text]).max_memory == size
    else:
        with pytest.raises(SystemExit, match="2"):
            build_parser().parse_args(["--max-memory", text])
        assert f"'{text}' is no size of at least 1 MB; write a number with MB, GB or TB" in capsys.readouterr().err


def test_max_memory_reaches_the_engine_and_a_model_that_is_too_large_is_a_503(tmp_path):
    app = create_app(Settings(tmp_path / "data", max_memory=5))
    assert app.state.engine.max_memory == 5
    app.state.engine.close()
    app.state.store.close()
    refused = as_api_error(EngineError("It is too large.", "model_not_available"), "messages")
    assert (refused.status_code, refused.code) == (503, "model_not_available")


def test_answers_are_sent_at_once():
    """asyncio sets TCP_NODELAY on connections whose listener names its protocol, and on no others."""

    async def accepted_without_delay(listener):
        connected = asyncio.get_running_loop().create_future()
        server = await asyncio.start_server(lambda _, writer: connected.set_result(writer), sock=listener)
        async with server:
            _, ours = await asyncio.open_connection(*listener.getsockname())
            theirs = await connected
            without_delay = theirs.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            ours.close()
            theirs.close()
        return without_delay

    assert asyncio.run(accepted_without_delay(listen("127.0.0.1", 0)))


def test_the_engine_is_closed_with_the_server(tmp_path):
    engine = FakeEngine()
    with running(tmp_path / "data", engine):
        assert not engine.closed
    assert engine.closed
