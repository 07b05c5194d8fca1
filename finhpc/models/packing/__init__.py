"""Examples of different lengths side by side in one row, each blind to the others."""
