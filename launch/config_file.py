"""The YAML file of a run, read safely, and changed by ``-s KEY=VALUE`` and by comparisons."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from gossamer.runtime.errors import ConfigError, nearest

__all__ = ["apply_overrides", "load_yaml", "merge"]


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file safely.

    Raises:
        ConfigError: missing, not YAML, or not a mapping.
    """
    try:
        values = yaml.load(path.read_text(), _Loader)
    except OSError as error:
        reason = error.strerror
        raise ConfigError(f"file: cannot read {path} ({reason}); give a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"file: {path} is not text ({error}); give a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"file: {path} is not YAML: {_placed(error)}") from None
    if values is None:
        raise ConfigError(f"file: {path} is empty; write 'task: {{name: digits}}' and so on")
    if not isinstance(values, dict):
        raise ConfigError(
            f"file: {path} holds a {type(values).__name__} ({str(values)[:40]}), not sections; "
            "write 'key: value' lines"
        )
    return values


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice, of which YAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"'{key.value}' is written twice; keep one", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _number_or_text(loader: _Loader, node: yaml.ScalarNode) -> Any:
    """Read a number; 12:30, which is 750 in YAML 1.1, stays text."""
    if ":" in node.value:
        return node.value
    number = loader.construct_yaml_float if "float" in node.tag else loader.construct_yaml_int
    return number(node)


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _number_or_text)


def _placed(error: yaml.YAMLError) -> str:
    """Return what is wrong and where, on one line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if mark else problem


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Return ``values`` with each ``a.b=c`` applied; c is read as YAML.

    Raises:
        ConfigError: an override without '=', or a path through something that is no section.
    """
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not all(path.split(".")):
            raise ConfigError(f"-s {override}: write KEY=VALUE, for example -s steps=100")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"-s {override}: '{text}' is not YAML: {_placed(error)}") from None
        values = _override(values, path.split("."), value, path)
    return values


def _override(values: dict[str, Any], keys: list[str], value: Any, path: str) -> dict[str, Any]:
    key, *rest = keys
    old = values.get(key)
    if not rest:
        return merge(values, {key: value})
    if isinstance(old, list):
        return values | {key: _override_entry(old, rest, value, path)}
    if old is not None and not isinstance(old, dict):
        raise ConfigError(
            f"-s {path}: '{key}' is {old!r}, not a section with fields of its own; "
            f"write -s {key}=VALUE"
        )
    return values | {key: _override(old or {}, rest, value, path)}


def _override_entry(entries: list[Any], keys: list[str], value: Any, path: str) -> list[Any]:
    """Change the entry of a list of components that goes by the first key."""
    name, *rest = keys
    names = [entry.get("name") if isinstance(entry, dict) else entry for entry in entries]
    if name not in names:
        raise ConfigError(f"-s {path}: no entry '{name}'{nearest(name, map(str, names))}")
    place = names.index(name)
    entry = entries[place] if isinstance(entries[place], dict) else {"name": name}
    changed = _override(entry, rest, value, path) if rest else value
    return [*entries[:place], changed, *entries[place + 1 :]]


def merge(values: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` changed: a section that names a component replaces the old one whole."""
    result = dict(values)
    for key, value in change.items():
        old = result.get(key)
        if isinstance(value, Mapping) and isinstance(old, dict) and "name" not in value:
            result[key] = merge(old, value)
        else:
            result[key] = value
    return result
