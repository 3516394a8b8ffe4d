"""The JSON schema of the YAML file, so that editors complete and check it.

It is collected from what reads the file: the run's own fields, the registered classes with their
fields and docstrings, and the signatures of the topologies.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, cast

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from gossamer import topologies
from gossamer.algorithms.registry import REGISTRY, find
from gossamer.launch.config import RunConfig, topology_model

__all__ = ["json_schema"]

Schema = dict[str, Any]

_REF = "#/$defs/{model}"


def json_schema() -> Schema:
    """Return the JSON schema (draft 2020-12) of a run's YAML file."""
    definitions: Schema = {}
    run = _schema_of(RunConfig, definitions)
    sections = {kind: _components(kind, definitions) for kind in REGISTRY}
    sections["topology"] = _topologies(definitions)
    oracle = sections["oracle"]
    stacked = {"type": "array", "items": {"anyOf": [oracle, {"type": "string"}]}, "minItems": 1}
    sections["oracle"] = {"anyOf": [oracle, stacked]}

    changes: Schema = {}
    for name, field in run["properties"].items():
        if name in sections:
            # A run's section either names a component or changes fields of the common one.
            fields = {"type": "object", "not": {"required": ["name"]}}
            changes[name] = {"anyOf": [sections[name], fields, {"type": "null"}]}
            described = {"description": field["description"]} if "description" in field else {}
            run["properties"][name] = {**described, **sections[name]}
        else:
            changes[name] = field
    del changes["compare"]
    run["properties"]["compare"] = {
        "description": run["properties"]["compare"]["description"],
        "type": "object",
        "additionalProperties": {
            "type": "object",
            "properties": changes,
            "additionalProperties": False,
        },
    }
    # What every run needs may stand in each run of a comparison.
    needed = run.pop("required")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **run,
        "anyOf": [{"required": needed}, {"required": ["compare"]}],
        "$defs": definitions,
    }


class _Lenient(GenerateJsonSchema):
    """Lets anything stand for what only Python can write, such as a callable or a graph."""

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> JsonSchemaValue:
        return {}

    def emit_warning(self, kind: Any, detail: str) -> None:
        """A default that JSON cannot write is left out."""


def _schema_of(model: type[BaseModel], definitions: Schema) -> Schema:
    """Return the schema of a record; those it refers to go to ``definitions``."""
    schema = model.model_json_schema(ref_template=_REF, schema_generator=_Lenient)
    definitions.update(schema.pop("$defs", {}))
    return schema


def _components(kind: str, definitions: Schema) -> Schema:
    """Return the schema of a section: one of the registered classes, or a user's own."""
    known = {}
    for name in REGISTRY[kind]:
        schema = _schema_of(cast(type[BaseModel], find(kind, name)), definitions)
        elsewhere = {"algorithm": "optimizer", "oracle": "inner"}  # a section, an entry of its own
        for taken in ("name", elsewhere.get(kind)):
            schema["properties"].pop(taken, None)
            schema["required"] = [r for r in schema.get("required", []) if r != taken]
        known[name] = schema
    own = {
        "description": f"Your own {kind}: package.module:Class.",
        "properties": {"name": {"type": "string", "pattern": ":"}},
        "required": ["name"],
    }
    return _union(kind, known, definitions, own)


def _topologies(definitions: Schema) -> Schema:
    known = {}
    for name, factory in topologies.factories.items():
        schema = _schema_of(topology_model(name), definitions)
        schema["description"] = (inspect.getdoc(factory) or "").partition("\n\n")[0]
        described = _arguments(topologies.build) | _arguments(factory)
        for field, values in schema["properties"].items():
            if field in described:
                values["description"] = described[field]
        known[name] = schema
    return _union("topology", known, definitions)


def _arguments(function: Callable[..., Any]) -> dict[str, str]:
    """Return what a docstring says of each argument."""
    section = (inspect.getdoc(function) or "").partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, flags=re.M)
    return {name: " ".join(text.split()) for name, text in entries}


def _union(kind: str, known: dict[str, Schema], definitions: Schema, *further: Schema) -> Schema:
    """Return ``oneOf`` the known records, told apart by ``name``, which takes - for _ too."""
    for name, schema in known.items():
        spellings = sorted({name, name.replace("_", "-"), name.replace("-", "_")})
        schema["properties"] = {
            "name": {"enum": spellings},
            **schema.get("properties", {}),
        }
        schema["required"] = ["name", *schema.get("required", [])]
        definitions[f"{kind}-{name}"] = schema
    refs = [{"$ref": _REF.format(model=f"{kind}-{name}")} for name in known]
    return {"type": "object", "oneOf": [*refs, *further]}
