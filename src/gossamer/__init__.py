"""Gossamer: a communication runtime for decentralized and data-parallel training."""

__version__ = "0.1.0"
