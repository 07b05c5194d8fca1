"""Sequence packing: examples of different lengths in one row of tokens, none of which sees another."""
