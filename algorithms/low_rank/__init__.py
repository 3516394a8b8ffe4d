"""Pretraining with low-rank and sparse plus low-rank weights."""

from gossamer.algorithms.low_rank import sltrain

__all__ = ["sltrain"]
