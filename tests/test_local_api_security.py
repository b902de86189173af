"""Who is let in, how much is taken, and what happens when the ground goes away."""

import errno
import json
import logging
import shutil
import socket
import time

import httpx2
import openai
import pytest
from local_api_doubles import running, training_file, wait_for


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("open") / "data") as (url, app):
        yield url, app


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    with running(tmp_path_factory.mktemp("guarded") / "data", api_key="s3cret-ü") as (url, _):
        yield url


@pytest.mark.parametrize("host, status", [
    ("127.0.0.1", 200), ("127.0.0.1:8321", 200), ("localhost:8321", 200), ("LOCALHOST", 200), ("[::1]:8321", 200),
    ("evil.example", 403), ("evil.example:8321", 403), ("127.0.0.1.evil.example", 403), ("192.168.0.7", 403),
    ("[::1", 403), ("localhost@evil.example", 403), ("", 403),
])  # fmt: skip
def test_foreign_host_names_are_refused(server, host, status):
    answer = httpx2.get(f"{server[0]}/v1/models", headers={"Host": host})
    assert answer.status_code == status
    assert status == 200 or answer.json()["error"]["code"] == "forbidden_host"


@pytest.mark.parametrize("headers, status", [
    ({}, 200),
    ({"Origin": "SELF"}, 200),
    ({"Sec-Fetch-Site": "none"}, 200),
    ({"Sec-Fetch-Site": "same-origin"}, 200),
    ({"Origin": "https://evil.example"}, 403),
    ({"Origin": "null"}, 403),
    ({"Origin": "http://[::1"}, 403),
    ({"Origin": "http://127.0.0.1:1"}, 403),  # a page of another server on this machine
    ({"Sec-Fetch-Site": "cross-site"}, 403),
    ({"Sec-Fetch-Site": "same-site"}, 403),
])  # fmt: skip
def test_web_pages_of_other_origins_are_refused(server, headers, status):
    headers = {name: value.replace("SELF", server[0]) for name, value in headers.items()}
    answer = httpx2.get(f"{server[0]}/v1/files", headers=headers)
    assert answer.status_code == status and "access-control-allow-origin" not in answer.headers
    body = {"model": "tiny-base", "messages": [{"role": "user", "content": "hi"}]}
    assert httpx2.post(f"{server[0]}/v1/chat/completions", headers=headers, json=body).status_code == status


def test_a_browser_is_not_asked_to_send_anything(server):
    preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert httpx2.options(f"{server[0]}/v1/files", headers=preflight).status_code == 403


