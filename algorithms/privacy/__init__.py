"""Private training: per-sample clipping, noise, filters and accounting."""
