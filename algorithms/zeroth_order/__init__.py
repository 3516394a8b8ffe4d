"""Gradients estimated from losses alone, and what ranks then need to exchange."""
