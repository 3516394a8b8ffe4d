"""A training program: task, oracle and algorithm put together, ready for the loop."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gossamer.algorithms.estimates import Metrics
from gossamer.algorithms.evaluation import Evaluator
from gossamer.algorithms.problems import Problem
from gossamer.algorithms.protocols import Algorithm, Oracle
from gossamer.algorithms.sampling import Sampler
from gossamer.runtime import Communicator, RanksDiffer
from gossamer.runtime.state import Scalar, flatten, restore

__all__ = ["TrainingProgram"]

_ORACLE = "oracle/"
_STATE = "state/"


class TrainingProgram:
    """What the loop drives when a model is trained.

    Attributes:
        state: the algorithm's.
        rounds_per_step: the algorithm's.
    """

    def __init__(
        self,
        comm: Communicator,
        problem: Problem,
        oracle: Oracle,
        algorithm: Algorithm,
        evaluator_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Set the oracle up, without a word to other processes; ``start`` comes next.

        Args:
            comm: the ranks.
            problem: the task, built for ``comm.n`` ranks.
            oracle: the outermost one.
            algorithm: who averages what with whom.
            evaluator_options: for ``Evaluator``.

        Raises:
            ConfigError: the task, the oracle and the algorithm do not fit.
        """
        self.comm, self.problem, self.oracle, self.algorithm = comm, problem, oracle, algorithm
        oracle.adapt(algorithm)
        algorithm.require(oracle)
        plan = oracle.setup(comm, problem)
        self.layout = oracle.layout
        if algorithm.optimizer is not None:
            algorithm.optimizer.know(self.layout)
        self.rounds_per_step = algorithm.rounds_per_step
        self._figures = oracle.training_figures
        self._sampler = Sampler(problem, plan, comm.ranks, comm.seed.value)
        self._evaluator_options = dict(evaluator_options or {})

    def start(self, parameters: Mapping[str, Tensor] | None = None) -> TrainingProgram:
        """Start the algorithm at x0; every process calls it, and may exchange messages in it.

        Args:
            parameters: by name, to start from instead of the module's own.

        Returns:
            The program itself.
        """
        comm, oracle, problem = self.comm, self.oracle, self.problem
        x = comm.alloc(self.layout.d, self.layout.dtype)
        if parameters is None:
            self.layout.adopt(problem.module, x[0])
            x[1:] = x[0]
        else:
            for s, view in zip(self.layout.slices, self.layout.views(x[0]), strict=True):
                view.copy_(parameters[s.name])
            x[:] = x[0].clone()
        oracle.start(comm.steps, self.algorithm.batches_per_step)
        self.state = self.algorithm.init(comm, oracle, x, self._batches())
        training = self._figures != "hidden"
        options = self._evaluator_options
        self._evaluator = Evaluator(comm, oracle, problem, training=training, **options)
        return self

    def step(self) -> Metrics:
        """Draw the batches of this step and make it.

        The loss on a batch is called ``batch_loss``: ``loss`` is the objective, of ``evaluate``.
        """
        figures = dict(self.algorithm.step(self.comm, self.oracle, self.state, self._batches()))
        if self._figures != "hidden" and "loss" in figures:
            figures[self._marked("batch_loss")] = figures["loss"]
        figures.pop("loss", None)
        return figures

    def evaluate(self) -> Mapping[str, float]:
        """Return loss, accuracy, gradient norm and consensus of the whole run.

        Where privacy hides figures of the training examples, only those of the parameters and of
        the test set; where it marks them, their names begin with ``nonprivate_``.

        Raises:
            RanksDiffer: the algorithm keeps the ranks equal to the bit, and they are not.
        """
        equal = self._check_equal()
        figures = self._evaluator.evaluate(self.state.x, equal=equal)
        training = self._evaluator.training_names
        return {self._marked(k) if k in training else k: value for k, value in figures.items()}

    def _check_equal(self) -> bool:
        """Compare the ranks' parameters, where the algorithm keeps them equal to the bit.

        Returns:
            Whether it does.
        """
        comm, x = self.comm, self.state.x
        if not self.algorithm.keeps_equal(comm.topology):
            return False
        first = self.layout.digest(x[0])
        bits = x.view(torch.uint8)
        digests = [
            first if torch.equal(row, bits[0]) else self.layout.digest(x[i])
            for i, row in enumerate(bits)
        ]
        local = torch.tensor([list(digest[:8]) for digest in digests], dtype=torch.uint8)
        rows = comm.all_gather(local.to(comm.device), count=False)
        apart = (rows != rows[:1]).any(dim=1).nonzero().flatten().tolist()
        if apart:
            raise RanksDiffer(
                f"parameters (step {comm.step}): {self.algorithm.name} keeps the ranks equal to "
                f"the bit, but ranks {apart} hold others than rank 0: kernels that are not "
                "deterministic, processors of several kinds, or faulty memory; resume from a "
                "checkpoint of before the last evaluation in the log"
            )
        return True

    def _marked(self, name: str) -> str:
        return f"nonprivate_{name}" if self._figures == "marked" else name

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Scalar]]:
        """Return the algorithm's and the oracle's state."""
        tensors, scalars = flatten(self.state)
        named = {_STATE + name: tensor for name, tensor in tensors.items()}
        named |= {_ORACLE + name: tensor for name, tensor in self.oracle.state_dict().items()}
        return named, scalars

    def restore(self, tensors: dict[str, Tensor], scalars: dict[str, Scalar]) -> None:
        """Take back what ``snapshot`` returned (rows of the hosted ranks)."""
        state = {k.removeprefix(_STATE): v for k, v in tensors.items() if k.startswith(_STATE)}
        restore(self.state, state, scalars)
        oracle = {k.removeprefix(_ORACLE): v for k, v in tensors.items() if k.startswith(_ORACLE)}
        self.oracle.load_state_dict(oracle)

    def mean(self) -> dict[str, Tensor]:
        """Return the mean of the parameters over ranks, by name."""
        row = self.comm.all_reduce(self.state.x, "mean", count=False)[0]
        views = self.layout.views(row)
        return {s.name: view for s, view in zip(self.layout.slices, views, strict=True)}

    def signature(self) -> list[list[Any]]:
        """Return name and shape of every parameter: what a checkpoint must agree with."""
        return [[s.name, list(s.shape)] for s in self.layout.slices]

    def parameters_sha256(self) -> str:
        """Return the SHA-256 over the SHA-256 digests of the ranks' parameters, in rank order.

        Padding is skipped; two runs agree to the bit exactly if these agree.
        """
        digests = [list(self.layout.digest(row)) for row in self.state.x]
        local = torch.tensor(digests, dtype=torch.uint8)
        rows = self.comm.all_gather(local.to(self.comm.device), count=False).cpu()
        return hashlib.sha256(rows.numpy().tobytes()).hexdigest()

    def _batches(self) -> Any:
        return self._sampler.batches(self.comm.step, self.algorithm.batches_per_step)
