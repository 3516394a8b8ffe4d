"""The JSON schema of the YAML file agrees with what reads it."""

import re
from pathlib import Path

import pytest
import yaml

from gossamer import topologies
from gossamer.algorithms.registry import REGISTRY
from gossamer.launch.config import RunConfig
from gossamer.launch.schema import json_schema

jsonschema = pytest.importorskip("jsonschema")

ROOT = Path(__file__).parents[2]
FOLDERS = ("launch", "examples", "tests")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.yaml"))
RUN = {"task": {"name": "digits"}, "algorithm": {"name": "d-nasa"}, "steps": 10}


class YAML12(yaml.SafeLoader):
    """Reads 1e-3 as a number, as editors do and the run's own checks allow."""


YAML12.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)


@pytest.fixture(scope="module")
def validator():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_there_are_files_to_check():
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_of_the_repository_validates(validator, path):
    validator.validate(yaml.load(path.read_text(), YAML12))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"topology": {"name": "ring", "weights": "metropolis"}},
        {"topology": {"name": "one-peer-exponential"}},  # - for _
        {"oracle": [{"name": "backprop", "batch_size": 8}, "backprop"]},
        {"optimizer": {"name": "sgd", "lr": 0.1, "schedule": "cosine"}},
        {"algorithm": {"name": "mymodule:MyAlgorithm", "anything": 1}},
        {"compare": {"a": {"steps": 5}, "b": {"algorithm": {"rounds": 2}}, "c": {}}},
        {"compare": {"a": {"optimizer": {"name": "sgd", "lr": 0.1}}, "b": {"optimizer": None}}},
        {"ranks": None},
    ],
)
def test_what_the_reader_takes_validates(validator, change):
    validator.validate(RUN | change)


@pytest.mark.parametrize(
    "change",
    [
        {"stpes": 10},
        {"steps": "many"},
        {"steps": 0},
        {"steps": 2.5},
        {"transport": "pigeon"},
        {"algorithm": {"name": "d-nasaa"}},
        {"algorithm": {"name": "d-nasa", "local_stpes": 1}},
        {"algorithm": {}},
        {"algorithm": {"name": "dsgd", "optimizer": {"name": "sgd", "lr": 0.1}}},
        {"optimizer": {"name": "sgd"}},  # lr is required
        {"optimizer": {"name": "sgd", "lr": 0}},
        {"topology": {"name": "ringg"}},
        {"topology": {"name": "ring", "radius": 2}},
        {"oracle": []},
        {"compare": {"a": {"stpes": 5}}},
        {"compare": {"a": {"compare": {}}}},
        {"compare": {"a": {"algorithm": {"name": "d-nasaa"}}}},
    ],
)
def test_what_the_reader_refuses_does_not_validate(validator, change):
    assert not validator.is_valid(RUN | change)


@pytest.mark.parametrize("missing", ["task", "algorithm", "steps"])
def test_required_sections_may_stand_in_the_runs_of_a_comparison_only(validator, missing):
    rest = {key: value for key, value in RUN.items() if key != missing}
    assert not validator.is_valid(rest)
    assert validator.is_valid({**rest, "compare": {"a": {missing: RUN[missing]}}})


def test_everything_with_a_name_is_in_the_schema():
    definitions = json_schema()["$defs"]
    known = {f"{kind}-{name}" for kind, names in REGISTRY.items() for name in names}
    known |= {f"topology-{name}" for name in topologies.factories}
    assert known <= set(definitions)


def test_fields_carry_their_docstrings():
    schema = json_schema()
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    undocumented = [k for k, v in schema["properties"].items() if "description" not in v]
    assert undocumented == []
    ring = schema["$defs"]["topology-ring"]
    assert "one before and the one after" in ring["description"]
    assert ring["properties"]["lazy"]["description"] == "use (I + W(t)) / 2."
    assert "description" in schema["$defs"]["optimizer-sgd"]["properties"]["lr"]
