"""Base models under a name of their own: `--base-model gpt-4o-mini-2024-07-18=smollm2-135m-instruct`."""

import json

import openai
import pytest
from local_api_doubles import running, training_file, wait_for

from local_api import base_models

ALIAS = "gpt-4o-mini-2024-07-18"


@pytest.mark.parametrize("given, model_id, source", [
    ("smollm2-135m-instruct", "smollm2-135m-instruct", "smollm2-135m-instruct"),
    ("HuggingFaceTB/SmolLM2-360M-Instruct", "HuggingFaceTB/SmolLM2-360M-Instruct",
     "HuggingFaceTB/SmolLM2-360M-Instruct"),
    (f"{ALIAS}=smollm2-135m-instruct", ALIAS, "smollm2-135m-instruct"),
    ("a=/models/b=c", "a", "/models/b=c"),
])  # fmt: skip
def test_a_base_model_may_have_an_alias(given, model_id, source):
    assert base_models.named(given) == (model_id, source)


def test_a_directory_may_have_an_equals_sign_in_its_name(tmp_path):
    (tmp_path / "size=small").mkdir()
    assert base_models.named(str(tmp_path / "size=small")) == ("size=small", str(tmp_path / "size=small"))


def test_an_alias_is_listed_trained_and_kept_in_the_models_name(tmp_path):
    base = tmp_path / "tiny-base"
    base.mkdir()
    with running(tmp_path / "data", base_models=[f"{ALIAS}={base}", str(base)]) as (url, app):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any")
        assert {model.id: model.root for model in client.models.list()} == {
            ALIAS: "tiny-base",
            "tiny-base": "tiny-base",
        }
        file = client.files.create(file=("data.jsonl", training_file()), purpose="fine-tune")
        job = wait_for(client.fine_tuning.jobs.create(model=ALIAS, training_file=file.id, suffix="mine").id, client)
        assert job.model == ALIAS and job.fine_tuned_model.startswith(f"ft:{ALIAS}:local:mine:")
        assert app.state.models.locate(job.fine_tuned_model)[0] == base
        order = json.loads((app.state.store.job_dir(job.id) / "job.json").read_text())
        assert order["base_model"] == "tiny-base", "other servers that load the adapter know no alias"

    # Its weights must stay the same: an adapter on other weights would answer nonsense.
    (tmp_path / "other").mkdir()
    sentence = f"{ALIAS} was tiny-base when models were trained on it: keep that, or give other another name."
    with (
        pytest.raises(base_models.ModelUnavailable, match=sentence),
        running(tmp_path / "data", base_models=[f"{ALIAS}={tmp_path / 'other'}"]),
    ):
        pass
    with running(tmp_path / "data", base_models=[str(base)]) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any")
        assert {model.id for model in client.models.list()} > {"tiny-base", job.fine_tuned_model}
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(ALIAS)


def test_two_base_models_cannot_have_one_name(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    names = [f"same={tmp_path / 'a'}", f"same={tmp_path / 'b'}"]
    with (
        pytest.raises(base_models.ModelUnavailable, match="Two base models have the name same"),
        running(tmp_path / "data", base_models=names),
    ):
        pass
