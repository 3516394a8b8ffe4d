"""What a step gains per example, with and without privacy (arXiv:2402.18752, section 3).

With the gradient G and the Hessian H of the loss, the covariance Sigma of examples' gradients, a
bound that multiplies each by about c (its sensitivity scaled to 1) and noise sigma / B, a step of
rate lr over a batch of B examples lowers the loss by

    lr c |G|^2 - lr^2 / 2 (c^2 G'HG + c^2 tr(H Sigma) / B + sigma^2 tr(H) / B^2).

Without privacy c = 1 and sigma = 0. At the best rate, and per example, that is

    1/2 |G|^4 / (B G'HG + tr(H Sigma) + sigma^2 tr(H) / (c^2 B)),

whose last term is what privacy costs: it makes small batches bad, where they are best without it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from gossamer.algorithms.privacy import accounting

__all__ = ["Advice", "Budget", "Terms", "advise", "best_batch"]

_WORTHWHILE = 2.0
"""From this ratio of public to private improvement on, ``advise`` sends public data first."""
_REFINEMENTS = 2


@dataclass(frozen=True)
class Terms:
    """What the improvement is made of, at one point.

    Attributes:
        grad_square: |G|^2.
        curvature: G'HG.
        trace: tr(H).
        noise_curvature: tr(H Sigma).
        clip_factor: c, the mean of what examples' gradients are multiplied by, over the
            sensitivity.
        trace_error: standard error of ``trace``, which comes of random probes.
        noise_curvature_error: standard error of ``noise_curvature``.
        loss: f there.
        examples: how many stand for f.
        parameters: size of the model.
    """

    grad_square: float
    curvature: float
    trace: float
    noise_curvature: float
    clip_factor: float = 1.0
    trace_error: float = 0.0
    noise_curvature_error: float = 0.0
    loss: float = math.nan
    examples: int = 0
    parameters: int = 0

    def expected(self, lr: float, batch: float, noise: float | None = None) -> float:
        """Return by how much a step lowers the loss on average, to second order.

        Args:
            lr: the step is -lr / batch times the sum of the (clipped, noisy) gradients.
            batch: B.
            noise: sigma, of the sum; None: a public step, neither clipped nor noisy.
        """
        c, sigma = (1.0, 0.0) if noise is None else (self.clip_factor, noise)
        square = c**2 * (self.curvature + self.noise_curvature / batch)
        square += sigma**2 * self.trace / batch**2
        return lr * c * self.grad_square - lr**2 / 2 * square

    def best_lr(self, batch: float, noise: float | None = None) -> float:
        """Return the rate that lowers the loss most; infinity where the quadratic has no bottom."""
        c = 1.0 if noise is None else self.clip_factor
        cost = self.cost(batch, noise)
        return batch * self.grad_square / (c * cost) if cost > 0 else math.inf

    def cost(self, batch: float, noise: float | None = None) -> float:
        """Return the denominator of the improvement per example."""
        return batch * self.curvature + self.noise_curvature + self.decelerator(batch, noise)

    def decelerator(self, batch: float, noise: float | None) -> float:
        """Return the privacy's part of ``cost``: sigma^2 tr(H) / (c^2 B)."""
        return 0.0 if noise is None else noise**2 * self.trace / (self.clip_factor**2 * batch)

    def per_example(self, batch: float, noise: float | None = None) -> float:
        """Return the improvement at the best rate over B; infinity where there is no best rate."""
        cost = self.cost(batch, noise)
        return 0.5 * self.grad_square**2 / cost if cost > 0 else math.inf

    def best_batch(self, noise: float) -> float:
        """Return the B of the largest improvement per example for a given sigma.

        sigma sqrt(tr(H) / (c^2 G'HG)); infinity where the loss does not curve up along G, and 0
        where noise does not hurt (tr(H) <= 0): small batches are best then, as without privacy.
        """
        if self.trace <= 0 or noise == 0:
            return 0.0
        if self.curvature <= 0:
            return math.inf
        return noise * math.sqrt(self.trace / self.curvature) / self.clip_factor

    @property
    def critical_batch(self) -> float:
        """The B at which a public step gains half as much per example as a single one's limit."""
        return self.noise_curvature / self.curvature if self.curvature > 0 else math.inf


