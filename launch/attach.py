"""For training loops that exist already: ``gossamer.init`` and ``gossamer.attach``.

    import gossamer
    comm = gossamer.init(topology="exponential")
    optimizer = gossamer.attach(model, torch.optim.AdamW(model.parameters()), algorithm="dsgd")

The loop stays as it was: ``optimizer.step()`` becomes one step of the algorithm, with the gradients
that ``loss.backward()`` left and the torch optimizer as the local update.
"""

from __future__ import annotations

import atexit
import sys
import types
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn

from gossamer.algorithms.problems import Batches
from gossamer.algorithms.protocols import Algorithm
from gossamer.launch.attach_adapters import GivenGradient, find_algorithm
from gossamer.launch.attach_checks import (
    Buffers,
    check_optimizer,
    check_parameters,
    float_buffers,
)
from gossamer.launch.attach_opacus import is_from_opacus
from gossamer.launch.attach_privacy import PrivateGradient, make_private
from gossamer.launch.config import build_topology
from gossamer.runtime import Communicator, ConfigError, RowLayout, open_transport
from gossamer.runtime.state import flatten, restore
from gossamer.runtime.transports import Transport
from gossamer.runtime.transports.select import world_size
from gossamer.topologies import Topology

__all__ = ["Attachment", "attach", "init"]

_NO_BATCHES: Batches = ((),)
"""The loop of the user's own draws the data; the one batch of a step is empty."""

_default: Communicator | None = None


def init(
    topology: str | Mapping[str, Any] | Topology = "exponential",
    *,
    transport: str = "auto",
    seed: int = 0,
    timeout_s: float = 300.0,
) -> Communicator:
    """Join the run that torchrun, mpirun or srun started; one rank per process.

    Args:
        topology: a name, a section as in YAML ({"name": "base", "k": 1}), or a Topology.
        transport: ``auto`` follows the launcher; see ``open_transport``.
        seed: of the counted random numbers.
        timeout_s: bound of every wait for another process.

    Returns:
        The communicator; ``attach`` uses it unless it is given another.

    Raises:
        ConfigError: a name is unknown, or the topology does not fit the number of processes.
    """
    global _default
    graph = as_topology(topology, world_size())
    opened = open_transport(transport, timeout_s=timeout_s)
    _default = Communicator(graph, opened, seed=seed, timeout_s=timeout_s)
    atexit.register(_default.close)
    if opened.name == "mpi" and opened.processes > 1:
        sys.excepthook = _abort_world(opened, sys.excepthook)
    return _default