def test_a_host_and_an_origin_may_be_let_in_by_name(tmp_path):
    origin, page = "http://localhost:3000", {"Origin": "http://localhost:3000", "Sec-Fetch-Site": "cross-site"}
    allowed = {"allow_hosts": ["host.docker.internal"], "allow_origins": [origin, "app://desktop"]}
    with running(tmp_path / "data", api_key="s3cret", **allowed) as (url, _):
        key = {"Authorization": "Bearer s3cret"}
        models = f"{url}/v1/models"
        assert httpx2.get(models, headers={**key, "Host": "host.docker.internal:8321"}).status_code == 200
        assert httpx2.get(models, headers={**key, "Host": "docker.internal"}).status_code == 403
        answer = httpx2.get(models, headers={**key, **page})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == origin
        refused = httpx2.get(models, headers=page)  # it is let in, and still has to know the key
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == origin
        preflight = {**page, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        answer = httpx2.options(f"{url}/v1/chat/completions", headers=preflight)
        assert answer.status_code == 200 and answer.headers["access-control-allow-headers"] == "authorization"
        for other in ("http://localhost:3001", "http://localhost:3000.evil.example", "null"):
            answer = httpx2.get(models, headers={**key, **page, "Origin": other})
            assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
        assert httpx2.get(models, headers={**key, "Sec-Fetch-Site": "cross-site"}).status_code == 403
        assert httpx2.get(models, headers={**key, "Origin": "app://desktop"}).status_code == 200


@pytest.mark.parametrize("authorization, code", [
    (None, None), ("", None), ("Bearer wrong", "invalid_api_key"), ("Bearer s3cret", "invalid_api_key"),
    ("Basic s3cret-ü", "invalid_api_key"), ("Bearer", "invalid_api_key"),
])  # fmt: skip
def test_the_key_is_asked_for(guarded, authorization, code):
    headers = {} if authorization is None else {"Authorization": authorization.encode()}
    for path in ("/v1/models", "/v1/unknown", "/v1/files/x/content", "/openapi.json"):
        answer = httpx2.get(f"{guarded}{path}", headers=headers)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == code


def test_the_right_key_opens(guarded):
    assert httpx2.get(f"{guarded}/v1/models", headers={"Authorization": "Bearer s3cret-ü".encode()}).status_code == 200
    assert httpx2.get(f"{guarded}/healthz").status_code == 200


def test_the_log_holds_no_contents_no_key_and_one_line_a_request(guarded, caplog):
    caplog.set_level(logging.INFO, "local_api")
    headers = {"Authorization": "Bearer s3cret-ü".encode()}
    body = {"model": "tiny-base", "messages": [{"role": "user", "content": "my private question"}]}
    assert httpx2.post(f"{guarded}/v1/chat/completions", headers=headers, json=body).status_code == 200
    httpx2.get(f"{guarded}/v1/models/a%0d%0aFAKE LINE?key=s3cret-ü", headers=headers)
    while "/v1/models" not in caplog.text:  # a line is written when its answer has been sent
        time.sleep(0.01)
    lines = [record.getMessage() for record in caplog.records if "/healthz" not in record.getMessage()]
    assert len(lines) == 2 and not any("\n" in line or "\r" in line for line in lines)
    assert "POST /v1/chat/completions 200" in lines[0] and "3+5 tokens" in lines[0] and lines[0].startswith("req_")
    assert not any("private" in line or "s3cret" in line for line in lines)


def test_bodies_have_a_limit(server, monkeypatch):
    big = json.dumps({"model": "tiny-base", "messages": [{"role": "user", "content": "x" * (17 * 2**20)}]})
    answer = httpx2.post(f"{server[0]}/v1/chat/completions", content=big, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413 and "16 MB" in answer.json()["error"]["message"]

    def without_length():
        for _ in range(17):
            yield b"x" * 2**20

    answer = httpx2.post(f"{server[0]}/v1/chat/completions", content=without_length())
    assert answer.status_code == 413

    address = server[0].removeprefix("http://")
    with socket.create_connection(address.split(":")) as connection:  # refused before a byte of it is read
        connection.sendall(f"POST /v1/files HTTP/1.1\r\nHost: {address}\r\nContent-Length: 600000000\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")

    monkeypatch.setattr("local_api.files.MAX_FILE_BYTES", 1000)
    client = openai.OpenAI(base_url=f"{server[0]}/v1", api_key="any", max_retries=0)
    with pytest.raises(openai.APIStatusError) as caught:
        client.files.create(file=("data.jsonl", training_file()), purpose="fine-tune")
    assert caught.value.status_code == 413


def test_a_flood_of_form_fields_or_messages_is_refused(server):
    fields = {f"f{n}": "x" for n in range(2000)}
    answer = httpx2.post(f"{server[0]}/v1/files", data=fields, files={"file": b"{}"})
    assert answer.status_code == 400
    body = {"model": "tiny-base", "messages": [{"role": "user", "content": "x"}] * 2049}
    assert httpx2.post(f"{server[0]}/v1/chat/completions", json=body).status_code == 400


def test_too_many_waiting_jobs_are_refused(server, monkeypatch):
    monkeypatch.setattr("local_api.jobs.MAX_WAITING_JOBS", 1)
    client = openai.OpenAI(base_url=f"{server[0]}/v1", api_key="any", max_retries=0)
    file = client.files.create(file=("data.jsonl", training_file("held")), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="tiny-base", training_file=file.id)
    with pytest.raises(openai.RateLimitError):
        client.fine_tuning.jobs.create(model="tiny-base", training_file=file.id)
    client.fine_tuning.jobs.cancel(job.id)


def test_what_a_file_holds_is_never_shown_as_a_page(server):
    client = openai.OpenAI(base_url=f"{server[0]}/v1", api_key="any", max_retries=0)
    file = client.files.create(file=("x.html", b"<script>alert(1)</script>"), purpose="user_data")
    answer = httpx2.get(f"{server[0]}/v1/files/{file.id}/content")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"].startswith("attachment")


def test_text_is_data(server):
    client = openai.OpenAI(base_url=f"{server[0]}/v1", api_key="any", max_retries=0)
    odd = "'; DROP TABLE objects; -- {{7*7}} ${HOME} %s \u202e"
    file = client.files.create(file=("data.jsonl", training_file(odd)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="tiny-base", training_file=file.id, suffix="../; rm -rf /:x",
                                         metadata={odd[:64]: odd})  # fmt: skip
    job = wait_for(job.id, client)
    assert job.metadata == {odd[:64]: odd} and job.fine_tuned_model.split(":")[3] == "rm-rf-x"
    assert [one.id for one in client.fine_tuning.jobs.list(metadata={odd[:64]: odd})] == [job.id]
    client.models.delete(job.fine_tuned_model)


def test_a_full_disk_is_said_and_survived(server, monkeypatch):
    client = openai.OpenAI(base_url=f"{server[0]}/v1", api_key="any", max_retries=0)
    before = len(list(client.files.list()))

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("local_api.store.os.fsync", full)
    with pytest.raises(openai.InternalServerError, match="disk"):
        client.files.create(file=("data.jsonl", training_file()), purpose="fine-tune")
    monkeypatch.undo()
    assert len(list(client.files.list())) == before and not list(server[1].state.store.temporary.iterdir())
    client.files.create(file=("data.jsonl", training_file()), purpose="fine-tune")


def test_a_deleted_data_directory_makes_the_job_wait_and_the_server_lives(tmp_path):
    with running(tmp_path / "data") as (url, app):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        file = client.files.create(file=("data.jsonl", training_file("held")), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model="tiny-base", training_file=file.id)
        wait_for(job.id, client, "running")
        directory, deadline = app.state.store.job_dir(job.id), time.monotonic() + 10
        while not (directory / "resume.pt").exists():  # from here on it only appends
            assert time.monotonic() < deadline
        directory.rename(tmp_path / "away")
        (tmp_path / "data" / "go").touch()
        while "was it moved or deleted?" not in (said := client.fine_tuning.jobs.list_events(job.id).data[0].message):
            assert time.monotonic() < deadline + 10, said
            time.sleep(0.02)
        (tmp_path / "away").rename(directory)
        assert wait_for(job.id, client).status == "succeeded"
        shutil.rmtree(tmp_path / "data")
        assert httpx2.get(f"{url}/healthz").status_code == 200
        with pytest.raises(openai.InternalServerError, match="data directory"):
            client.files.create(file=("data.jsonl", training_file()), purpose="fine-tune")
