"""How much privacy a run has spent, and how much noise a budget asks for.

The mechanism is the Poisson-sampled Gaussian under add-or-remove-one neighbors: each step takes
every example by its own coin, bounds its gradient by C and adds N(0, (noise_multiplier C)^2).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, cast, get_args

import numpy as np

from gossamer.algorithms.privacy.exact_gaussian import gaussian_epsilon, gaussian_mu
from gossamer.runtime.errors import ConfigError, nearest

__all__ = [
    "Accountant",
    "Segment",
    "accountant_version",
    "calibrate",
    "check_delta",
    "default_delta",
    "require_countable",
    "resolve",
    "spent",
]

Accountant = Literal["prv", "rdp", "gaussian"]
"""``prv``: numerical composition (arXiv:2106.02848); ``rdp``: Renyi, looser and always at hand
(arXiv:1908.10530); ``gaussian``: exact, where every step takes every example."""

_PRV_ERROR = 0.01  # Opacus' default eps_error: what it may be above the true epsilon
# Its convolutions carry absolute errors of about 1e-14: at delta 1e-13 it reports 4.15 for 4.29.
_PRV_MIN_DELTA = 1e-10
_PRV_MAX_POINTS = 2**25  # 256 MiB per array of its grid, of which it holds several
_PRV_MAX_LOSS = 700.0  # it takes exp() of the privacy loss in float64
_MAX_NOISE = 1e6  # where Opacus' search for a noise multiplier gives up
_NUMERICAL = (ArithmeticError, RuntimeError, ValueError, MemoryError)


@dataclass(frozen=True)
class Segment:
    """Steps in a row with the same noise and the same sampling; a history is a sequence of them.

    Attributes:
        noise_multiplier: standard deviation of the noise over the clipping norm; 0 adds none.
        rate: probability that an example is in the batch, in [0, 1].
        steps: how many; one with an empty batch counts.
    """

    noise_multiplier: float
    rate: float
    steps: int

    def __post_init__(self) -> None:
        """Refuse what no mechanism has."""
        if not (self.noise_multiplier >= 0 and math.isfinite(self.noise_multiplier)):
            raise ConfigError(
                f"noise_multiplier: {self.noise_multiplier} must be finite and not negative"
            )
        if not 0 <= self.rate <= 1:
            raise ConfigError(
                f"rate: {self.rate} is no probability; use the expected batch over the number of "
                "examples, at most 1"
            )
        if self.steps < 0:
            raise ConfigError(f"steps: {self.steps} must not be negative")


def spent(history: Sequence[Segment], delta: float, accountant: str = "prv") -> float:
    """Return the epsilon for which the history is (epsilon, delta)-DP; never too small a one.

    Every accountant gives an upper bound; ``prv`` lies up to 0.01 above the least epsilon, ``rdp``
    further, ``gaussian`` on it. ``prv`` costs 0.1 s to 10 s a call, growing with the epsilon, the
    root of the number of steps and the number of distinct segments; for a line in the log at every
    step use ``rdp``.

    Args:
        history: what was done, in any order; equal segments are counted together.
        delta: in (0, 1); see ``check_delta``.
        accountant: what ``resolve`` takes.

    Returns:
        0 for a history that looks at no example, infinity for one without noise.

    Raises:
        ConfigError: the accountant is unknown, unsound, not installed, or cannot do this history.
    """
    _check_probability(delta)
    merged = _merge(history)
    accountant = resolve(merged, accountant)
    if not merged:
        return 0.0
    if any(segment.noise_multiplier == 0 for segment in merged):
        return math.inf
    if accountant == "gaussian":
        # Steps compose by the squares of 1 / noise_multiplier (arXiv:1905.02383, Corollary 3.3).
        mu = math.sqrt(sum(s.steps / s.noise_multiplier**2 for s in merged))
        return gaussian_epsilon(mu, delta)
    if accountant == "rdp":
        return _rdp(merged, delta)
    return _prv(merged, delta)


def resolve(history: Sequence[Segment], accountant: str = "prv") -> Accountant:
    """Return the accountant that ``spent`` uses: ``prv`` becomes ``gaussian`` on full batches.

    Raises:
        ConfigError: it is unknown, unfit for reports, or exact only for other histories.
    """
    known = _known(accountant)
    sampled = sorted({segment.rate for segment in history if segment.steps and segment.rate} - {1})
    if known == "prv":
        return "prv" if sampled else "gaussian"
    if known == "gaussian" and sampled:
        raise ConfigError(
            f"accountant: gaussian is exact for full batches and says nothing of rate "
            f"{sampled[0]:g}; use prv"
        )
    return known


def require_countable(history: Sequence[Segment], delta: float, accountant: str = "prv") -> None:
    """Refuse, at little cost, a history that ``spent`` would refuse once it is made.

    Raises:
        ConfigError: as ``spent``.
    """
    resolved = resolve(history, accountant)
    if resolved != "gaussian":
        loss = _rdp(history, delta / 4000 if resolved == "prv" else delta)
        if resolved == "prv":
            _check_prv_grid(loss, sum(s.steps for s in history), delta)


def calibrate(
    epsilon: float,
    delta: float,
    rate: float,
    steps: int,
    accountant: str = "prv",
    tolerance: float = 0.01,
) -> float:
    """Return the noise multiplier that spends at most ``epsilon`` over ``steps`` equal steps.

    Exact for rate 1; else by bisection, about ten calls of the accountant.

    Args:
        epsilon: the target, above 0.
        delta: in (0, 1).
        rate: sampling probability in (0, 1].
        steps: at least 1.
        accountant: what ``resolve`` takes.
        tolerance: how far below the target the epsilon may end; a smaller one saves up to 1.5% of
            noise for more calls. Unused at rate 1 (but with ``rdp``).

    Raises:
        ConfigError: no noise reaches this target, or the accountant cannot do it.
    """
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise ConfigError(f"epsilon: {epsilon} must be finite and above 0")
    if not tolerance > 0:
        raise ConfigError(f"tolerance: {tolerance} must be above 0")
    if not rate > 0 or steps < 1:
        raise ConfigError(
            f"rate: {rate}, steps: {steps}: no example is ever looked at, so that no noise is "
            "needed; use a rate above 0 and at least one step"
        )
    loudest = Segment(_MAX_NOISE, rate, steps)
    used = resolve([loudest], accountant)
    if used == "gaussian":
        _check_probability(delta)
        return math.sqrt(steps) / gaussian_mu(epsilon, delta)
    floor = spent([loudest], delta, used)
    if epsilon <= floor:
        other = "prv" if used == "rdp" else "a target above that"
        raise ConfigError(
            f"epsilon: {epsilon} cannot be had: accountant {used} reports at least {floor:.4g} at "
            f"delta {delta:g}, whatever the noise; use {other}"
        )
    if used == "prv":
        # The search halves the noise until it has too little, where epsilon is about fourfold.
        _check_prv_grid(4 * epsilon + 5, steps, delta)
    search = _opacus(used).utils.get_noise_multiplier
    with _numerical(used, f"the search for epsilon {epsilon:g} at rate {rate:g}, {steps} steps"):
        return float(
            search(
                target_epsilon=epsilon,
                target_delta=delta,
                sample_rate=rate,
                steps=steps,
                accountant=used,
                epsilon_tolerance=tolerance,
            )
        )


def check_delta(delta: float, examples: int) -> None:
    """Refuse a delta at which publishing one whole example would count as private.

    Raises:
        ConfigError: delta is no probability above 0, or at least 1 / examples.
    """
    _check_probability(delta)
    if delta * examples >= 1 or examples < 1:
        raise ConfigError(
            f"delta: {delta:g} must be below 1 / examples = 1 / {examples}: with it, publishing an "
            f"example picked at random is private; use {examples}^-1.1 = "
            f"{float(max(examples, 1)) ** -1.1:.3g}"
        )


def default_delta(examples: int) -> float:
    """Return N^-1.1 for N examples.

    Raises:
        ConfigError: there are fewer than two, among which none can hide.
    """
    if examples < 2:
        raise ConfigError(f"delta: {examples} examples have no privacy to share; use 2 or more")
    return float(float(examples) ** -1.1)


def accountant_version(accountant: str = "prv") -> str:
    """Return what a report calls the accountant: ``PRV, opacus 1.6.0``.

    Raises:
        ConfigError: as ``resolve`` does, or it is not installed.
    """
    if _known(accountant) == "gaussian":
        return "exact Gaussian (arXiv:1805.06530, Theorem 8)"
    try:
        return f"{accountant.upper()}, opacus {version('opacus')}"
    except PackageNotFoundError as error:
        raise _not_installed(accountant, error) from error


def _known(accountant: str) -> Accountant:
    if accountant == "gdp":
        raise ConfigError(
            "accountant: gdp is a central limit approximation and no bound: it reports 0.24 where "
            "2.1 were spent (noise_multiplier 0.5, rate 0.001, 100 steps); use prv, or rdp"
        )
    for known in get_args(Accountant):
        if accountant == known:
            return cast(Accountant, known)
    raise ConfigError(
        f"accountant: unknown '{accountant}'{nearest(accountant, get_args(Accountant))}"
    )


def _rdp(history: Sequence[Segment], delta: float) -> float:
    # Opacus' own orders, fractional ones among them: integers alone report up to 0.4 more.
    accountant = _opacus("rdp").RDPAccountant()
    accountant.history = [(s.noise_multiplier, s.rate, s.steps) for s in history]
    with _numerical("rdp", _described(history, delta)):
        return _finite(float(accountant.get_epsilon(delta=delta)))


def _prv(history: Sequence[Segment], delta: float) -> float:
    accountant = _opacus("prv").PRVAccountant()
    accountant.history = [(s.noise_multiplier, s.rate, s.steps) for s in history]
    # Opacus sizes its grid by the same figure, but allocates it however large it comes out.
    loss = _rdp(history, delta / 4000)
    _check_prv_grid(loss, sum(s.steps for s in history), delta)
    with _numerical("prv", _described(history, delta)):
        return _finite(float(accountant.get_epsilon(delta=delta, eps_error=_PRV_ERROR)))


def _check_prv_grid(loss: float, steps: int, delta: float) -> None:
    """Refuse a grid that float64 or the memory does not bear (loss: half its width)."""
    if delta < _PRV_MIN_DELTA:
        raise ConfigError(
            f"delta: {delta:g} is below what accountant prv computes reliably in float64 "
            f"({_PRV_MIN_DELTA:g}); use accountant: rdp"
        )
    mesh = _PRV_ERROR / math.sqrt(steps * math.log(12_000 / delta) / 2)
    points = 2 * (loss + 3) / mesh
    if loss > _PRV_MAX_LOSS or points > _PRV_MAX_POINTS:
        raise ConfigError(
            f"accountant: prv would need a grid of {points:.2g} points over privacy losses up to "
            f"{loss:.3g} for {steps} steps (at most {_PRV_MAX_POINTS:.2g}, and up to "
            f"{_PRV_MAX_LOSS:g}); add noise, or use accountant: rdp"
        )


@contextmanager
def _numerical(accountant: Accountant, what: str) -> Iterator[None]:
    """Turn a numerical failure into an error that says what to use; never into another figure."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        # "Optimal order is the largest alpha": still a bound. log(0) at rate 1: meant to be -inf.
        warnings.simplefilter("ignore")
        try:
            yield
        except _NUMERICAL as error:
            fix = "accountant: rdp" if accountant == "prv" else "more noise, or accountant: prv"
            raise ConfigError(
                f"accountant: {accountant} failed on {what}: {error or type(error).__name__}; "
                f"use {fix}"
            ) from error