def _abort_world(transport: Transport, before: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook for uncaught errors: MPI would let the others wait for this rank for ever."""

    def hook(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
        before(kind, error, at)
        sys.stderr.flush()
        transport.abort(1)

    return hook


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    algorithm: str | Mapping[str, Any] = "dsgd",
    topology: str | Mapping[str, Any] | Topology | None = None,
    *,
    comm: Communicator | None = None,
    every: int = 1,
    buffers: Buffers = "keep",
    privacy: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """Turn ``optimizer.step()`` into one step of a decentralized algorithm.

    Parameters move into one flat row per dtype (their ``.data`` become views; frozen ones stay
    where they are, tied ones appear once) and start equal to rank 0's. Schedulers, gradient
    accumulation, clipping and loss scaling (a step that overflows on one rank is skipped on all)
    work as before: the object returned is the one given. Where the algorithm makes the local step
    from another direction (a tracked gradient, D-NASA's normalised average) the torch optimizer
    gets that direction in place of the gradient; with ``SGD(lr=1.0)`` D-NASA is exact.

    Args:
        model: holds every parameter of ``optimizer``.
        optimizer: any torch optimizer; any number of groups.
        algorithm: a name, or a section as in YAML ({"name": "d-nasa", "c": 0.5}).
        topology: as in ``init``; needed where ``init`` was not called.
        comm: what ``init`` returned, where there are several.
        every: average on every k-th ``step()`` only; those between are the optimizer's own.
        buffers: ``keep`` each rank's own, ``average`` the floating-point ones over the graph with
            the parameters, or ``refuse`` a model that has any.
        privacy: fields of ``PrivacyBlock``: gradients of single examples (Opacus' hooks, on a
            GradSampleModule or a plain model) are bounded and summed, and get noise, before any
            message. ``step`` without a ``backward`` stands for an empty batch. A DPOptimizer needs
            it: its noise_multiplier, norm and expected batch are taken over, its own noise is not
            added, its engine's accountant goes on.

    Returns:
        ``optimizer``; ``optimizer.gossamer`` is the ``Attachment``.

    Raises:
        ConfigError: the algorithm needs what a loop of one's own cannot give (gradients at other
            points, several batches a step), the model has buffers to refuse, or trainable
            parameters that the optimizer does not hold; or privacy cannot be had.
    """
    if comm is None:
        comm = _default if topology is None else None
    if comm is None:
        if topology is None:
            raise ConfigError("attach: no topology; call gossamer.init first, or give topology=...")
        comm = init(topology)
    attachment = Attachment(model, optimizer, algorithm, comm, every, buffers, privacy)

    def step(self: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if attachment.unscale(self):
            attachment.step()
        return loss

    # A bound method: learning-rate schedulers wrap ``step.__func__``.
    optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]
    optimizer.gossamer = attachment  # type: ignore[attr-defined]
    # A GradScaler then calls step() on overflow too, and leaves the decision to ``unscale``.
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
    if privacy is not None and not is_from_opacus(optimizer):
        # Where Opacus' BatchMemoryManager looks for it.
        optimizer.signal_skip_step = attachment.signal_skip_step  # type: ignore[attr-defined]
    return optimizer


class Attachment:
    """A model and its optimizer under an algorithm.

    Attributes:
        comm: the ranks, on the topology that the algorithm runs on.
        parts: one per dtype of the model.
        privacy: of the gradients, None without; ``privacy.draw()`` tosses coins for the next batch.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        algorithm: str | Mapping[str, Any],
        comm: Communicator,
        every: int,
        buffers: Buffers,
        privacy: Mapping[str, Any] | None = None,
    ) -> None:
        if every < 1:
            raise ConfigError(f"attach: every must be at least 1, got {every}")
        if comm.local != 1:
            raise ConfigError(f"attach: one rank per process, this one hosts {comm.local}")
        check_optimizer(optimizer, privacy is not None, model)
        given, optimizer = optimizer, getattr(optimizer, "original_optimizer", optimizer)
        check_parameters(model, optimizer)
        self._model, self._every, self._calls = model, every, 0
        self._local_step = optimizer.step
        self._buffers = float_buffers(model, buffers)
        section = {"name": algorithm} if isinstance(algorithm, str) else dict(algorithm)
        dtypes = {p.dtype: None for p in model.parameters() if p.requires_grad}
        layouts = [RowLayout(model, dtype) for dtype in dtypes]
        rules = [find_algorithm(section, optimizer, model, layout) for layout in layouts]
        graph = rules[0].adapt(comm.topology)
        if graph is not comm.topology:
            comm = Communicator(
                graph, comm.transport, seed=comm.seed.value, timeout_s=comm.timeout_s
            )
        self.comm = comm
        self.parts = [
            _Part(model, layout, rule, comm) for layout, rule in zip(layouts, rules, strict=True)
        ]
        self.privacy: PrivateGradient | None = None
        if privacy is not None:
            if len(layouts) > 1 or buffers == "average":
                raise ConfigError(
                    "attach: privacy bounds gradients of one dtype and covers no averaged buffers; "
                    f"convert the model ({', '.join(map(str, dtypes))}), and use buffers='keep'"
                )
            self.privacy = make_private(privacy, model, given, layouts[0], comm, rules[0], every)

    def step(self) -> None:
        """Make one step: the algorithm's, or between two rounds the optimizer's own."""
        if self.privacy is None:
            self._step()
        elif self.privacy.release(self.parts[0].grad):
            self._step()
            self.privacy.finish()

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """Make the next ``step`` (or the one after those signalled) add to the sum only.

        For a private batch in parts: each part's gradients are bounded, the noise comes once.
        """
        self._private().skip(do_skip)

    def privacy_spent(self) -> float:
        """Return the epsilon spent so far, on this rank's examples.

        Raises:
            ConfigError: there is no privacy block, or no guarantee (shuffled batches).
        """
        return self._private().spent()

    def statement(self) -> dict[str, Any]:
        """Return what must be said of the run's privacy, by heading, ready for JSON.

        Raises:
            ConfigError: there is no privacy block.
        """
        return self._private().statement()

    def _private(self) -> PrivateGradient:
        if self.privacy is None:
            raise ConfigError("attach: the loop is not private; give attach privacy={...}")
        return self.privacy

    def _step(self) -> None:
        self._calls += 1
        if self._calls % self._every:
            self._local_step()
            return
        for part in self.parts:
            part.collect()
        for part in self.parts:
            part.step()
        if self._buffers:
            self._average_buffers()
        self.comm.step += 1
        self.comm.round += self.parts[0].algorithm.rounds_per_step

    def unscale(self, optimizer: Any) -> bool:
        """Divide a GradScaler's scale out; return False, on every rank, if any rank overflowed."""
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None:
            return True
        if self.privacy is not None:
            raise ConfigError(
                "attach: a GradScaler scales gradients of single examples too, which changes what "
                "privacy bounds; use bfloat16, which needs no scaling"
            )
        scale = optimizer.grad_scale
        optimizer.found_inf = optimizer.grad_scale = None  # torch's own step refuses them
        if not self.comm.agree(not bool(found_inf)):
            return False
        if scale is not None:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.div_(scale)
        return True

    def consensus(self) -> float:
        """Return sqrt(mean over ranks of ||x_i - mean||^2); every rank calls it."""
        total = 0.0
        for part in self.parts:
            x = part.state.x
            away = x - self.comm.all_reduce(x, "mean", count=False)
            squared = (away.double() ** 2).sum(dim=1, keepdim=True)
            total += float(self.comm.all_reduce(squared, "mean", count=False))
        return float(total**0.5)

    def state_dict(self) -> dict[str, Any]:
        """Return what the algorithm keeps beside the parameters: save it with the optimizer's.

        Under privacy it holds the secret keys of the noise, which nobody else may read.
        """
        parts = []
        for part in self.parts:
            tensors, scalars = flatten(part.state)
            parts.append(
                {"tensors": {k: t.clone() for k, t in tensors.items()}, "scalars": scalars}
            )
        kept = {"step": self.comm.step, "round": self.comm.round, "calls": self._calls}
        private = {} if self.privacy is None else {"privacy": self.privacy.state_dict()}
        return {**kept, "parts": parts, **private}

    def load_state_dict(self, state: Mapping[str, Any], *, same_batches: bool = False) -> None:
        """Take back what ``state_dict`` returned, the parameters included; every rank calls it.

        Args:
            state: of this rank.
            same_batches: under privacy, go on with the same noise, so that the run repeats to the
                bit. Safe only where the loop repeats itself to the bit too: the same examples in
                the same steps, dropout masks and all; else the noise of steps that are made again
                could be taken off. By default it is drawn anew.

        Raises:
            ConfigError: it is another run's, or says nothing of the privacy spent.
        """
        if ("privacy" in state) != (self.privacy is not None):
            raise ConfigError(
                "attach: the state is of a run with privacy, or this one is, but not both, so that "
                "nobody would know the epsilon spent; give attach the same privacy block"
            )
        if self.privacy is not None:
            self.privacy.load_state_dict(state["privacy"], same_batches=same_batches)
        self.comm.step, self.comm.round = state["step"], state["round"]
        self._calls = state["calls"]
        for part, saved in zip(self.parts, state["parts"], strict=True):
            restore(part.state, saved["tensors"], saved["scalars"])

    def _average_buffers(self) -> None:
        flat = torch.cat([b.detach().reshape(-1).double() for b in self._buffers])[None]
        mixed = self.comm.neighbor_average(flat)[0]
        for buffer, values in zip(
            self._buffers, mixed.split([b.numel() for b in self._buffers]), strict=True
        ):
            buffer.copy_(values.view(buffer.shape))


