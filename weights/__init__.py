"""The shipped weights, and the reading of checkpoints and of weights published by others."""