def _finite(epsilon: float) -> float:
    """Return an accountant's epsilon; a large delta makes it negative, which 0 bounds too."""
    if not math.isfinite(epsilon):
        raise ArithmeticError(f"epsilon came out as {epsilon}")
    return max(epsilon, 0.0)


def _described(history: Sequence[Segment], delta: float) -> str:
    first = [f"({s.noise_multiplier:g}, {s.rate:g}, {s.steps})" for s in history[:3]]
    return f"(noise_multiplier, rate, steps) {', '.join(first)} at delta {delta:g}"


def _merge(history: Sequence[Segment]) -> list[Segment]:
    """Return one segment for each distinct mechanism; what looks at no example is left out."""
    steps: dict[tuple[float, float], int] = {}
    for s in history:
        if s.steps and s.rate:
            key = (float(s.noise_multiplier), float(s.rate))
            steps[key] = steps.get(key, 0) + s.steps
    # Sorted: the sum over segments, so the last bits of epsilon, must not depend on their order.
    return [Segment(noise, rate, count) for (noise, rate), count in sorted(steps.items())]


def _check_probability(delta: float) -> None:
    if not 0 < delta < 1:
        raise ConfigError(
            f"delta: {delta} must lie between 0 and 1, both excluded; use N^-1.1 for N examples"
        )


def _opacus(accountant: str) -> Any:  # a module without types
    try:
        import opacus.accountants.utils
    except ImportError as error:
        raise _not_installed(accountant, error) from error
    return opacus.accountants


def _not_installed(accountant: str, error: ImportError) -> ConfigError:
    return ConfigError(
        f"accountant: {accountant} needs opacus ({error}); install gossamer[privacy]: "
        "pip install 'gossamer[privacy]'"
    )