@dataclass(frozen=True)
class Budget:
    """Privacy for a number of passes over the data.

    Attributes:
        epsilon: of the whole run.
        delta: of the whole run.
        epochs: passes over the examples.
        examples: N.
        accountant: ``rdp`` is fast, and close enough to compare batch sizes by.
    """

    epsilon: float
    delta: float
    epochs: float
    examples: int
    accountant: str = "rdp"

    def steps(self, batch: int) -> int:
        """Return the number of steps with that expected batch."""
        return max(1, round(self.epochs * self.examples / batch))

    def noise(self, batch: int) -> float:
        """Return the sigma that the budget asks for with that expected batch."""
        rate = min(1.0, batch / self.examples)
        return _calibrated(self.epsilon, self.delta, rate, self.steps(batch), self.accountant)


@lru_cache(maxsize=1024)
def _calibrated(epsilon: float, delta: float, rate: float, steps: int, accountant: str) -> float:
    return accounting.calibrate(epsilon, delta, rate, steps, accountant)


def best_batch(terms: Terms, budget: Budget) -> int:
    """Return the B of the largest improvement per example within a budget.

    sigma follows from B, so that there is no closed form. The cost is a rising line plus
    sigma(B)^2 / B, which falls: from N down B is halved until the cost has risen twice in a row,
    then the neighbours of the best are searched, to about a sixth of B. It is flat there.

    Returns:
        in 1..N; N also where the loss does not curve up along the gradient.
    """

    def cost(batch: int) -> float:
        return terms.cost(batch, budget.noise(batch))

    most = budget.examples
    best, rises, batch = most, 0, most // 2
    while batch >= 1 and rises < 2:
        if cost(batch) < cost(best):
            best, rises = batch, 0
        else:
            rises += 1
        batch //= 2
    ratio = 2.0
    for _ in range(_REFINEMENTS):
        ratio = ratio**0.5
        near = {round(best * ratio**k) for k in (-1, 0, 1)}
        best = min(sorted({min(max(1, b), most) for b in near}), key=cost)
    return best


@dataclass(frozen=True)
class Advice:
    """What the terms say for a budget.

    Attributes:
        batch: B of the largest private improvement per example within the budget.
        noise: its sigma.
        batch_fixed_noise: B of the largest one, were sigma fixed at ``noise``.
        ratio: improvement per example of public steps at their own best batch (no larger than
            the critical one) over that of private steps at ``batch``.
        public_first: whether to train on public examples first.
        text: the same in sentences.
    """

    batch: int
    noise: float
    batch_fixed_noise: float
    ratio: float
    public_first: bool
    text: tuple[str, ...]


def advise(terms: Terms, budget: Budget) -> Advice:
    """Say which batch size to take, and whether to train on public examples first."""
    batch = best_batch(terms, budget)
    noise = budget.noise(batch)
    fixed = terms.best_batch(noise)
    small = min(max(1.0, terms.critical_batch), float(batch))
    private, public = terms.per_example(batch, noise), terms.per_example(small)
    finite = 0 < private < math.inf and 0 < public < math.inf
    ratio = public / private if finite else math.nan
    first = ratio >= _WORTHWHILE
    said = [
        f"batch size: {batch} (noise multiplier {noise:.3g}, {budget.steps(batch)} steps for "
        f"{budget.epochs:g} epochs at epsilon {budget.epsilon:g})"
    ]
    if terms.curvature <= 0:
        said.append(
            "The loss does not curve up along the gradient here, so a quadratic has no best step "
            "and the figures no meaning but for the batch size: estimate again after a few steps"
        )
    elif not finite:
        said.append(
            "The curvature that the noise of the gradients meets is negative here, so the figures "
            "have no meaning: estimate again after a few steps"
        )
    elif first:
        said.append(
            f"Public examples gain {ratio:.3g} times as much each as private ones: train on them "
            "first, and switch once their validation loss stops falling (oracle: {name: public, "
            "mix: switch, switch: patience})"
        )
        said.append("Estimate again at a checkpoint of public training: the ratio falls with G")
    else:
        said.append(
            f"Public examples gain {ratio:.3g} times as much each as private ones, less than "
            f"{_WORTHWHILE:g}: here noise costs little, and private steps may begin"
        )
    if terms.clip_factor > 0:
        said.append(
            f"The bound multiplies gradients by {terms.clip_factor:.3g}: private steps want the "
            f"learning rate {terms.best_lr(batch, noise):.3g}, public ones "
            f"{terms.best_lr(small):.3g} (SGD)"
        )
    return Advice(batch, noise, fixed, ratio, first, tuple(said))
