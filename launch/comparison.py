"""The runs of one file: itself, or those below ``compare``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from gossamer.launch.config import (
    Experiment,
    RunConfig,
    field_names,
    resolve,
)
from gossamer.launch.config_file import apply_overrides, merge
from gossamer.runtime.errors import ConfigError, nearest
from gossamer.runtime.transports.select import world_size
from gossamer.topologies import TopologyError

__all__ = ["experiments_of", "ranks_of", "variants_of", "with_overrides"]

_SHARED = ("transport", "processes", "threads", "timeout_s")
"""Fields that one start has once, however many runs it compares."""


def with_overrides(
    values: Mapping[str, Any], settings: list[str], options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the sections of a file with what the command line says, which wins.

    Under ``compare`` a setting changes every run, after the run's own fields were merged;
    ``compare.NAME.a.b=c`` changes one.

    Args:
        values: the sections of the file.
        settings: ``a.b=c``.
        options: fields given as options of their own; None where not given.

    Raises:
        ConfigError: a setting is malformed, or names a field that a run's component lacks.
    """
    given = {key: value for key, value in (options or {}).items() if value is not None}
    settings = [*settings, *(f"{key}={json.dumps(value)}" for key, value in given.items())]
    compare = values.get("compare")
    if not isinstance(compare, Mapping) or not all(isinstance(v, dict) for v in compare.values()):
        return apply_overrides(dict(values), settings)
    own = [s for s in settings if s.startswith("compare")]
    for setting in own:
        name = setting.partition("=")[0].split(".")[1:2]
        if name and name[0] not in compare:
            raise ConfigError(f"-s {setting}: no run '{name[0]}'{nearest(name[0], compare)}")
    values = apply_overrides(dict(values), own)
    shared = [s for s in settings if s not in own and re.split("[.=]", s)[0] in _SHARED]
    common = apply_overrides({k: v for k, v in values.items() if k != "compare"}, shared)
    every = [s for s in settings if s not in own and s not in shared]
    runs = values["compare"]
    if not every or not isinstance(runs, Mapping):
        return {**common, "compare": runs}
    whole = {name: merge(common, change) for name, change in runs.items()}
    for setting in every:
        _require_field(setting, whole)
    changed = {}
    for name, fields in whole.items():
        fields = apply_overrides(fields, every)
        changed[name] = {k: v for k, v in fields.items() if k not in _SHARED or k in runs[name]}
    return {**common, "compare": changed}


def _require_field(setting: str, runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a setting of a field that some runs' component has and others' lacks."""
    path = setting.partition("=")[0]
    kind, _, rest = path.partition(".")
    field = rest.partition(".")[0]
    if not field:
        return
    known = {name: field_names(kind, values.get(kind)) for name, values in runs.items()}
    lacking = [name for name, names in known.items() if names is not None and field not in names]
    having = [name for name, names in known.items() if names is not None and field in names]
    if lacking and having:
        component = runs[lacking[0]][kind].get("name")
        raise ConfigError(
            f"-s {setting}: {kind} '{component}' of run '{lacking[0]}' has no field '{field}'; "
            f"set it where it is known: -s compare.{having[0]}.{setting}"
        )


def variants_of(values: Mapping[str, Any]) -> dict[str, RunConfig]:
    """Return the runs of a file by name; one without ``compare`` has the name ''.

    Raises:
        ConfigError: a field is wrong.
    """
    common = {k: v for k, v in values.items() if k != "compare"}
    compare = values.get("compare")
    if compare is None:
        return {"": resolve(common)}
    if (
        not isinstance(compare, Mapping)
        or not compare
        or not all(isinstance(v, Mapping) for v in compare.values())
    ):
        raise ConfigError(
            "compare: must be 'name: {fields that differ}', for example "
            f"{{dsgd: {{algorithm: {{name: dsgd}}}}}}, got {compare!r}"
        )
    runs = {}
    for name, change in compare.items():
        if "compare" in change:
            raise ConfigError(
                f"compare.{name}.compare: a run of a comparison is no comparison; list all runs "
                "below one 'compare'"
            )
        if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", name):
            raise ConfigError(
                f"compare: {name!r} names a folder; use letters, digits, '-', '_', '+' and '.'"
            )
        for key in _SHARED:
            if key in change:
                raise ConfigError(
                    f"compare.{name}.{key}: all runs of a file share it; write '{key}: "
                    f"{change[key]}' outside compare"
                )
        try:
            runs[name] = resolve(merge(common, change))
        except ConfigError as error:
            raise ConfigError(f"compare.{name}: {error}") from None
    return runs


def experiments_of(
    runs: Mapping[str, RunConfig], ranks: Mapping[str, int]
) -> dict[str, Experiment]:
    """Return the runs with their names looked up and their graphs built.

    Raises:
        ConfigError: names the run of a comparison, field, value and fix.
    """
    experiments = {}
    for name, config in runs.items():
        try:
            experiments[name] = Experiment(config, ranks[name])
        except (ConfigError, TopologyError) as error:
            if not name:
                raise
            raise ConfigError(f"compare.{name}: {error}") from error
    return experiments


def ranks_of(config: RunConfig) -> int:
    """Return n: the field, or one rank per process."""
    launched = world_size()
    if config.ranks is None:
        return launched if launched > 1 else (config.processes or 1)
    if launched > config.ranks:
        raise ConfigError(
            f"ranks: {config.ranks} ranks cannot fill the {launched} processes that were "
            f"launched; set ranks: {launched}, or launch {config.ranks}"
        )
    return config.ranks
