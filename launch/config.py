"""The configuration of a run: the sections of the YAML file, checked before anything starts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, Strict, create_model

from gossamer import topologies
from gossamer.algorithms.oracles.wrapper import OracleWrapper
from gossamer.algorithms.problems import Task
from gossamer.algorithms.protocols import Algorithm, Optimizer, Oracle
from gossamer.algorithms.registry import find
from gossamer.runtime.component import Component, validate
from gossamer.runtime.errors import ConfigError, nearest
from gossamer.topologies import Topology

__all__ = [
    "Experiment",
    "RunConfig",
    "field_names",
    "oracle_layers",
    "resolve",
]

Int = Annotated[int, Strict()]
Section = dict[str, Any]
C = TypeVar("C", bound=Component)


class RunConfig(Component):
    """One run, as written in YAML."""

    task: Section
    """A model and its data: {name: digits, model: mlp, heterogeneity: sorted}."""
    oracle: Section | list[Section | str] = Field(default_factory=lambda: {"name": "backprop"})
    """Where gradients come from; a list stacks oracles, the outermost last."""
    optimizer: Section | None = None
    """The local update, with its learning rate and schedule: {name: sgd, lr: 0.1}."""
    algorithm: Section
    """Who averages what with whom: {name: d-nasa}."""
    topology: Section = Field(default_factory=lambda: {"name": "ring"})
    """The graph, or schedule of graphs: {name: ring, weights: metropolis}."""
    ranks: Annotated[Int, Field(ge=1)] | None = None
    """Nodes of the graph, spread evenly over the processes; default: one per process."""
    steps: Annotated[Int, Field(ge=1)]
    """Steps to run; one step is one round."""
    seed: Int = 0
    """Of every counted random number."""
    transport: Literal["auto", "stacked", "native", "mpi", "gloo", "nccl", "hybrid"] = "auto"
    """How bytes move; auto follows how the program was started."""
    processes: Annotated[Int, Field(ge=1)] | None = None
    """Local processes to start when nothing launched the program; default: 1."""
    threads: Annotated[Int, Field(ge=1)] = 1
    """CPU threads per process; the bits of a run are those of its number of threads."""
    timeout_s: float = Field(default=300.0, gt=0)
    """Bound of every wait for another process, in seconds."""
    log_every: Annotated[Int, Field(ge=1)] = 10
    """Steps between two lines of metrics.jsonl."""
    evaluate_every: Annotated[Int, Field(ge=1)] | None = None
    """Steps between evaluations; default: a tenth of the run, on a multiple of log_every."""
    evaluate_examples: Annotated[Int, Field(ge=1)] | None = None
    """At most this many examples per rank in an evaluation; default: all (128 for language)."""
    evaluate_gradient: bool | None = None
    """Compute grad_norm; default: where the oracle backpropagates, and has the memory for it."""
    checkpoint_every: Annotated[Int, Field(ge=0)] = 0
    """Steps between checkpoints; 0: at the end, and when told to stop."""
    keep_checkpoints: Annotated[Int, Field(ge=1)] = 2
    """How many of the latest checkpoints stay."""
    keep_best: str | None = None
    """A figure of the evaluations, as accuracy or dev_loss: the checkpoint at its best stays in
    best/, and its figures in the summary."""
    trace: bool = False
    """Write trace.json, a Chrome trace with a lane per process and kind of work."""
    tensorboard: bool = False
    """Write TensorBoard event files beside metrics.jsonl."""
    compare: dict[str, dict[str, Any]] | None = None
    """Several runs of one file: name -> fields that differ; each in a folder of its own."""


class Experiment:
    """A configuration whose names are classes: everything checked that needs no data.

    Attributes:
        config: as validated.
        n: number of ranks.
    """

    def __init__(self, config: RunConfig, n: int) -> None:
        self.config, self.n = config, n
        self.task = _component("task", config.task, Task)
        optimizer = config.optimizer
        self.optimizer = (
            _component("optimizer", optimizer, Optimizer) if optimizer is not None else None
        )
        if self.optimizer is not None:
            self.optimizer.require_steps(config.steps)
        self.algorithm = self._algorithm()
        self.oracle()
        self.topology: Topology = self.algorithm.adapt(build_topology(config.topology, n))

    def oracle(self) -> Oracle:
        """Return a fresh oracle (it holds the state of one run)."""
        found: Oracle | None = None
        for section in self.oracle_sections():
            cls = _class_of("oracle", section, Oracle)
            wraps = issubclass(cls, OracleWrapper)
            if wraps and found is None:
                raise ConfigError(
                    f"oracle: {section['name']} wraps another oracle; write "
                    f"'oracle: [backprop, {{name: {section['name']}, ...}}]', innermost first"
                )
            if not wraps and found is not None:
                raise ConfigError(
                    f"oracle: a list stacks oracles, innermost first; {section['name']} wraps none "
                    "and can only be the first entry"
                )
            wish = self.algorithm.objective
            takes_one = "objective" in cls.model_fields
            if takes_one and wish is not None and section.get("objective", "auto") == "auto":
                section = {**section, "objective": wish}
            found = _component("oracle", section, Oracle, inner=found)
        assert found is not None
        found.adapt(self.algorithm)
        self.algorithm.require(found)
        return found

    def oracle_sections(self) -> list[Section]:
        """Return a section for each oracle of the stack, innermost first."""
        given = self.config.oracle
        stack = given if isinstance(given, list) else [given]
        return [{"name": s} if isinstance(s, str) else s for s in stack]

    def resolved(self) -> dict[str, Any]:
        """Return every field with its default filled in, for config.yaml."""

        def dumped(part: BaseModel) -> dict[str, Any]:
            return part.model_dump(exclude_none=True, by_alias=True)

        resolved = dumped(self.config)
        resolved["ranks"] = self.n
        resolved["task"] = dumped(self.task)
        resolved["algorithm"] = dumped(self.algorithm)
        stack = [
            layer.model_dump(exclude_none=True, by_alias=True)
            for layer in oracle_layers(self.oracle())
        ]
        for layer, section in zip(stack, self.oracle_sections(), strict=True):
            layer["name"] = section["name"] if ":" in section["name"] else layer["name"]
        resolved["oracle"] = stack if len(stack) > 1 else stack[0]
        if self.optimizer is not None:
            resolved["optimizer"] = dumped(self.optimizer)
        for kind in ("task", "optimizer", "algorithm"):
            given = getattr(self.config, kind)
            if isinstance(given, dict) and ":" in str(given.get("name", "")):
                resolved[kind]["name"] = given["name"]  # a user's own class, by its path
        return resolved

    def _algorithm(self) -> Algorithm:
        section = self.config.algorithm
        cls = _class_of("algorithm", section, Algorithm)
        wants = cls.model_fields["optimizer"].is_required()
        if wants and self.optimizer is None:
            raise ConfigError(
                f"optimizer: {section['name']} makes local updates and needs one; "
                "add 'optimizer: {name: sgd, lr: 0.1}'"
            )
        if self.optimizer is not None and not wants and not cls.optional_optimizer:
            raise ConfigError(
                f"optimizer: {section['name']} has an update rule of its own, the section would "
                "have no effect; remove it"
            )
        values = {k: v for k, v in section.items() if k != "name" or ":" not in str(v)}
        if "optimizer" in values:
            raise ConfigError("algorithm.optimizer: write 'optimizer:' beside 'algorithm:'")
        return validate(cls, {**values, "optimizer": self.optimizer}, "algorithm")


def resolve(values: Mapping[str, Any]) -> RunConfig:
    """Validate the sections of one run.

    Raises:
        ConfigError: field, value and fix.
    """
    for kind in ("task", "oracle", "optimizer", "algorithm", "topology"):
        section = values.get(kind, {})
        if kind == "oracle" and isinstance(section, list) and section:
            continue
        if not isinstance(section, Mapping) and not (kind == "optimizer" and section is None):
            name = section if isinstance(section, str) else "..."
            raise ConfigError(
                f"{kind}: must be a section such as '{kind}: {{name: {name}}}', got {section!r}"
            )
    config = validate(RunConfig, dict(values), "")
    if config.evaluate_every is not None and config.evaluate_every % config.log_every:
        raise ConfigError(
            f"evaluate_every: must be a multiple of log_every ({config.log_every}), since "
            f"evaluations go into its lines, got {config.evaluate_every}"
        )
    return config


def _class_of(kind: str, section: Section, base: type[C]) -> type[C]:
    if section.get("name") is None:
        raise ConfigError(f"{kind}.name: missing; write '{kind}: {{name: ...}}'")
    name = section["name"]
    if not isinstance(name, str):
        raise ConfigError(f"{kind}.name: must be text, got {name!r}")
    cls = find(kind, name)
    if not issubclass(cls, base) or inspect.isabstract(cls):
        what = "lacks methods" if issubclass(cls, base) else "is no class derived from it"
        raise ConfigError(
            f"{kind}.name: {name} must be a {base.__module__}.{base.__name__}, "
            f"but {what}{_missing_methods(cls)}"
        )
    return cls


def field_names(kind: str, section: Any) -> set[str] | None:
    """Return the fields of the component a section names; None where there is none to ask."""
    bases: dict[str, type[Component]] = {
        "task": Task,
        "oracle": Oracle,
        "optimizer": Optimizer,
        "algorithm": Algorithm,
    }
    if not isinstance(section, Mapping) or not isinstance(section.get("name"), str):
        return None
    if kind in bases:
        return {"name", *_class_of(kind, dict(section), bases[kind]).model_fields}
    name = str(section["name"]).replace("-", "_").lower()
    if kind == "topology" and name in topologies.factories:
        return {"name", *topology_model(name).model_fields}
    return None


def _missing_methods(cls: type[Any]) -> str:
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    return f": {', '.join(missing)}" if missing else ""


def oracle_layers(oracle: Oracle) -> list[Oracle]:
    """Return the oracles of a stack, innermost first."""
    inside = oracle_layers(oracle.inner) if isinstance(oracle, OracleWrapper) else []
    return [*inside, oracle]


def _component(kind: str, section: Section, base: type[C], inner: Oracle | None = None) -> C:
    cls = _class_of(kind, section, base)
    if "inner" in section:
        raise ConfigError(f"{kind}.inner: write the oracle inside as the entry before it")
    values = dict(section)
    if inner is not None:
        values["inner"] = inner
    if ":" in str(values["name"]):
        del values["name"]  # a user's own class; its path is not one of its fields
    elif isinstance(values["name"], str):
        values["name"] = values["name"].replace("_", "-")
    return validate(cls, values, kind)


# --- topologies: plain functions, whose signature is their configuration ----------------------


def topology_model(name: str) -> type[BaseModel]:
    """Return the record of a topology's parameters, from its function's signature."""
    if name not in topologies.factories:
        offer = nearest(name, topologies.factories)
        raise ConfigError(f"topology.name: unknown topology '{name}'{offer}")
    fields: dict[str, Any] = {}
    for function in (topologies.factories[name], topologies.build):
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            if parameter.name in ("n", "name") or parameter.kind is parameter.VAR_KEYWORD:
                continue
            default = ... if parameter.default is parameter.empty else parameter.default
            annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
            fields.setdefault(parameter.name, (annotation, default))
    return create_model(f"topology_{name}", __base__=Component, **fields)


def build_topology(section: Section, n: int) -> Topology:
    """Build the topology of a section for n ranks.

    Raises:
        ConfigError: unknown name or field, wrong type.
        TopologyError: the graph cannot be built, or is not fit for averaging.
    """
    if section.get("name") is None:
        raise ConfigError("topology.name: missing; write 'topology: {name: ring}'")
    values = {k: v for k, v in section.items() if k != "name"}
    name = str(section["name"]).replace("-", "_").lower()
    if name not in topologies.factories:  # an alias, or a message with the nearest names
        return topologies.build(name, n, **values)
    model = validate(topology_model(name), values, "topology")
    given = {key: getattr(model, key) for key in values}
    return topologies.build(name, n, **given)
