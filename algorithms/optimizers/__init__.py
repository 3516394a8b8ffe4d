"""Local optimizers: one class per rule."""
