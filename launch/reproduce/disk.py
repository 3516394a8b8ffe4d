"""DiSK (arXiv:2410.03883): what a simplified Kalman filter of private gradients gains, and where.

Methods are called by kappa, the weight of the new gradient: .7 with two evaluations a step, the
others with one, as many as DP-SGD.
"""

from __future__ import annotations

from collections.abc import Iterator

from gossamer.launch.reproduce import filters
from gossamer.launch.reproduce.claims import Claim
from gossamer.launch.reproduce.estimates import estimate_quality
from gossamer.launch.reproduce.paper import Paper
from gossamer.launch.reproduce.private import DISK, MOMENTUM
from gossamer.launch.reproduce.simulation import Laboratory

__all__ = ["METHODS", "ONE_EVALUATION", "PAPER", "RHO"]

ONE_EVALUATION = ("DiSK .5", "DiSK .3")
METHODS = ("DiSK .7", *ONE_EVALUATION, MOMENTUM)
RHO = {
    name: fields["kappa"] / (2 - fields["kappa"])
    for name, fields in DISK.items()
    if name != "DiSK .5"
}
"""kappa / (2 - kappa)."""


def estimates(lab: Laboratory) -> Iterator[Claim]:
    """Digits: how far the filtered gradient is from the one without noise."""
    yield from estimate_quality(lab, filters.SAMPLED_DIGITS, (4.0, 0.1), RHO)


def large_rates(lab: Laboratory) -> Iterator[Claim]:
    """Few steps at rates beyond the best: the filter gains."""
    yield from filters.large_rates(lab, METHODS)


def tuned_rates(lab: Laboratory) -> Iterator[Claim]:
    """The same problem, each method at its best rate: it does not."""
    yield from filters.tuned_rates(lab, METHODS)


def small_convolutions(lab: Laboratory) -> Iterator[Claim]:
    """A small network with GroupNorm; ema(.5) stands beside, to tell prediction from averaging."""
    yield from filters.small_convolutions(lab, ("ema(.5)", *ONE_EVALUATION, MOMENTUM))


def convolutions(lab: Laboratory) -> Iterator[Claim]:
    """A larger one: the filter gains at tuned rates too, and so does momentum."""
    yield from filters.convolutions(lab, (*ONE_EVALUATION, MOMENTUM))


def text(lab: Laboratory) -> Iterator[Claim]:
    """Many examples, little noise."""
    yield from filters.characters(lab, (*ONE_EVALUATION, MOMENTUM))


def mnist(lab: Laboratory) -> Iterator[Claim]:
    """Larger images."""
    yield from filters.mnist(lab, (*ONE_EVALUATION, MOMENTUM))


PAPER = Paper(
    title="DiSK (arXiv:2410.03883)",
    groups={
        "estimates": estimates,
        "large-rates": large_rates,
        "tuned-rates": tuned_rates,
        "small-cnn": small_convolutions,
        "cnn": convolutions,
        "text": text,
        "mnist": mnist,
    },
    seeds={
        "estimates": 4,
        "large-rates": 20,
        "tuned-rates": 10,
        "small-cnn": 24,
        "cnn": 5,
        "text": 4,
    },
    limits=(
        "Small steps add the noise up whatever the filter: with each rate tuned there is no gain "
        "on the perceptron, as the tuned rows show. It gains where a step is long beside the "
        "curvature: few steps, large rates, many examples.",
        "It keeps two rows beside the parameters; kappa = .7 takes two gradients a step.",
        "Beside a moving average it has no lag, which counts at large rates. Momentum at a tenth "
        "of the rate, which starts slowly, can do as well or better there: see its rows.",
        "Tables of the paper are not run here, nor aimed at: released code clips the two gradients "
        "apart, or divides the noise, so that its epsilon may be understated.",
        "On text at large rates it gains most on the seeds where DP-SGD ends badly, and little on "
        "the others. The threshold there stems from a measurement that could not be repeated.",
        "The seeds of these runs make their noise too: they repeat, and protect nobody.",
    ),
)
