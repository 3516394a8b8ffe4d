"""The table of algorithms in the README: nothing in it is written by hand.

Names, sources and fields come from the classes, the state from its dataclass, messages and elements
from running a few steps, and what W is admitted from asking ``adapt`` with real topologies.
"""

from __future__ import annotations

import logging
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from gossamer.algorithms.program import TrainingProgram
from gossamer.algorithms.protocols import Algorithm
from gossamer.algorithms.registry import REGISTRY, find
from gossamer.launch.config import Experiment, resolve
from gossamer.runtime import Communicator, ConfigError, StackedTransport
from gossamer.runtime.state import flatten
from gossamer.topologies import Topology, build

__all__ = ["Row", "algorithm_table", "markdown"]

_RANKS, _STEPS, _LOCAL_STEPS = 8, 4, 2
_ORACLES = {
    "row": {"name": "backprop"},
    "directions": {"name": "zeroth-order", "directions": "own"},
}
_COLUMN_STOCHASTIC = [[i, (i + 1) % _RANKS] for i in range(_RANKS)] + [[0, 3], [2, 6]]


@dataclass(frozen=True)
class Row:
    """One algorithm.

    Attributes:
        name: as in YAML.
        source: arXiv id, or empty.
        file: where it stands.
        state: the tensors it keeps per rank, with their length.
        messages: sent per rank and step, on a ring of 8.
        elements: sent per rank and step on a ring of 8, in parameters' size.
        graphs: the kinds of W it admits.
    """

    name: str
    source: str
    file: str
    state: tuple[str, ...]
    messages: float
    elements: str
    graphs: tuple[str, ...]


def algorithm_table() -> list[Row]:
    """Run every registered algorithm for a few steps and return what was seen."""
    log = logging.getLogger("gossamer")
    level = log.level
    log.setLevel(logging.ERROR)  # lazy W: expected here
    try:
        return [_row(name) for name in REGISTRY["algorithm"]]
    finally:
        log.setLevel(level)


def markdown(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| algorithm | arXiv | state per rank | messages | elements | W may be |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| [`{r.name}`]({r.file}) | {r.source} | {', '.join(r.state)} | {r.messages:g} "
        f"| {r.elements} | {', '.join(r.graphs)} |"
        for r in rows
    ]
    return "\n".join(lines)


def _row(name: str) -> Row:
    cls = find("algorithm", name)
    assert issubclass(cls, Algorithm), cls
    exchanges = "row" if "row" in cls.takes else "directions"
    section: dict[str, object] = {"name": name}
    if "local_steps" in cls.model_fields:
        section["local_steps"] = _LOCAL_STEPS
    values: dict[str, object] = {
        "task": {"name": "breast-cancer", "model": "linear"},
        "oracle": {"batch_size": 4, **_ORACLES[exchanges]},
        "algorithm": section,
        "steps": _STEPS,
        "ranks": _RANKS,
    }
    if cls.model_fields["optimizer"].is_required():
        values["optimizer"] = {"name": "sgd", "lr": 0.01}
    experiment = Experiment(resolve(values), _RANKS)
    comm = Communicator(experiment.topology, StackedTransport(), steps=_STEPS)
    problem = experiment.task.build(_RANKS, 0)
    program = TrainingProgram(comm, problem, experiment.oracle(), experiment.algorithm).start()
    if exchanges == "directions":
        _run(program)  # until as many records are under way as later
    comm.traffic.bytes_sent[:] = 0  # a start-up exchange is not a step's
    comm.traffic.messages_sent[:] = 0
    _run(program)
    module = sys.modules[cls.__module__]
    source = re.search(r"arXiv:(\d+\.\d+)", f"{cls.__doc__} {module.__doc__}")
    parameter_bytes = program.layout.dtype.itemsize
    elements = float(comm.traffic.bytes_sent.mean()) / _STEPS / parameter_bytes
    d = program.layout.d if exchanges == "row" else None  # numbers do not grow with d
    return Row(
        name=name,
        source=source.group(1) if source else "",
        file="/".join(Path(str(module.__file__)).parts[-3:]),
        state=_state(program, d),
        messages=float(comm.traffic.messages_sent.mean()) / _STEPS,
        elements=_length(elements, d),
        graphs=tuple(kind for kind, graph in _graphs() if _admits(experiment.algorithm, graph)),
    )


def _run(program: TrainingProgram) -> None:
    for _ in range(_STEPS):
        program.step()
        program.comm.step += 1
        program.comm.round += program.rounds_per_step


def _state(program: TrainingProgram, d: int | None) -> tuple[str, ...]:
    tensors, _ = flatten(program.state)
    parameter_bytes, row = program.layout.dtype.itemsize, program.layout.d
    sizes = {name: t[0].nbytes / parameter_bytes for name, t in tensors.items()}  # packed bytes too
    return tuple(
        name if size == row else f"{name} ({_length(size, d)})" for name, size in sizes.items()
    )


def _length(elements: float, d: int | None) -> str:
    """Return a number of elements, in units of d where it is given."""
    return f"{elements:g}" if d is None else f"{elements / d:.3g} d"


def _graphs() -> list[tuple[str, Topology]]:
    return [
        ("undirected", build("ring", _RANKS)),
        ("directed", build("exponential", _RANKS)),
        ("time-varying", build("one_peer_exponential", _RANKS)),
        (
            "push-sum",
            build("custom", _RANKS, edges=_COLUMN_STOCHASTIC, directed=True, weights="push_sum"),
        ),
    ]


def _admits(algorithm: Algorithm, graph: Topology) -> bool:
    try:
        algorithm.adapt(graph)
    except ConfigError:
        return False
    return True
