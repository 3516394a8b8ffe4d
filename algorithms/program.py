"""A training program: task, oracle and algorithm put together, ready for the loop."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.algorithms.common_start import digests_of, fixed_tensors, require_common
from gossamer.algorithms.estimates import Metrics
from gossamer.algorithms.evaluation import Evaluator
from gossamer.algorithms.oracles.buffers import BufferRows
from gossamer.algorithms.problems import Problem
from gossamer.algorithms.protocols import Algorithm, Oracle
from gossamer.algorithms.sampling import Sampler
from gossamer.runtime import Communicator, ConfigError, RanksDiffer
from gossamer.runtime.state import Scalar, flatten, restore
from gossamer.topologies import Topology

__all__ = ["TrainingProgram"]

_ORACLE = "oracle/"
_STATE = "state/"


class TrainingProgram:
    """What the loop drives when a model is trained.

    Attributes:
        state: the algorithm's.
        rounds_per_step: the algorithm's.
        fixed_sha256: of what is not trained (frozen parameters, supports) as it is at the start;
            None: there is nothing, or it was not started.
    """

    fixed_sha256: str | None = None

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
            alike = algorithm.mean_delay(comm.topology) is not None
            algorithm.optimizer.know(self.layout, alike)
        self.rounds_per_step = algorithm.rounds_per_step
        if problem.restarts is not None:
            self._buffers = _require_restarts(oracle, algorithm, comm.topology)
        self._figures = oracle.training_figures
        self._sampler = Sampler(problem, plan, comm.ranks, comm.seed.value)
        self._weighed = np.zeros(comm.local)
        self._evaluator_options = dict(evaluator_options or {})
        if algorithm.streams and self._evaluator_options.get("gradient") is None:
            self._evaluator_options["gradient"] = False  # it would take the row that is saved

    def start(
        self, parameters: Mapping[str, Tensor] | None = None, *, resumed: bool = False
    ) -> TrainingProgram:
        """Start the algorithm at x0; every process calls it, and may exchange messages in it.

        Args:
            parameters: by name, to start from instead of the module's own.
            resumed: ``restore`` comes next, or what a checkpoint holds is in ``parameters``: the
                module's own need not be alike.

        Returns:
            The program itself.

        Raises:
            RanksDiffer: the processes' modules start from different parameters, or differ in what
                is not trained.
        """
        comm, oracle, problem = self.comm, self.oracle, self.problem
        self._require_common_start(compare_parameters=parameters is None and not resumed)
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
        if problem.restarts is not None:
            self._optimizer_rows()
        training = self._figures != "hidden"
        options = self._evaluator_options
        self._evaluator = Evaluator(comm, oracle, problem, training=training, **options)
        return self

    def _require_common_start(self, compare_parameters: bool) -> None:
        module, layout = self.problem.module, self.layout
        digests = digests_of(fixed_tensors(module, layout))
        if digests:
            self.fixed_sha256 = hashlib.sha256(b"".join(digests.values())).hexdigest()
        if compare_parameters and self.comm.transport.processes > 1:
            trained = zip(layout.slices, layout.parameters(module), strict=True)
            digests = digests_of({s.name: p for s, p in trained}) | digests
        require_common(self.comm, digests)

    def step(self) -> Metrics:
        """Draw the batches of this step and make it.

        The loss on a batch is called ``batch_loss``: ``loss`` is the objective, of ``evaluate``.
        """
        batches = self._batches()
        weights = np.zeros(self.comm.local)
        if self._figures != "hidden":
            for draw in batches:
                weights += [self.problem.weigh(batch.inputs) for batch in draw]
            self._weighed += weights
        figures = dict(self.algorithm.step(self.comm, self.oracle, self.state, batches))
        self._restart()
        if self._figures != "hidden" and "loss" in figures:
            figures[self._marked("batch_loss")] = self._weighed_loss(figures["loss"], weights)
        figures.pop("loss", None)
        return figures

    def _weighed_loss(self, loss: Tensor | float, weights: np.ndarray) -> Tensor | float:
        """Return what has the mean over tokens as its mean over ranks, where batches differ."""
        by_tokens = self.problem.uneven and self.oracle.weighting == "examples"
        if not by_tokens or not isinstance(loss, Tensor):
            return loss
        own = torch.from_numpy(weights).to(loss.device)
        whole = self.comm.all_reduce(own[:, None], count=False)[0]
        return torch.where(own > 0, loss * own, 0.0) * (self.comm.n / whole.clamp(min=1.0))

    def _restart(self) -> None:
        """Let the problem move parameters into what is not trained, if it is time."""
        restarts, made = self.problem.restarts, self.comm.step + 1
        if restarts is None or made % restarts.every:
            return
        x, names = self.state.x, set[str]()
        for i, row in enumerate(x):
            self.layout.bind(self.problem.module, row)
            self._buffers.bind(i)
            names |= set(restarts.merge_(self.problem.module, made))
        for rows in self._optimizer_rows():
            for s in self.layout.slices:
                if s.name in names:
                    restarts.prune_(rows, s, made)

    def _optimizer_rows(self) -> list[Tensor]:
        """Return the optimizer's state, (local, d) each.

        Raises:
            ConfigError: it has another form, in which parameters cannot be told apart.
        """
        state = getattr(self.state, "optimizer", None)
        tensors = [] if state is None else list(flatten(state)[0].values())
        if any(t.shape != self.state.x.shape for t in tensors):
            assert self.algorithm.optimizer is not None
            raise ConfigError(
                "task.scheme: merges reset the optimizer's state of single parameters, and that of "
                f"{self.algorithm.optimizer.name} is packed; use adam, adamw, momentum or sgd"
            )
        return tensors

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

    def totals(self) -> dict[str, int]:
        """Return how many ``examples``, or ``tokens``, the batches of all ranks have held so far.

        Those that are predicted: what ``Problem.weigh`` counts. An example that is drawn again
        counts again. Nothing where privacy hides how large a batch was.
        """
        if self._figures == "hidden":
            return {}
        # A loss that is not weighed by examples is one per token.
        per_token = self.problem.weigh is not Problem.weigh
        row = torch.from_numpy(self._weighed)[:, None].to(self.comm.device)
        total = self.comm.all_reduce(row, "sum", count=False)
        return {self._marked("tokens" if per_token else "examples"): round(float(total))}

    def count_on(self, totals: Mapping[str, int]) -> None:
        """Begin with the ``totals`` of the run that goes on; every process calls it."""
        if 0 in self.comm.ranks:  # the sum is what counts
            self._weighed[0] += sum(totals.values())

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
        comm, x = self.comm, self.state.x
        equal = comm.n == 1 or self.algorithm.keeps_equal(comm.topology)  # then it is any of them
        row = x[0] if equal else comm.all_reduce(x, "mean", count=False)[0]
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


def _require_restarts(oracle: Oracle, algorithm: Algorithm, topology: Topology) -> BufferRows:
    """Return the ranks' buffers, where the oracle and the algorithm go with restarts.

    Raises:
        ConfigError: they do not; says why, and the way out.
    """
    buffers = getattr(oracle, "buffers", None)
    fits = algorithm.mean_delay(topology) == 0 and oracle.backpropagates
    if not fits or not isinstance(buffers, BufferRows):
        raise ConfigError(
            "task.scheme: merges change the frozen weights of all ranks alike, which goes with "
            f"algorithm all-reduce and oracle backprop (and dp), not with {algorithm.name} and "
            f"{oracle.name}; use these, or scheme sltrain"
        )
    return buffers
