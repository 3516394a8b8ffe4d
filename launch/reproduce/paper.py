"""A paper: its groups of claims, what it does not claim, and where each paper's module is."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from gossamer.launch.reproduce.claims import Claim
from gossamer.launch.reproduce.simulation import Laboratory
from gossamer.runtime.errors import ConfigError, nearest

__all__ = ["PAPERS", "Group", "Paper", "find_paper"]

Group = Callable[[Laboratory], Iterable[Claim]]
"""Runs what a few claims need and returns them."""

PAPERS = {
    "disk": "gossamer.launch.reproduce.disk",
    "dnasa": "gossamer.launch.reproduce.dnasa",
    "doppler": "gossamer.launch.reproduce.doppler",
    "dp-pretraining": "gossamer.launch.reproduce.dp_pretraining",
    "emc2": "gossamer.launch.reproduce.emc2",
    "sltrain": "gossamer.launch.reproduce.sltrain",
    "zo-bench": "gossamer.launch.reproduce.zo_bench",
}
"""Name on the command line -> module that holds ``PAPER``."""


@dataclass(frozen=True)
class Paper:
    """What ``gossamer reproduce NAME`` runs and prints.

    Attributes:
        title: of the table.
        groups: by name.
        limits: what the method does not do, one statement each.
        seeds: of a group's random experiments, when the user says nothing; 3 where it is not named.
    """

    title: str
    groups: Mapping[str, Group]
    limits: tuple[str, ...] = ()
    seeds: Mapping[str, int] = field(default_factory=dict)


def find_paper(name: str) -> Paper:
    """Return the paper called ``name``; case, dashes and underscores do not matter.

    Raises:
        ConfigError: no such paper; the nearest names are offered.
    """
    modules = {_plain(known): module for known, module in PAPERS.items()}
    if _plain(name) not in modules:
        raise ConfigError(f"paper: unknown paper '{name}'{nearest(name, PAPERS)}")
    paper = importlib.import_module(modules[_plain(name)]).PAPER
    assert isinstance(paper, Paper)
    return paper


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
