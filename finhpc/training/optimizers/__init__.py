"""Optimizers, one file each, with their learning rates and what they keep per parameter."""
