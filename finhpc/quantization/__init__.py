"""Weights in 8 and 4 bits: the paper's per-vector scheme, bitsandbytes' int8 and NF4, training with rounded weights."""
