"""JSON answers: the form that `response_format`, or the `text.format` of responses, asks for, kept by llguidance.

At every step llguidance says which tokens the form allows next, and the sampler draws among these. The model is not
told of the form: one that was neither trained for it nor asked for it in the prompt fills it with nonsense.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from local_api.errors import APIError
from local_api.shapes import Parameters

# Small models may go on with blanks for ever, which JSON allows between any two tokens.
OPTIONS = {"whitespace_pattern": r"[ \n\t]{0,40}"}


class JSONSchema(Parameters):
    name: Annotated[str | None, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")] = None
    description: str | None = None
    schema_sent: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Parameters):
    """As chat completions have it: the schema is one level down."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    def grammar(self) -> str | None:
        return grammar(self.type, self.json_schema, "response_format", "response_format.json_schema")


class TextFormat(JSONSchema):
    """As responses have it."""

    type: Literal["text", "json_object", "json_schema"]

    def grammar(self) -> str | None:
        return grammar(self.type, self, "text.format", "text.format")


def grammar(kind: str, asked: JSONSchema | None, param: str, place: str) -> str | None:
    """Return what llguidance makes of a form, None for plain text; the APIError names the parameter, or its `place`."""
    if kind == "text":
        return None
    try:
        from llguidance import LLMatcher
    except ModuleNotFoundError:
        raise APIError(400, "JSON answers need the package llguidance, which this server does not have: pip install "
                            "-r local_api/requirements.txt, and start it again.", param=param,
                       code="unsupported_value") from None  # fmt: skip
    schema: dict[str, Any] = {"type": "object"}
    options: Any = dict(OPTIONS)
    if kind == "json_schema":
        if asked is None or asked.schema_sent is None:
            name = f"{place}.schema"
            raise APIError(400, f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")
        schema = asked.schema_sent
        if not asked.strict:  # what llguidance cannot keep is let go, as the API does without strict
            options["lenient"] = True
    found = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)
    if problem := LLMatcher.validate_grammar(found):
        raise APIError(400, f"Invalid schema for '{param}': {' '.join(problem.split())[:300]}.", param=param,
                       code="invalid_json_schema")  # fmt: skip
    return found


def vocabulary(tokenizer: Any, size: int, ends: set[int]) -> Any:
    """Return a model's tokens as llguidance knows them; takes a second. ValueError for a tokenizer of another kind."""
    from llguidance.hf import from_tokenizer

    return from_tokenizer(tokenizer, n_vocab=size, eos_token=sorted(ends))


def matcher(known: Any, form: str) -> Any:
    from llguidance import LLMatcher

    return LLMatcher(known, form)
