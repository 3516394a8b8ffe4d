"""A user's own task as one function."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from gossamer.algorithms.problems import Problem, Task
from gossamer.algorithms.registry import import_object
from gossamer.runtime.errors import ConfigError

__all__ = ["Custom"]


class Custom(Task):
    """A problem built by a function of yours: `{name: custom, build: mymodule:make_problem}`."""

    name: str = "custom"
    function: str = Field(alias="build", pattern=r"^[\w.]+:\w+$")
    """`package.module:function`, called as function(n, seed, **options); returns a Problem for n
    ranks, the same on every process."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the function."""

    def build(self, n: int, seed: int) -> Problem:
        """Call the function.

        Raises:
            ConfigError: it cannot be imported, or does not return a problem for n ranks.
        """
        function = import_object(self.function, "task.build")
        problem = function(n, seed, **self.options)
        if not isinstance(problem, Problem):
            raise ConfigError(
                f"task.build: {self.function} must return a gossamer.algorithms.problems.Problem, "
                f"got {type(problem).__name__}"
            )
        expected = 0 if hasattr(problem.train, "draw") else n
        if len(problem.shards) != expected:
            raise ConfigError(
                f"task.build: {self.function} must return {expected} shards (one per rank, or none "
                f"for a stream), got {len(problem.shards)}"
            )
        return problem
