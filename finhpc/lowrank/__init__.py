"""Low-rank layers, y = B(A x): what they are, how they start, where they go in a model."""