class _Part:
    """The parameters of one dtype: a row, its gradients, and the algorithm's state."""

    def __init__(
        self, model: nn.Module, layout: RowLayout, algorithm: Algorithm, comm: Communicator
    ) -> None:
        self.algorithm, self._comm, self._layout = algorithm, comm, layout
        self._parameters = layout.parameters(model)
        for s, p in zip(layout.slices, self._parameters, strict=True):
            if p.device != comm.device:
                raise ConfigError(
                    f"attach: {s.name} is on {p.device}, transport {comm.transport.name} moves "
                    f"{comm.device}; move the model there, or choose another transport"
                )
        self._model = model
        self.grad = comm.alloc(layout.d, layout.dtype)
        x = comm.alloc(layout.d, layout.dtype)
        layout.gather(model, x[0])
        x.copy_(comm.broadcast(x, root=0, count=False))
        self._oracle = GivenGradient()
        self._oracle.give(self)
        algorithm.require(self._oracle)
        self.state = algorithm.init(comm, self._oracle, x, _NO_BATCHES)
        self._bind()

    @property
    def layout(self) -> RowLayout:
        """How the parameters lie in the row."""
        return self._layout

    def collect(self) -> None:
        """Copy the gradients that ``backward`` left into the gradient row."""
        for p, view in zip(self._parameters, self._layout.views(self.grad[0]), strict=True):
            if p.grad is None:
                view.zero_()
            elif p.grad.data_ptr() != view.data_ptr():
                view.copy_(p.grad)

    def step(self) -> None:
        """Make one step of the algorithm."""
        given = [p.grad for p in self._parameters]
        with torch.no_grad():
            self.algorithm.step(self._comm, self._oracle, self.state, _NO_BATCHES)
        self._bind()
        for p, grad in zip(self._parameters, given, strict=True):
            p.grad = grad  # the user's, for logging, until zero_grad

    def _bind(self) -> None:
        for p, view in zip(self._parameters, self._layout.views(self.state.x[0]), strict=True):
            p.data = view


def as_topology(topology: str | Mapping[str, Any] | Topology, n: int) -> Topology:
    """Return a topology as users write it, a name, a section or itself, for n ranks."""
    if isinstance(topology, Topology):
        return topology
    return build_topology({"name": topology} if isinstance(topology, str) else dict(topology), n)
