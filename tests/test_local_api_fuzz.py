"""Hostile and heavy use: schemathesis against the server's own OpenAPI document, and 64 clients at once."""

import subprocess
import sys
import threading
import time

import openai
import pytest
from local_api_doubles import running, training_file, wait_for

from local_api.answers import MAX_ANSWERS

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.mark.slow
def test_no_generated_request_breaks_the_server(tmp_path):
    with running(tmp_path / "data") as (url, _):
        result = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", CHECKS,
             "--phases", "coverage,fuzzing", "--max-examples", "30", "--seed", "1", "--no-color"],
            cwd=tmp_path, capture_output=True, text=True, timeout=280)  # fmt: skip
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_64_clients_for_a_minute_meet_no_error_but_429(tmp_path):
    failures, done, until = [], [], time.monotonic() + 60

    def use(url, number):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        while time.monotonic() < until:
            try:
                question = [{"role": "user", "content": f"question {number}"}]
                if number % 2:
                    list(client.chat.completions.create(model="tiny-base", messages=question, stream=True, n=2))
                else:
                    client.chat.completions.create(model="tiny-base", messages=question)
                job = client.fine_tuning.jobs.list(limit=1).data[0]
                client.fine_tuning.jobs.list_events(job.id, limit=100)
                if number == 0:
                    file = client.files.create(file=("data.jsonl", training_file()), purpose="fine-tune")
                    client.files.delete(file.id)
                done.append(number)
            except openai.RateLimitError:
                time.sleep(0.05)
            except Exception as error:
                failures.append(error)
        client.close()

    with running(tmp_path / "data") as (url, app):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any")
        file = client.files.create(file=("data.jsonl", training_file("slow")), purpose="fine-tune").id
        job = client.fine_tuning.jobs.create(model="tiny-base", training_file=file,
                                             hyperparameters={"n_epochs": 50})  # fmt: skip
        threads = [threading.Thread(target=use, args=(url, number)) for number in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures[:3]
        assert set(done) == set(range(64)), "every client was served"
        assert app.state.places.free._value == MAX_ANSWERS and len(app.state.store._idle) <= 120
        assert wait_for(job.id, client, seconds=60).status == "succeeded"
