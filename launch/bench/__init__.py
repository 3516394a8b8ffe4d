"""Benchmarks behind ``gossamer bench``: one file each; what they measure with in ``measure``."""
