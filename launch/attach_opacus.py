"""What ``gossamer.attach`` takes from Opacus: gradients of single examples, and a DPOptimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gossamer.algorithms.oracles.per_sample import check_layers
from gossamer.runtime import ConfigError

__all__ = ["GradSamples", "is_from_opacus", "take_over"]


def is_from_opacus(thing: object) -> bool:
    """Say whether a model or an optimizer is one of Opacus', which need not be installed."""
    return any(cls.__module__.split(".")[0] == "opacus" for cls in type(thing).__mro__)


def take_over(optimizer: Any) -> dict[str, Any]:
    """Return what a DPOptimizer knows, by the names of the privacy block.

    Raises:
        ConfigError: it bounds gradients otherwise than by one norm, or before we see them.
    """
    from opacus.optimizers import DistributedDPOptimizer, DPOptimizer

    if type(optimizer) not in (DPOptimizer, DistributedDPOptimizer):
        raise ConfigError(
            f"attach: {type(optimizer).__name__} bounds gradients in a way of its own; use "
            "make_private(clipping='flat', grad_sample_mode='hooks'), or hand over the torch "
            "optimizer and say how in privacy={'clip': ...}"
        )
    return {
        "noise_multiplier": float(optimizer.noise_multiplier),
        "clip_norm": float(optimizer.max_grad_norm),
        "loss_reduction": optimizer.loss_reduction,
    }


class GradSamples:
    """The gradients of single examples that Opacus' hooks leave at the parameters.

    A plain model gets the hooks here, and stays the object it is.
    """

    def __init__(self, model: nn.Module, loss_reduction: str, optimizer: Any = None) -> None:
        """Hook the model, unless it is hooked already.

        Args:
            model: plain, or a GradSampleModule.
            loss_reduction: ``mean`` or ``sum``, how the loop's loss goes over a batch.
            optimizer: the DPOptimizer that was handed over; None where there is none.

        Raises:
            ConfigError: Opacus is not installed, or the model has no gradients of single examples.
        """
        try:
            from opacus.grad_sample import GradSampleHooks, GradSampleModule
        except ImportError as error:
            raise ConfigError(
                f"attach: privacy takes gradients of single examples from opacus ({error}); pip "
                "install 'gossamer[privacy]'"
            ) from None
        if any(isinstance(layer, DistributedDataParallel) for layer in model.modules()):
            raise ConfigError(
                "attach: DistributedDataParallel sends gradients before any noise is added; hand "
                "over the module inside, the algorithm talks for it"
            )
        check_layers(model, "attach: model")
        self._optimizer, self._skips = optimizer, list[bool]()
        if not is_from_opacus(model):
            try:
                GradSampleHooks(model, loss_reduction=loss_reduction)
            except (NotImplementedError, ValueError) as error:
                raise ConfigError(
                    f"attach: opacus finds no gradients of single examples: {error}; use layers "
                    "without buffers, and attach a model once"
                ) from None
            return
        if type(model) is not GradSampleModule:
            raise ConfigError(
                f"attach: {type(model).__name__} leaves no gradients of single examples at the "
                "parameters; use grad_sample_mode='hooks', or hand over the plain model"
            )
        if model.loss_reduction != loss_reduction:
            raise ConfigError(
                f"attach: privacy.loss_reduction: {loss_reduction}, but the model was wrapped "
                f"with {model.loss_reduction}; say the same"
            )

    def skip(self, do_skip: bool = True) -> None:
        """Make the next step, or the one after those signalled already, only add to the sum."""
        if self._optimizer is None:
            self._skips.append(do_skip)
        else:
            self._optimizer.signal_skip_step(do_skip)

    def next_is_skipped(self) -> bool:
        """Take the next signal; False where there is none."""
        if self._optimizer is not None:
            return bool(self._optimizer._check_skip_next_step())
        return self._skips.pop(0) if self._skips else False

    def take(self, names: Sequence[str], parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
        """Return each parameter's (m, *shape), None where the batch did not reach it.

        All None: there was no backward pass, which stands for a batch without examples.

        Raises:
            ConfigError: gradients came without those of single examples, or the numbers of
                examples differ.
        """
        found: dict[str, Tensor | None] = {}
        for name, p in zip(names, parameters, strict=True):
            each = getattr(p, "grad_sample", None)
            if isinstance(each, list):
                if len(each) > 1:
                    raise ConfigError(
                        f"attach: {len(each)} backward passes before one step; for parts of one "
                        "batch call optimizer.signal_skip_step() before the step of each part but "
                        "the last"
                    )
                each = each[0] if each else None
            if each is None and p.grad is not None and bool(p.grad.any()):
                raise ConfigError(
                    f"attach: {name} has a gradient, but none of single examples; call "
                    "model.train(), and the model that was handed over, not a part of it"
                )
            found[name] = each
        counts = {name: len(each) for name, each in found.items() if each is not None}
        if len(set(counts.values())) > 1:
            least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
            raise ConfigError(
                f"attach: {least} has gradients of {counts[least]} examples, {most} of "
                f"{counts[most]}; give every layer inputs with the examples first (expand what "
                "they share, such as positions)"
            )
        return list(found.values())

    def tell_accountant(self, parameters: Sequence[nn.Parameter]) -> None:
        """Let a PrivacyEngine count the step, as it would with its own optimizer."""
        if self._optimizer is None or self._optimizer.step_hook is None:
            return
        for p in parameters:
            if getattr(p, "grad_sample", None) is None:  # it counts them; an empty batch has none
                p.grad_sample = p.new_zeros(0, *p.shape)  # type: ignore[attr-defined]
        self._optimizer.step_hook(self._optimizer)

    def clear(self, parameters: Sequence[nn.Parameter]) -> None:
        """Forget the gradients, so that none is used twice."""
        for p in parameters:
            p.grad_sample = None  # type: ignore[attr-defined]
            p.grad = None

    def check(self, noise_multiplier: float, clip_norm: float) -> None:
        """Refuse what a DPOptimizer's schedulers changed.

        Raises:
            ConfigError: its noise or its norm is not what was taken over.
        """
        if self._optimizer is None:
            return
        now = (float(self._optimizer.noise_multiplier), float(self._optimizer.max_grad_norm))
        if now != (noise_multiplier, clip_norm):
            raise ConfigError(
                f"attach: noise_multiplier and max_grad_norm are {now} now and were "
                f"{(noise_multiplier, clip_norm)} when the optimizer was handed over; leave "
                "Opacus' noise and clipping schedulers out"
            )
