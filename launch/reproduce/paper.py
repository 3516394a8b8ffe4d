"""A paper: its groups of claims, what it does not claim, and where each paper's module is."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from gossamer.launch.reproduce.claims import Claim
from gossamer.launch.reproduce.simulation import Laboratory
from gossamer.runtime.errors import ConfigError, nearest

__all__ = ["PAPERS", "Group", "Paper", "find_paper"]

Group = Callable[[Laboratory], Iterable[Claim]]
"""Runs what a few claims need and returns them."""

PAPERS = {"dnasa": "gossamer.launch.reproduce.dnasa"}
"""Name on the command line -> module that holds ``PAPER``."""


@dataclass(frozen=True)
class Paper:
    """What ``gossamer reproduce NAME`` runs and prints.

    Attributes:
        title: of the table.
        groups: by name.
        limits: what the method does not do, one statement each.
    """

    title: str
    groups: Mapping[str, Group]
    limits: tuple[str, ...] = ()


def find_paper(name: str) -> Paper:
    """Return the paper called ``name``.

    Raises:
        ConfigError: no such paper; the nearest names are offered.
    """
    key = name.lower().replace("-", "").replace("_", "")
    if key not in PAPERS:
        raise ConfigError(f"paper: unknown paper '{name}'{nearest(name, PAPERS)}")
    paper = importlib.import_module(PAPERS[key]).PAPER
    assert isinstance(paper, Paper)
    return paper
