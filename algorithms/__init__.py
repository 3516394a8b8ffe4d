"""Oracles, algorithms, optimizers and tasks, one folder per family."""
