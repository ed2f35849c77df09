"""Step caching: one engine, its policies, what skips a stack of blocks, and the calibration of two of the policies."""
