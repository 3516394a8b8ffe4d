"""Privacy for training loops that exist already: ``gossamer.attach(..., privacy={...})``.

The loop draws its batches and calls ``backward``; ``step`` bounds the gradients of single examples,
adds noise to their sum, and hands the algorithm what is released. Nothing else leaves the rank.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from gossamer.algorithms.oracles.per_sample import add_bounded
from gossamer.algorithms.oracles.per_sample_terms import Dense
from gossamer.algorithms.privacy import accounting
from gossamer.algorithms.privacy.clipping import ClipKind, make_clip
from gossamer.algorithms.privacy.ledger import Ledger
from gossamer.algorithms.privacy.noise import NoiseMode, SecretNoise
from gossamer.algorithms.privacy.statement import PrivacyStatement
from gossamer.algorithms.protocols import Algorithm
from gossamer.launch.attach_opacus import GradSamples, is_from_opacus, take_over
from gossamer.launch.attach_privacy_block import PrivacyBlock
from gossamer.runtime import Communicator, ConfigError, RowLayout, combine
from gossamer.runtime.component import validate
from gossamer.runtime.random import Random

__all__ = ["PrivateGradient", "make_private"]

log = logging.getLogger("gossamer")

_SAMPLERS = ("poisson", "full", "shuffle")


def make_private(
    values: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    layout: RowLayout,
    comm: Communicator,
    algorithm: Algorithm,
    every: int,
) -> PrivateGradient:
    """Return the private gradient of a loop; every rank calls it, and exchanges messages.

    Args:
        values: fields of ``PrivacyBlock``, less those that a DPOptimizer says.
        model: plain, or Opacus' GradSampleModule.
        optimizer: as it was handed over: torch's, or a DPOptimizer.
        layout: of the model's row.
        comm: the ranks.
        algorithm: who averages what with whom.
        every: steps from one round to the next.

    Raises:
        ConfigError: privacy cannot be had so; names the field and the way out.
    """
    given = optimizer if is_from_opacus(optimizer) else None
    taken = {} if given is None else take_over(given)
    for name in taken:
        if name in values:
            raise ConfigError(
                f"attach: privacy.{name}: the DPOptimizer says {taken[name]} already; leave it out"
            )
    if given is not None and "epsilon" in values:
        raise ConfigError(
            "attach: privacy.epsilon: the DPOptimizer's noise_multiplier decides; leave it out, or "
            "hand over the torch optimizer"
        )
    block = validate(PrivacyBlock, {**values, **taken}, "attach: privacy")
    expected = None if given is None else _expected_batch(given, block)
    source = GradSamples(model, block.loss_reduction, given)
    return PrivateGradient(
        block, source, model, layout, comm, block.mode(algorithm, every), expected
    )


def _expected_batch(optimizer: Any, block: PrivacyBlock) -> float | None:
    """Return what a DPOptimizer divides sums by; None where it does not.

    Raises:
        ConfigError: it is not the block's expected batch, rounded down.
    """
    size = optimizer.expected_batch_size
    if size is None or block.loss_reduction == "sum":
        return None
    planned = block.sample_rate * block.examples
    if not planned - 1 < size < planned + 1:
        raise ConfigError(
            f"attach: privacy: sample_rate {block.sample_rate:g} of {block.examples} examples "
            f"makes an expected batch of {planned:.4g}, the DPOptimizer divides by {size}; write "
            "the loader's own rate (1 / len(loader)), and this rank's examples"
        )
    return float(size)


class PrivateGradient:
    """The noisy gradient of the loop's batches, and what it costs.

    Attributes:
        mode: where the noise goes.
    """

    def __init__(
        self,
        block: PrivacyBlock,
        source: GradSamples,
        model: nn.Module,
        layout: RowLayout,
        comm: Communicator,
        mode: NoiseMode,
        expected: float | None,
    ) -> None:
        """Agree with the other ranks, and find sigma; exchanges messages.

        Args:
            block: what the loop says.
            source: of the gradients of single examples.
            model: whose parameters they are of.
            layout: of its row.
            comm: the ranks.
            mode: of the block, under the algorithm.
            expected: what a DPOptimizer divides sums by; None: the expected batch.

        Raises:
            ConfigError: on every rank: their blocks do not go together.
        """
        self.mode = mode
        self._block, self._source, self._comm, self._layout = block, source, comm, layout
        self._parameters = layout.parameters(model)
        self._names = [s.name for s in layout.slices]
        self._clip = make_clip(block.clip, block.clip_norm, block.clip_gamma, len(layout.slices))
        wide = layout.dtype if layout.dtype == torch.float64 else torch.float32
        self._sum = torch.zeros(1, layout.d, dtype=wide, device=comm.device)
        self._seen, self._drawn = 0, -1
        sizes, rates = self._gathered(expected)
        total, local = sum(sizes), mode == "local"
        self._examples = max(sizes) if local else total
        delta = block.delta or accounting.default_delta(self._examples)
        accounting.check_delta(delta, self._examples)
        if block.loss_reduction == "sum":
            self._divisor = 1.0
        elif expected is not None:
            self._divisor = expected
        else:
            self._divisor = block.sample_rate * (block.examples if local else total / comm.n)
        facts = {"examples": self._examples, "noise_mode": get_args(NoiseMode).index(mode)}
        self._ledger = Ledger(
            rates, delta, block.accountant, block.epsilon, planned=block.steps, facts=facts
        )
        sigma = block.noise_multiplier
        found = self._ledger.calibrated(block.steps) if sigma is None else sigma
        row = torch.tensor([[found]], dtype=torch.float64, device=comm.device)
        self._ledger.sigma = float(comm.broadcast(row, count=False))
        if sigma is not None:
            self._ledger.require_countable()
        self._noise = SecretNoise(mode, comm, block.noise_seed)
        self._noise.agree(layout)
        self._seeded = block.noise_seed is not None
        if block.sampler == "shuffle":
            log.warning(
                "attach: privacy.sampler: shuffle: epsilon is counted as for Poisson sampling and "
                "is no guarantee; draw with coins and write sampler: poisson"
            )

    def _gathered(self, expected: float | None) -> tuple[list[int], list[float]]:
        """Return every rank's number of examples and rate."""
        block, comm = self._block, self._comm
        same = {
            "sample_rate": block.sample_rate,
            "noise_multiplier": block.noise_multiplier,
            "epsilon": block.epsilon,
            "steps": block.steps,
            "delta": block.delta,
            "clip_norm": block.clip_norm,
            "expected_batch_size": expected,
            "noise_mode": get_args(NoiseMode).index(self.mode),
            "clip": get_args(ClipKind).index(block.clip),
            "clip_gamma": block.clip_gamma,
            "sampler": _SAMPLERS.index(block.sampler),
            "loss_reduction": block.loss_reduction == "mean",
            "noise_seed": block.noise_seed is not None,
        }
        values = [math.nan if value is None else float(value) for value in same.values()]
        row = torch.tensor([[float(block.examples), *values]], dtype=torch.float64)
        found = comm.all_gather(row.to(comm.device), count=False).cpu()
        for k, name in enumerate(same, start=1):
            column = found[:, k]
            of_each_rank = self.mode == "local" and name in ("sample_rate", "expected_batch_size")
            if not of_each_rank and len(column.nan_to_num(-1).unique()) > 1:
                raise ConfigError(
                    f"attach: privacy.{name} differs between ranks ({column.tolist()}, a choice "
                    "by its place in the list of choices); give all of them the same"
                )
        return [int(size) for size in found[:, 0]], found[:, 1].tolist()

    # --- a step -----------------------------------------------------------------------------

    def draw(self) -> Tensor:
        """Return the places of the next step's batch, int64 (m,) of 0..N-1, by secret coins.

        The same until the step is made, and after a resume with ``same_batches``.

        Raises:
            ConfigError: the block says that the batches are shuffled.
        """
        block, rank = self._block, self._comm.ranks.start
        if block.sampler == "shuffle":
            raise ConfigError(
                "attach: privacy.sampler: shuffle, but draw() tosses coins; write poisson"
            )
        coins = Random(self._noise.coin_seed(rank)).stream("data", [rank], self._ledger.releases, 0)
        # Rounded down: never more likely than the rate that privacy is counted for.
        heads = math.floor(block.sample_rate * 2**32)
        places = (coins.integers(2**32, block.examples)[0] < heads).nonzero().flatten()
        self._drawn = len(places)
        return places

    def release(self, out: Tensor) -> bool:
        """Take the gradients that ``backward`` left; write what is released to ``out`` (1, d).

        Returns:
            False where only a part of a batch was added to the sum: there is no step.

        Raises:
            ConfigError: gradients of single examples are missing, or it is one step too many.
        """
        self._source.check(self._ledger.sigma, self._block.clip_norm)
        self._ledger.require_room()
        self._add()
        if self._source.next_is_skipped():
            self._source.clear(self._parameters)
            return False
        if self._drawn not in (-1, self._seen):
            seen, self._seen = self._seen, 0
            self._sum.zero_()
            raise ConfigError(
                f"attach: {seen} examples in this step, draw() gave {self._drawn}; take one "
                "step with the batch that was drawn, whole"
            )
        scales = self._noise.scales(self._ledger.sigma * self._clip.sensitivity)
        self._noise.add_(self._sum, self._layout, self._ledger.releases, scales)
        self._ledger.count()
        out.copy_(combine([(1 / self._divisor, self._sum)], out=self._sum))
        self._sum.zero_()
        self._seen, self._drawn = 0, -1
        self._source.tell_accountant(self._parameters)
        self._source.clear(self._parameters)
        for p, view in zip(self._parameters, self._layout.views(out[0]), strict=True):
            p.grad = view  # what the optimizer's own step may see
        return True

    def finish(self) -> None:
        """Forget the gradient, which the next ``backward`` would add to."""
        for p in self._parameters:
            p.grad = None

    def _add(self) -> None:
        """Add this batch's bounded gradients to the sum."""
        each = self._source.take(self._names, self._parameters)
        count = next((len(g) for g in each if g is not None), 0)
        self._seen += count
        if count == 0:
            return
        with torch.no_grad():
            # In the sum's precision, whatever the model's.
            terms = [[] if g is None else [Dense(g.to(self._sum.dtype))] for g in each]
            add_bounded(terms, count, self._clip, self._layout, self._sum[0])

    # --- what is said and kept --------------------------------------------------------------

    def skip(self, do_skip: bool = True) -> None:
        """Say that the next step is of a part of a batch only: its sum waits for the rest."""
        self._source.skip(do_skip)

    def spent(self) -> float:
        """Return the epsilon of what was released so far, on this rank's examples.

        Raises:
            ConfigError: the batches were shuffled, so that no epsilon is known.
        """
        if self._block.sampler == "shuffle":
            raise ConfigError(
                "attach: privacy.sampler: shuffle has no epsilon; statement() has that of Poisson "
                "sampling as epsilon_approx, which is no guarantee"
            )
        return self._ledger.spent(self._comm.ranks.start)

    def statement(self) -> dict[str, Any]:
        """Return what must be said of the run's privacy, by heading, ready for JSON."""
        block, ledger = self._block, self._ledger
        worst = ledger.worst
        return PrivacyStatement(
            epsilon=ledger.spent(worst),
            epsilon_target=block.epsilon,
            delta=ledger.delta,
            accountant=ledger.accountant_version(),
            unit=block.unit,
            examples=self._examples,
            sampler=block.sampler,
            noise_multiplier=ledger.sigma,
            rate=ledger.rates[worst],
            steps=ledger.releases,
            clip=block.clip,
            clip_norm=block.clip_norm,
            noise_mode=self.mode,
            noise_seeded=self._seeded,
            ranks=self._comm.n,
            keys_kept="state",
            segments=tuple((s.noise_multiplier, s.rate, s.steps) for s in ledger.segments(worst)),
        ).as_dict()

    def _draw_keys(self) -> None:
        self._noise = SecretNoise(self.mode, self._comm, self._block.noise_seed)
        self._noise.agree(self._layout)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the secret keys and the history of releases: nobody else may read them.

        Raises:
            ConfigError: a part of a batch waits for the rest.
        """
        if self._seen:
            raise ConfigError(
                "attach: a part of a batch waits for the rest; save after its last step"
            )
        return {
            **self._noise.state(),
            "seeded": torch.tensor([[int(self._seeded)]]),
            **self._ledger.state(self._comm.ranks),
        }

    def load_state_dict(self, state: Mapping[str, Tensor], *, same_batches: bool) -> None:
        """Go on counting; with the same noise only where every gradient to come is the same too.

        A step that was seen and is made again with other examples, or another dropout mask, under
        the same noise shows the difference of the two sums in the clear.

        Raises:
            ConfigError: the releases to come would not compose with those before.
        """
        self._ledger.load(dict(state), self._comm.ranks)
        self._noise.load(dict(state))
        self._seeded = self._seeded or bool(state["seeded"][0])
        self._sum.zero_()
        self._seen, self._drawn = 0, -1
        if not same_batches:
            self._draw_keys()
