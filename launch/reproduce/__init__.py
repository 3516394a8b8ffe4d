"""What the papers claim, run again: one module per paper, a function per group of claims."""
