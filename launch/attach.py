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
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.algorithms.problems import Batches
from gossamer.algorithms.protocols import Algorithm
from gossamer.algorithms.registry import find
from gossamer.launch.attach_adapters import GivenGradient, TorchOptimizer, TorchSGD
from gossamer.launch.config import build_topology
from gossamer.runtime import Communicator, ConfigError, RowLayout, open_transport
from gossamer.runtime.component import validate
from gossamer.runtime.state import flatten, restore
from gossamer.runtime.transports import Transport
from gossamer.runtime.transports.select import world_size
from gossamer.topologies import Topology

__all__ = ["Attachment", "attach", "init"]

Buffers = Literal["keep", "average", "refuse"]

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

    Returns:
        ``optimizer``; ``optimizer.gossamer`` is the ``Attachment``.

    Raises:
        ConfigError: the algorithm needs what a loop of one's own cannot give (gradients at other
            points, several batches a step), the model has buffers to refuse, or trainable
            parameters that the optimizer does not hold.
    """
    if comm is None:
        comm = _default if topology is None else None
    if comm is None:
        if topology is None:
            raise ConfigError("attach: no topology; call gossamer.init first, or give topology=...")
        comm = init(topology)
    attachment = Attachment(model, optimizer, algorithm, comm, every, buffers)

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
    return optimizer


class Attachment:
    """A model and its optimizer under an algorithm.

    Attributes:
        comm: the ranks, on the topology that the algorithm runs on.
        parts: one per dtype of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        algorithm: str | Mapping[str, Any],
        comm: Communicator,
        every: int,
        buffers: Buffers,
    ) -> None:
        if every < 1:
            raise ConfigError(f"attach: every must be at least 1, got {every}")
        if comm.local != 1:
            raise ConfigError(f"attach: one rank per process, this one hosts {comm.local}")
        _check_optimizer(optimizer)
        _check_parameters(model, optimizer)
        self._model, self._every, self._calls = model, every, 0
        self._local_step = optimizer.step
        self._buffers = _float_buffers(model, buffers)
        section = {"name": algorithm} if isinstance(algorithm, str) else dict(algorithm)
        dtypes = {p.dtype: None for p in model.parameters() if p.requires_grad}
        layouts = [RowLayout(model, dtype) for dtype in dtypes]
        rules = [_algorithm(section, optimizer, model, layout) for layout in layouts]
        graph = rules[0].adapt(comm.topology)
        if graph is not comm.topology:
            comm = Communicator(
                graph, comm.transport, seed=comm.seed.value, timeout_s=comm.timeout_s
            )
        self.comm = comm
        self.parts = [
            _Part(model, layout, rule, comm) for layout, rule in zip(layouts, rules, strict=True)
        ]

    def step(self) -> None:
        """Make one step: the algorithm's, or between two rounds the optimizer's own."""
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
        """Return what the algorithm keeps beside the parameters: save it with the optimizer's."""
        parts = []
        for part in self.parts:
            tensors, scalars = flatten(part.state)
            parts.append(
                {"tensors": {k: t.clone() for k, t in tensors.items()}, "scalars": scalars}
            )
        return {
            "step": self.comm.step,
            "round": self.comm.round,
            "calls": self._calls,
            "parts": parts,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` returned, the parameters included."""
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


def _algorithm(
    section: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    layout: RowLayout,
) -> Algorithm:
    cls = find("algorithm", str(section["name"]))
    assert issubclass(cls, Algorithm), cls
    local = TorchOptimizer()
    local.wrap(optimizer, layout.parameters(model), layout)
    values = {k: v for k, v in section.items() if k != "name"}
    try:
        rule = validate(cls, {**values, "optimizer": local}, "attach: algorithm")
    except ConfigError as error:
        if "optimizer" not in str(error):
            raise
        plain = TorchSGD.of(optimizer)
        if plain is None:
            raise ConfigError(
                f"attach: {section['name']} makes the local update itself and takes "
                f"torch.optim.SGD without momentum only, not {type(optimizer).__name__}; or "
                "choose dsgd or gradient-tracking, which take any"
            ) from None
        rule = validate(cls, {**values, "optimizer": plain}, "attach: algorithm")
    if rule.batches_per_step != 1:
        raise ConfigError(
            f"attach: {section['name']} takes {rule.batches_per_step} batches a step; "
            "use dsgd with every=K for local steps"
        )
    return rule


def as_topology(topology: str | Mapping[str, Any] | Topology, n: int) -> Topology:
    """Return a topology as users write it, a name, a section or itself, for n ranks."""
    if isinstance(topology, Topology):
        return topology
    return build_topology({"name": topology} if isinstance(topology, str) else dict(topology), n)


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    if hasattr(optimizer, "gossamer"):
        raise ConfigError("attach: this optimizer is attached already; make a new one")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError(
            "attach: LBFGS evaluates the loss many times a step; choose an optimizer of one "
            "gradient a step, such as SGD or AdamW"
        )


def _check_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for key, name in names.items() if key not in held]
    if missing:
        raise ConfigError(
            f"attach: the optimizer does not hold trainable parameters {missing[:3]}; give it "
            "model.parameters(), or freeze them (requires_grad_(False))"
        )
    foreign = [p for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
    if any(id(p) not in names for p in foreign):
        raise ConfigError("attach: the optimizer holds trainable parameters of another model")


def _float_buffers(model: nn.Module, buffers: Buffers) -> list[Tensor]:
    found = dict(model.named_buffers())
    if buffers == "refuse" and found:
        raise ConfigError(
            f"attach: the model has buffers ({next(iter(found))}, ...); use buffers='keep' or "
            "'average', or normalisation without statistics (GroupNorm)"
        )
    if buffers not in ("keep", "average", "refuse"):
        raise ConfigError(f"attach: buffers must be keep, average or refuse, got {buffers!r}")
    if buffers != "average":
        return []
    return [b for b in found.values() if b.is_floating_point()]
