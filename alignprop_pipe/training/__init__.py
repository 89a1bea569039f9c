"""The training loop, its evidence and its result."""
