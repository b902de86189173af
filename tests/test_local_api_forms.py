"""JSON answers (response_format, text.format), penalties and biases, with a tiny model of random weights.

What such a model says is noise, so whatever has a form here has it from the sampler alone.
"""

import json

import jsonschema
import openai
import pytest
from local_api_doubles import FakeEngine, running

from local_api.engine import Engine
from local_api.generation import EngineError, GenerationRequest

torch = pytest.importorskip("torch")
pytest.importorskip("llguidance", reason="JSON answers need llguidance: local_api/requirements.txt")

SCHEMA = {
    "type": "object",
    "properties": {
        "topic": {"enum": ["billing", "delivery", "other"]},
        "urgent": {"type": "boolean"},
        "quote": {"type": "string", "maxLength": 12},
        "order": {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 999}, {"type": "null"}]},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "minItems": 1, "maxItems": 3},
    },
    "$defs": {"tag": {"type": "string", "pattern": "^[a-z]{1,5}$"}},
    "required": ["topic", "urgent", "quote", "order", "tags"],
    "additionalProperties": False,
}
QUESTION = [{"role": "user", "content": "Where is my parcel?"}]


@pytest.fixture(scope="module")
def engine(tiny_model):
    engine = Engine(lambda model_id: (tiny_model, None))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("forms") / "data", FakeEngine()) as (url, app):
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0), app.state.engine


def form_of(server, **response_format):
    """Return the grammar that the engine is given for a response_format."""
    client, engine = server
    client.chat.completions.create(model="tiny-base", messages=QUESTION, response_format=response_format)
    return engine.requests[-1].form


def test_every_answer_has_the_form_of_its_schema_beside_others_that_have_none(engine, server):
    form = form_of(server, type="json_schema", json_schema={"name": "ticket", "schema": SCHEMA, "strict": True})
    anything = form_of(server, type="json_object")
    assert form_of(server, type="text") is None
    asked = [{"form": form, "temperature": temperature, "top_p": 0.9, "seed": 1} for temperature in (0.0, 1.0, 2.0)]
    asked += [{"form": anything, "max_tokens": 20}, {"max_tokens": 20}]
    generations = [engine.submit(GenerationRequest("tiny", QUESTION, **options)) for options in asked]
    answers = [list(generation) for generation in generations]
    texts = ["".join(piece.text for piece in pieces) for pieces in answers]
    for text, pieces in zip(texts[:3], answers[:3], strict=True):
        jsonschema.validate(json.loads(text), SCHEMA)
        assert pieces[-1].finish_reason == "stop"
    assert texts[3].startswith("{") and not texts[4].startswith("{")


def test_responses_have_the_same_forms(server):
    client, engine = server
    response = client.responses.create(
        model="tiny-base", input="hi", text={
            "format": {"type": "json_schema", "name": "ticket", "schema": SCHEMA}})  # fmt: skip
    assert response.text.format.type == "json_schema" and response.text.format.schema_ == SCHEMA
    assert "json_schema" in engine.requests[-1].form


def test_a_schema_that_cannot_be_kept_is_refused_unless_it_need_not_be(server):
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    strict = {"name": "numbers", "schema": schema, "strict": True}
    with pytest.raises(openai.BadRequestError, match=r"Invalid schema for 'response_format': .*uniqueItems") as caught:
        form_of(server, type="json_schema", json_schema=strict)
    assert (caught.value.param, caught.value.code) == ("response_format", "invalid_json_schema")
    assert form_of(server, type="json_schema", json_schema={**strict, "strict": False})
    with pytest.raises(
        openai.BadRequestError, match=r"Missing required parameter: 'response_format.json_schema.schema'"
    ):
        form_of(server, type="json_schema", json_schema={"name": "numbers"})
    with pytest.raises(openai.BadRequestError, match=r"Invalid schema for 'text.format': Invalid type: nonsense"):
        server[0].responses.create(model="tiny-base", input="hi", text={
            "format": {"type": "json_schema", "name": "x", "schema": {"type": "nonsense"}}})  # fmt: skip


def test_a_schema_that_is_nested_too_deeply_is_refused(server):
    schema: dict = {"type": "string"}
    for _ in range(95):
        schema = {"type": "object", "properties": {"a": schema}}
    with pytest.raises(openai.BadRequestError) as caught:
        form_of(server, type="json_schema", json_schema={"name": "deep", "schema": schema})
    assert caught.value.code == "invalid_json_schema"
    large = {"type": "integer", "maximum": 2**70}
    assert form_of(server, type="json_schema", json_schema={"name": "large", "schema": large})


def test_biases_and_penalties_change_what_is_drawn():
    from local_api.sampling import Sampler

    def drawn(logits, count=3, **options):
        sampler = Sampler(GenerationRequest("tiny", QUESTION, temperature=0.0, **options))
        return [sampler.draw(torch.tensor(logits)) for _ in range(count)]

    assert drawn([3.0, 2.0, 1.0]) == [0, 0, 0]
    assert drawn([3.0, 2.0, 1.0], logit_bias={0: -100, 2: 1.5}) == [2, 2, 2]
    assert drawn([3.0, 2.0, 0.0], count=5, presence_penalty=1.5) == [0, 1, 0, 0, 0]  # once, however often it came
    assert drawn([3.0, 2.0, 0.0], count=6, frequency_penalty=0.6) == [0, 0, 1, 0, 1, 0]  # for each time
    logits = torch.tensor([3.0, 2.0, 1.0])
    Sampler(GenerationRequest("tiny", QUESTION, logit_bias={0: -100})).draw(logits)
    assert logits.tolist() == [3.0, 2.0, 1.0], "logprobs are the model's own"


def test_a_bias_for_a_token_that_the_model_has_not_is_refused(engine):
    with pytest.raises(
        EngineError, match="Invalid key in 'logit_bias': this model's tokens have the numbers 0 to"
    ) as no:
        list(engine.submit(GenerationRequest("tiny", QUESTION, logit_bias={10**6: 1.0})))
    assert (no.value.code, no.value.param) == ("invalid_value", "logit_bias")
