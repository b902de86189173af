"""JSON answers: the form that `response_format`, or the `text.format` of responses, asks for, kept by llguidance.

At every step llguidance says which tokens the form allows next, and the sampler draws among these. The model is not
told of the form: one that was neither trained for it nor asked for it in the prompt fills it with nonsense.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from llguidance import LLMatcher
from pydantic import Field

from local_api.errors import APIError
from local_api.shapes import Parameters


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
        return grammar(self.type, self.json_schema, "response_format", "response_format.json_schema.schema")


class TextFormat(JSONSchema):
    """As responses have it."""

    type: Literal["text", "json_object", "json_schema"]

    def grammar(self) -> str | None:
        return grammar(self.type, self, "text.format", "text.format.schema")


def grammar(kind: str, asked: JSONSchema | None, param: str, schema_param: str) -> str | None:
    """Return what llguidance makes of a form, None for plain text; APIErrors name one of the two parameters."""
    # Small models may go on with blanks for ever, which JSON allows between any two tokens.
    options: Any = {"whitespace_pattern": r"[ \n\t]{0,40}"}
    schema: dict[str, Any] | None = {"type": "object"}
    if kind == "text":
        return None
    if kind == "json_schema":
        schema = asked.schema_sent if asked else None
        options["lenient"] = not (asked and asked.strict)  # lets go what llguidance cannot keep, as the API does
    if schema is None:
        raise APIError(400, f"Missing required parameter: '{schema_param}'.", param=schema_param,
                       code="missing_required_parameter")  # fmt: skip
    try:
        found = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)
        problem = LLMatcher.validate_grammar(found)
    except ValueError as error:  # it is nested too deeply
        problem = str(error)
    if problem:
        raise APIError(400, f"Invalid schema for '{param}': {' '.join(problem.split())[:300]}.", param=param,
                       code="invalid_json_schema")  # fmt: skip
    return found
