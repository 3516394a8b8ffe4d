"""Oracles: what a gradient estimate is made of. One file each."""
